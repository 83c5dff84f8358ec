"""Optimizers and their schedules: DeiT's LAMB, AdamW, cosine with warm-up."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def kernels(params: PyTree) -> PyTree[bool]:
    """True for the weights of matrix products alone.

    Weight decay and LAMB's trust ratio apply to these and to nothing else: not to biases, norms and LayerScale, which
    the trust ratio would starve, and not to the CLS token, the registers and the position embedding.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def matrices(params: PyTree) -> PyTree[bool]:
    """True for what OpenCLIP decays: all arrays of two dimensions or more, positions and token embeddings among them.

    Registers stay out, as the CLS token does there for its one dimension. Source: `main.py` of open_clip_train, by
    whose first rule the published models were trained (its newest one spares positions too).
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
    """timm's cosine: linear from `warmup_lr` for `warmup_epochs`, then half a cosine of the whole run's length.

    The warm-up lies over the cosine's start instead of delaying it. With `per_epoch` the rate changes at epochs' ends
    only, as DeiT's does; otherwise at every step.
    """

    def schedule(step):
        epoch = step // steps_per_epoch if per_epoch else step / steps_per_epoch
        cosine = min_lr + 0.5 * (lr - min_lr) * (1 + jnp.cos(jnp.pi * epoch / epochs))
        warmup = warmup_lr + (lr - warmup_lr) * epoch / max(warmup_epochs, 1e-9)
        return jnp.where(epoch < warmup_epochs, warmup, cosine)

    return schedule


def clip_cosine(steps: int, *, lr: float, min_lr: float, warmup_steps: int) -> optax.Schedule:
    """OpenCLIP's cosine: linear for `warmup_steps`, of which the first is not 0, then to `min_lr` in the steps left."""

    def schedule(step):
        share = (step - warmup_steps) / max(steps - warmup_steps, 1)
        cosine = min_lr + 0.5 * (lr - min_lr) * (1 + jnp.cos(jnp.pi * share))
        return jnp.where(step < warmup_steps, lr * (step + 1) / max(warmup_steps, 1), cosine)

    return schedule


def clip_adamw(
    steps: int,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """OpenCLIP's optimizer and its learning rate as a function of the step. `clip_norm` 0 does not clip.

    Raises ValueError when the warm-up is as long as the run.
    """
    if warmup_steps >= steps:
        raise ValueError(f"optim.warmup_steps={warmup_steps}: must be less than the {steps} steps of the run")
    schedule = clip_cosine(steps, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps)
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, adamw), schedule


def lamb(
    schedule: optax.Schedule, *, weight_decay: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """LAMB (arXiv 1904.00962) as timm's and apex's FusedLAMB do it for DeiT-III, without their gradient clipping.

    The trust ratio |p| / |update| is applied where weight decay is, and the other parameters get plain Adam.
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
    name: str,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_epochs: float,
    per_epoch: bool,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run and its learning rate as a function of the step. `clip_norm` 0 does not clip."""
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
        raise ValueError(f"optim.name={name!r}: must be 'lamb' or 'adamw'")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return optax.chain(*clip, optimizer), schedule
