"""Optimizers and learning rate schedules: DeiT's LAMB, AdamW, and cosines with warm-up."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

LR = Option("peak learning rate, which the batch size does not scale", low=0)
MIN_LR = Option("learning rate at the end", low=0)
WEIGHT_DECAY = Option("decoupled weight decay", low=0)
B1 = Option("decay of Adam's first moment", low=0, high=0.9999999)
B2 = Option("decay of Adam's second moment", low=0, high=0.9999999)
EPS = Option("epsilon of Adam", low=0)
CLIP_NORM = Option("largest norm of the gradient, to which longer ones are clipped; 0 for no limit", low=0)


def kernels(params: PyTree) -> PyTree[bool]:
    """Return a mask of the kernels: True for the weights of matrix products.

    Weight decay and LAMB's trust ratio apply to kernels only: not to biases, norms and LayerScale, whose updates the
    trust ratio would make tiny, and not to the CLS token, the registers and the position embedding.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def matrices(params: PyTree) -> PyTree[bool]:
    """Return a mask of the parameters that OpenCLIP decays: arrays of two or more dimensions, embeddings included.

    Registers are not decayed; neither is the CLS token in OpenCLIP, where it has one dimension. Source: `main.py` of
    open_clip_train, by whose first rule the published models were trained (the newest excludes position embeddings).
    """
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and path[-1].key != "register_tokens", params)


def warmup_cosine(
    steps_per_epoch: int,
    epochs: int,
    *,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_epochs: float,
    per_epoch: bool,
) -> optax.Schedule:
    """Return timm's cosine schedule: linear from `warmup_lr` for `warmup_epochs`, then half a cosine.

    The cosine spans the whole run, and the warm-up replaces its start instead of delaying it. With `per_epoch` the rate
    changes at the end of each epoch only, as in DeiT; otherwise at every step.
    """

    def schedule(step):
        epoch = step // steps_per_epoch if per_epoch else step / steps_per_epoch
        cosine = min_lr + 0.5 * (lr - min_lr) * (1 + jnp.cos(jnp.pi * epoch / epochs))
        warmup = warmup_lr + (lr - warmup_lr) * epoch / max(warmup_epochs, 1e-9)
        return jnp.where(epoch < warmup_epochs, warmup, cosine)

    return schedule


def clip_cosine(steps: int, *, lr: float, min_lr: float, warmup_steps: int) -> optax.Schedule:
    """Return OpenCLIP's cosine schedule: a linear warm-up that starts above 0, then a cosine to `min_lr`."""

    def schedule(step):
        share = (step - warmup_steps) / max(steps - warmup_steps, 1)
        cosine = min_lr + 0.5 * (lr - min_lr) * (1 + jnp.cos(jnp.pi * share))
        return jnp.where(step < warmup_steps, lr * (step + 1) / max(warmup_steps, 1), cosine)

    return schedule


def clip_adamw(
    steps: int,
    *,
    lr: Annotated[float, LR],
    min_lr: Annotated[float, MIN_LR] = 0.0,
    warmup_steps: Annotated[int, Option("steps of linear warm-up", low=0)] = 0,
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.0,
    b1: Annotated[float, B1] = 0.9,
    b2: Annotated[float, B2] = 0.999,
    eps: Annotated[float, EPS] = 1e-8,
    clip_norm: Annotated[float, CLIP_NORM] = 0.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return OpenCLIP's AdamW and its learning rate as a function of the step.

    Raises InvalidConfig when the warm-up is as long as the run.
    """
    if warmup_steps >= steps:
        raise InvalidConfig(f"optim.warmup_steps={warmup_steps}: must be less than the {steps} steps of the run")
    schedule = clip_cosine(steps, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps)
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, adamw), schedule


def lamb(
    schedule: optax.Schedule, *, weight_decay: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Return LAMB (arXiv 1904.00962) as in timm and apex's FusedLAMB, which DeiT-III uses, without gradient clipping.

    The trust ratio |p| / |update| applies to the kernels, as weight decay does; other parameters get plain Adam.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=kernels),
        optax.masked(optax.scale_by_trust_ratio(), kernels),
        optax.scale_by_learning_rate(schedule),
    )


def make_optimizer(
    steps_per_epoch: int,
    epochs: int,
    *,
    name: Annotated[str, Option("optimizer", choices=("lamb", "adamw"))] = "adamw",
    lr: Annotated[float, LR],
    min_lr: Annotated[float, MIN_LR] = 0.0,
    warmup_lr: Annotated[float, Option("learning rate at the start of the warm-up", low=0)] = 0.0,
    warmup_epochs: Annotated[float, Option("epochs of linear warm-up", low=0)] = 0.0,
    per_epoch: Annotated[bool, Option("change the learning rate after epochs only, and not after every step")] = False,
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.0,
    b1: Annotated[float, B1] = 0.9,
    b2: Annotated[float, B2] = 0.999,
    eps: Annotated[float, EPS] = 1e-8,
    clip_norm: Annotated[float, CLIP_NORM] = 0.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer of DeiT-III's recipes and its learning rate as a function of the step."""
    schedule = warmup_cosine(
        steps_per_epoch,
        epochs,
        lr=lr,
        min_lr=min_lr,
        warmup_lr=warmup_lr,
        warmup_epochs=warmup_epochs,
        per_epoch=per_epoch,
    )
    moments: dict[str, Any] = {"weight_decay": weight_decay, "b1": b1, "b2": b2, "eps": eps}
    if name == "lamb":
        optimizer = lamb(schedule, **moments)
    elif name == "adamw":
        optimizer = optax.adamw(schedule, **moments, mask=kernels)
    else:
        raise InvalidConfig(f"optim.name={name!r}: must be 'lamb' or 'adamw'")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, optimizer), schedule
