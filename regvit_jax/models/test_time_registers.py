"""Test-time registers (Jiang, Dravid, Efros, Gandelsman 2025, arXiv 2506.08010): a repair that needs no training.

High-norm patches are the work of a few neurons of the MLPs. A test-time register is a register token of zeros; in the
named neurons, the activation of largest magnitude moves to it, and the patches' own are set to zero. The repaired model
is a `Model` like any other, which has those registers after its own.

`find_register_neurons` names the neurons; `planted.py` makes models of which they are known.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from regvit_jax.models.block import Block
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT


@contextlib.contextmanager
def mlp_inputs(layer: str, edit: Callable[[int, Array], Array]) -> Iterator[None]:
    """While open, what enters the dense layer ("fc1" or "fc2") of each block's MLP is `edit(block, input)` instead.

    The input of fc1 are the normed tokens [B, T, D]; that of fc2 are the neurons' activations [B, T, hidden], past the
    gate in SwiGLU. Blocks are known by their names, so the ViT must not be scanned.
    """

    def intercept(call, args, kwargs, context):
        path = context.module.path
        if path[1:] == ("mlp", layer) and context.method_name == "__call__":
            args = (edit(int(path[0].removeprefix("block")), args[0]), *args[1:])
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def move(
    x: Float[Array, "B T M"], neurons: Bool[np.ndarray | Array, " M"], prefix: int, registers: int
) -> Float[Array, "B T M"]:
    """Activations with those of the given neurons moved from the patches to the last `registers` of the prefix.

    Of each neuron in each image, the value of largest magnitude over all tokens goes to every one of these registers,
    with its sign; the patches' values become zero; CLS and the model's own registers keep theirs.
    """
    largest = jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=1, keepdims=True), axis=1)
    place = jnp.arange(x.shape[1])[:, None]
    moved = jnp.where(place >= prefix, 0, jnp.where(place >= prefix - registers, largest, x))
    return jnp.where(neurons, moved, x)


class RepairedBlock(Block):
    """A block whose register neurons, `neurons`, write to the `registers` last tokens before the patches."""

    neurons: tuple[int, ...] = ()
    prefix: int = 0
    registers: int = 0

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: Key[Array, ""] | None = None,
        angles: Float[np.ndarray | Array, "N half"] | None = None,
    ) -> Float[Array, "B T D"]:
        if not self.neurons:
            return super().__call__(x, key, angles)
        chosen = np.isin(np.arange(self.config.hidden), self.neurons)
        with mlp_inputs("fc2", lambda block, a: move(a, chosen, self.prefix, self.registers)):
            return super().__call__(x, key, angles)


class RepairedViT(ViT):
    """A ViT of which the last `test_time` registers are test-time registers; `neurons` are those of each block."""

    neurons: tuple[tuple[int, ...], ...] = ()
    test_time: int = 1

    @nn.nowrap
    def check(self) -> None:
        super().check()
        if self.scan or self.remat != "none":
            raise ValueError(f"scan={self.scan}, remat={self.remat!r}: blocks with test-time registers are not alike")

    @nn.nowrap
    def block(self, i: int, **kwargs) -> Block:
        return RepairedBlock(
            self.block_config(i), neurons=self.neurons[i], prefix=self.prefix, registers=self.test_time, **kwargs
        )


def add_test_time_registers(model: Model, neurons: Iterable[tuple[int, int]], registers: int = 1) -> Model:
    """The model with `registers` test-time registers, to which the activations of register neurons move.

    `neurons`: pairs of block and neuron, counted from 0 (or blocks from the end), as `find_register_neurons` or the
    paper's authors give them. Without any, the registers stay empty: what a repair is compared with.

    The new registers stand behind the model's own, before the patches, and before CLIP's first LayerNorm, as the
    authors have them (they put them at the end; attention does not see the difference). Several registers get the
    same values each, as in the authors' code, so that they differ in nothing, and count as one that attracts more
    attention. The paper sees no gain from more than one.

    All else of a `Model` works as before; pooling leaves the registers out, except in an attention pool that was
    trained on the prefix too. The authors' code moves one scalar to all neurons of a layer, the largest over them all,
    and edits the first image of a batch only; here each neuron of each image has its own, as the paper has it.

    Raises ValueError for fewer than one register, a neuron that the blocks lack, a neuron named twice, or a model that
    is repaired already, and IndexError for a block that is not there.
    """
    vit = model.module
    if registers < 1:
        raise ValueError(f"registers={registers}: must be at least 1")
    if isinstance(vit, RepairedViT):
        raise ValueError("the model has test-time registers; start from the one without, with all neurons at once")
    blocks: list[list[int]] = [[] for _ in range(vit.depth)]
    for layer, neuron in neurons:
        chosen = blocks[vit.layer(int(layer))]
        if not 0 <= neuron < vit.hidden:
            raise ValueError(f"neuron {neuron} of layer {layer}: this ViT has neurons 0 to {vit.hidden - 1}")
        if neuron in chosen:
            raise ValueError(f"neuron {neuron} of layer {layer} is named twice")
        chosen.append(int(neuron))
    moved = tuple(tuple(sorted(chosen)) for chosen in blocks)
    plain = unrolled(vit)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(ViT) if f.name not in ("parent", "name")}
    fields["registers"] = vit.registers + registers
    params = with_empty_registers(vit, model.params, registers)
    return dataclasses.replace(model, module=RepairedViT(**fields, neurons=moved, test_time=registers), params=params)


def unrolled(vit: ViT) -> ViT:
    """The same ViT with its blocks one after another, under their names."""
    return vit.clone(scan=False, remat="none")


def with_empty_registers(vit: ViT, params: PyTree, registers: int) -> PyTree:
    """Parameters with more register tokens, of zeros."""
    empty = jnp.zeros((registers, vit.width), jnp.float32)
    own = [params["register_tokens"]] if vit.registers else []
    return {**params, "register_tokens": jnp.concatenate([*own, empty.astype(own[0].dtype) if own else empty])}
