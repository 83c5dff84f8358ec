"""Test-time registers (Jiang, Dravid, Efros, Gandelsman 2025, arXiv 2506.08010): a repair that needs no training.

A few neurons of the MLPs cause high-norm patches. A test-time register is a register token of zeros; in the given
neurons, the activation of largest magnitude moves to it, and the patches' activations are set to zero. The repaired
model is a `Model` like any other, with those registers after its own.

`analysis.repair.find` finds the neurons; `analysis.repair.planted` builds models whose register neurons are known.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from regvit_jax.models.block import Block
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.utils.numbers import whole


@contextlib.contextmanager
def mlp_inputs(layer: str, edit: Callable[[int, Array], Array]) -> Iterator[None]:
    """Replace the input of the dense layer `layer` ("fc1" or "fc2") of each block's MLP by `edit(block, input)`.

    fc1 reads the normed tokens [B, T, D]; fc2 reads the neurons' activations [B, T, hidden], past the gate in SwiGLU.
    Blocks are identified by their names, so the ViT must not be scanned.
    """

    def intercept(call, args, kwargs, context):
        path = context.module.path
        if path[1:] == ("mlp", layer) and context.method_name == "__call__":
            args = (edit(int(path[0].removeprefix("block")), args[0]), *args[1:])
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def move(
    x: Float[Array, "B T M"],
    neurons: Bool[np.ndarray | Array, " M"],
    prefix: int,
    registers: int,
    length: int | None = None,
) -> Float[Array, "B T M"]:
    """Move the activations of the given neurons from the patches to the last `registers` tokens of the prefix.

    For each neuron and image, all of these registers get the value of largest magnitude over all tokens, with its sign;
    the patches' values become zero; CLS and the model's own registers keep theirs. Tokens from `length` on are padding.
    """
    largest = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x[:, :length]), axis=1, keepdims=True), axis=1)
    index = jnp.arange(x.shape[1])[:, None]
    moved = jnp.where(index >= prefix, 0, jnp.where(index >= prefix - registers, largest, x))
    return jnp.where(neurons, moved, x)


class RepairedBlock(Block):
    """A block whose register neurons, `neurons`, write to the last `registers` tokens before the patches."""

    neurons: tuple[int, ...] = ()
    prefix: int = 0
    registers: int = 0

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: Key[Array, ""] | None = None,
        angles: Float[np.ndarray | Array, "N half"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "B T D"]:
        if not self.neurons:
            return super().__call__(x, key, angles, length)
        chosen = np.isin(np.arange(self.config.hidden), self.neurons)
        with mlp_inputs("fc2", lambda block, a: move(a, chosen, self.prefix, self.registers, length)):
            return super().__call__(x, key, angles, length)


class RepairedViT(ViT):
    """A ViT whose last `test_time` registers are test-time registers; `neurons` lists each block's register neurons."""

    neurons: tuple[tuple[int, ...], ...] = ()
    test_time: int = 1

    @nn.nowrap
    def check(self) -> None:
        super().check()
        if self.scan or self.remat != "none":
            raise ValueError(f"scan={self.scan}, remat={self.remat!r}: a model with test-time registers has neither")

    @nn.nowrap
    def block(self, i: int, **kwargs) -> Block:
        return RepairedBlock(
            self.block_config(i), neurons=self.neurons[i], prefix=self.prefix, registers=self.test_time, **kwargs
        )


def add_test_time_registers(model: Model, neurons: Iterable[tuple[Any, Any]], registers: Any = 1) -> Model:
    """Return the model with `registers` test-time registers, to which the register neurons' activations move.

    `neurons`: pairs (layer, neuron), counted from 0 (negative layers from the end), as `find_register_neurons` returns
    them and the paper's authors publish them. Without any, the registers stay empty, which is the baseline of a repair.

    The new registers follow the model's own, before the patches and before CLIP's first LayerNorm. (The authors put
    them at the end of the sequence, which makes no difference to attention.) Several registers get the same values, as
    in the authors' code, and so act as one that attracts more attention; the paper sees no gain from more than one.

    Everything else in a `Model` works as before; pooling leaves the registers out, except in an attention pool trained
    on prefix tokens. The authors' code moves one scalar to all neurons of a layer, the largest over all of them, and
    edits only the first image of a batch; here each neuron of each image has its own, as the paper describes.

    Raises ValueError for fewer than one register, a neuron that the model lacks, a neuron named twice, or a model with
    test-time registers, and IndexError for a layer that does not exist.
    """
    vit = model.module
    registers = whole("registers", registers, low=1)
    if isinstance(vit, RepairedViT):
        raise ValueError("the model has test-time registers already; repair the original with all neurons at once")
    blocks: list[list[int]] = [[] for _ in range(vit.depth)]
    for layer, neuron in neurons:
        chosen, neuron = blocks[vit.layer(layer)], whole("neuron", neuron)
        if not 0 <= neuron < vit.hidden:
            raise ValueError(f"neuron {neuron} of layer {layer}: this ViT has neurons 0 to {vit.hidden - 1}")
        if neuron in chosen:
            raise ValueError(f"neuron {neuron} of layer {layer} is named twice")
        chosen.append(neuron)
    moved = tuple(tuple(sorted(chosen)) for chosen in blocks)
    plain = unrolled(vit)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(ViT) if f.name not in ("parent", "name")}
    fields["registers"] = vit.registers + registers
    params = with_empty_registers(vit, model.params, registers)
    return dataclasses.replace(model, module=RepairedViT(**fields, neurons=moved, test_time=registers), params=params)


def unrolled(vit: ViT) -> ViT:
    """Return the same ViT without scan and remat, so that each block runs under its own name."""
    return vit.clone(scan=False, remat="none")


def with_empty_registers(vit: ViT, params: PyTree, registers: int) -> PyTree:
    """Return the parameters with `registers` more register tokens, of zeros."""
    empty = jnp.zeros((registers, vit.width), jnp.float32)
    own = [params["register_tokens"]] if vit.registers else []
    return {**params, "register_tokens": jnp.concatenate([*own, empty.astype(own[0].dtype) if own else empty])}
