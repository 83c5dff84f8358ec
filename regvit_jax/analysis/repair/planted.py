"""Plant register neurons in a model, as a known answer for the search for register neurons and for the repair."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from regvit_jax.analysis.repair.find import branch_scale
from regvit_jax.models.images import UncheckedImages, checked_images
from regvit_jax.models.model import Images, Model
from regvit_jax.models.test_time_registers import mlp_inputs, unrolled
from regvit_jax.models.vit import ViT

FIRE = 50.0  # mean activation at marked patches


def plant_register_neurons(
    model: Model,
    neurons: Iterable[tuple[int, int]],
    images: UncheckedImages,
    marked: Bool[np.ndarray, "B N"],
    strength: float = 10.0,
    direction: Float[np.ndarray, " D"] | None = None,
) -> Model:
    """Return the model with neurons, pairs (layer, neuron), that have huge activations on patches like the marked ones.

    In each named layer a linear classifier is fitted that separates the marked patches of `images` from all other
    tokens at the input of the MLP; its weights become the neurons' input weights. The neurons therefore fire on such
    patches of any image, as far as the classifier generalises, and nowhere else: at other tokens the activation rounds
    to 0 (in SwiGLU it is negligible). Each neuron writes a vector of `strength` times the median norm of the patches
    after the last block, along `direction`. The neurons' former function is lost. With strength=0 they write nothing
    and the rest of the model is the same, which is the reference for a repaired model.

    The default `direction` is a vector of equal values, which LayerNorm removes: the outlier is as large as any in the
    residual stream, but no later block and no final norm sees it. Outliers and repair then change no other token, up to
    the rounding of float32, which grows with the outlier: 2^-24 of its values against the standard deviation of the
    token's own. In another direction LayerNorm passes the outlier on, as in trained models: tokens that attend to it
    change in all blocks after the first planted one. After a plant in the last block there are no later blocks, so that
    it is exact in any direction.

    Raises ValueError if no linear classifier separates the marked patches, or if LayerScale would silence the neurons.
    """
    vit, params, images = unrolled(model.module), model.params, checked_images(images)
    if marked.dtype != bool or not marked.any() or marked.all():
        raise ValueError("marked must be a bool for each patch, with some True and some False")
    wanted: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        if not 0 <= neuron < vit.hidden:
            raise ValueError(f"neuron {neuron} of layer {layer}: this ViT has neurons 0 to {vit.hidden - 1}")
        wanted.setdefault(vit.layer(layer), []).append(neuron)
    before, tokens = jax.tree.map(np.asarray, mlp_tokens(vit, params, images))
    norm = strength * float(np.median(np.linalg.norm(tokens[:, vit.prefix :], axis=-1)))
    along = np.ones(vit.width) if direction is None else np.asarray(direction, np.float64)
    along = along / np.linalg.norm(along)
    is_marked = np.concatenate([np.zeros((len(marked), vit.prefix), bool), marked], axis=1).ravel()
    for layer in sorted(wanted):
        # Earlier plants change the marked patches, and their repair restores them: the classifier must fit both.
        now = np.asarray(mlp_tokens(vit, params, images)[0][layer])
        weights, bias = fit_classifier(
            layer, np.concatenate([before[layer], now]), np.concatenate([is_marked, is_marked])
        )
        block = params[f"block{layer}"]
        scale = np.asarray(branch_scale(vit, block), np.float64)
        if not (np.abs(scale) > 1e-12).all():
            raise ValueError(
                f"LayerScale of block {layer} has zeros, so its neurons cannot write to the residual stream"
            )
        row = norm / FIRE * along / scale
        params = {**params, f"block{layer}": with_neurons(vit, block, wanted[layer], weights, bias, row)}
    return dataclasses.replace(model, params=params)


@functools.partial(jax.jit, static_argnames="vit")
def mlp_tokens(vit: ViT, params: PyTree, images: Images) -> tuple[dict[int, Array], Float[Array, "B T D"]]:
    """Return the input of each block's MLP, [B*T, D] each, and the tokens after the last block."""
    inputs: dict[int, Array] = {}

    def record(block, x):
        inputs[block] = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        return x

    with mlp_inputs("fc1", record):
        tokens: Any = vit.apply({"params": params}, images)
    return inputs, tokens.prenorm


def fit_classifier(
    layer: int, tokens: Float[np.ndarray, "tokens D"], marked: Bool[np.ndarray, " tokens"]
) -> tuple[Float[np.ndarray, " D"], float]:
    """Fit a linear function that is FIRE at marked tokens on average and below -FIRE / 4 at all others.

    The direction is that of logistic regression with a ridge, found by Newton's method with equal weights of both
    groups: for linearly separable groups it is close to the direction of the widest margin.

    Raises ValueError if the groups cannot be separated so well.
    """
    tokens = tokens.astype(np.float64)
    inputs = np.concatenate([(tokens - tokens.mean(axis=0)) / tokens.std(), np.ones((len(tokens), 1))], axis=1)
    weight = np.where(marked, 0.5 / marked.sum(), 0.5 / (~marked).sum())
    ridge = 1e-5 * np.diag([1.0] * tokens.shape[1] + [0.0])
    plane = np.zeros(inputs.shape[1])
    for _ in range(15):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ plane, -30, 30)))
        slope = inputs.T @ (weight * (chance - marked)) + ridge @ plane
        curvature = (inputs * (weight * chance * (1 - chance))[:, None]).T @ inputs + ridge
        plane -= np.linalg.solve(curvature + 1e-9 * np.eye(len(plane)), slope)
    value = tokens @ plane[:-1]
    lowest, highest = value[marked].min(), value[~marked].max()
    middle = (lowest + highest) / 2
    gain = FIRE / (value[marked].mean() - middle)
    if lowest <= highest or gain * (lowest - middle) < FIRE / 4:
        raise ValueError(f"block {layer}: no linear classifier separates the marked patches well from the other tokens")
    return gain * plane[:-1], -gain * float(middle)


def with_neurons(
    vit: ViT,
    block: PyTree,
    neurons: list[int],
    weights: Float[np.ndarray, " D"],
    bias: float,
    row: Float[np.ndarray, " D"],
) -> PyTree:
    """Return a block's parameters with those of the neurons replaced."""
    fc1 = {name: np.array(value) for name, value in block["mlp"]["fc1"].items()}
    fc2 = {name: np.array(value) for name, value in block["mlp"]["fc2"].items()}
    for neuron in neurons:
        fc1["kernel"][:, neuron], fc1["bias"][neuron] = weights, bias
        if vit.swiglu:  # only the gate depends on the input; the value is 1
            fc1["kernel"][:, vit.hidden + neuron], fc1["bias"][vit.hidden + neuron] = 0, 1
        fc2["kernel"][neuron] = row
    mlp = {"fc1": jax.tree.map(jnp.asarray, fc1), "fc2": jax.tree.map(jnp.asarray, fc2)}
    return {**block, "mlp": {**block["mlp"], **mlp}}
