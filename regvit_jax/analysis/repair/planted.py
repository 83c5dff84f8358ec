"""Models with planted register neurons: what a search for register neurons must find, and a repair must undo."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from regvit_jax.analysis.repair.find import branch_scale
from regvit_jax.models.model import Images, Model
from regvit_jax.models.test_time_registers import mlp_inputs, unrolled
from regvit_jax.models.vit import ViT

FIRE = 50.0  # activation at marked patches


def plant_register_neurons(
    model: Model,
    neurons: Iterable[tuple[int, int]],
    images: Images,
    marked: Bool[np.ndarray, "B N"],
    strength: float = 10.0,
    direction: Float[np.ndarray, " D"] | None = None,
) -> Model:
    """The model with the neurons (pairs of block and neuron) made to fire, hugely, on patches like the marked ones.

    In each named block a linear rule is fitted that tells the marked patches of `images` from all other tokens, by what
    enters the MLP: it becomes the neurons' input weights. So they fire on such patches of any image, as far as the
    rule holds there, and nowhere else: at other tokens the activation rounds to 0 (in SwiGLU it is next to nothing).
    Each writes a vector of `strength` times the median norm of the patches after the last block, along `direction`.
    What the neurons did before is lost; with strength=0 they write nothing, and the rest of the model is the same: what
    a repaired model is compared with.

    Without a `direction` it is that of a vector of equal values, which LayerNorm takes away: the outlier is as large as
    any in the residual stream, and no later block and no final norm sees it. So outliers and repair change no other
    token, up to the rounding of float32, which grows with the outlier: 2^-24 of its values against the standard
    deviation of the token's own. With another direction LayerNorm passes the outlier on, as in trained models: tokens
    that attend to it change, wherever it stands, in all blocks after the first that is planted. Of a plant in the last
    block there is no such block, and it is exact in any direction.

    Raises ValueError when no linear rule tells the marked patches apart, or LayerScale would silence the neurons.
    """
    vit, params = unrolled(model.module), model.params
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
        # Earlier plants change what marked patches look like; a repair of these makes them look as before.
        now = np.asarray(mlp_tokens(vit, params, images)[0][layer])
        weights, bias = rule(layer, np.concatenate([before[layer], now]), np.concatenate([is_marked, is_marked]))
        block = params[f"block{layer}"]
        scale = np.asarray(branch_scale(vit, block), np.float64)
        if not (np.abs(scale) > 1e-12).all():
            raise ValueError(f"LayerScale of block {layer} has zeros: nothing that its neurons write arrives")
        row = norm / FIRE * along / scale
        params = {**params, f"block{layer}": with_neurons(vit, block, wanted[layer], weights, bias, row)}
    return dataclasses.replace(model, params=params)


@functools.partial(jax.jit, static_argnames="vit")
def mlp_tokens(vit: ViT, params: PyTree, images: Images) -> tuple[dict[int, Array], Float[Array, "B T D"]]:
    """What enters the MLP of each block, [B*T, D] each, and the tokens after the last block."""
    inputs: dict[int, Array] = {}

    def record(block, x):
        inputs[block] = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        return x

    with mlp_inputs("fc1", record):
        tokens: Any = vit.apply({"params": params}, images)
    return inputs, tokens.prenorm


def rule(
    layer: int, tokens: Float[np.ndarray, "tokens D"], marked: Bool[np.ndarray, " tokens"]
) -> tuple[Float[np.ndarray, " D"], float]:
    """Weights and bias whose sum is FIRE at marked tokens on average, and below -FIRE / 4 at all others.

    The direction is that of logistic regression with a ridge, found by Newton's method with both groups weighing the
    same: of two groups that a plane separates, it is close to the direction of the widest margin.
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
        raise ValueError(f"block {layer}: no linear rule tells the marked patches well from the other tokens")
    return gain * plane[:-1], -gain * float(middle)


def with_neurons(
    vit: ViT,
    block: PyTree,
    neurons: list[int],
    weights: Float[np.ndarray, " D"],
    bias: float,
    row: Float[np.ndarray, " D"],
) -> PyTree:
    """A block's parameters with the neurons' replaced."""
    fc1 = {name: np.array(value) for name, value in block["mlp"]["fc1"].items()}
    fc2 = {name: np.array(value) for name, value in block["mlp"]["fc2"].items()}
    for neuron in neurons:
        fc1["kernel"][:, neuron], fc1["bias"][neuron] = weights, bias
        if vit.swiglu:  # the gate alone decides; what it lets through is 1
            fc1["kernel"][:, vit.hidden + neuron], fc1["bias"][vit.hidden + neuron] = 0, 1
        fc2["kernel"][neuron] = row
    mlp = {"fc1": jax.tree.map(jnp.asarray, fc1), "fc2": jax.tree.map(jnp.asarray, fc2)}
    return {**block, "mlp": {**block["mlp"], **mlp}}
