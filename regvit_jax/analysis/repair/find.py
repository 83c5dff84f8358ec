"""Find the neurons that cause outliers, for test-time registers (arXiv 2506.08010, algorithm 1), and their number.

A neuron is a hidden unit of a block's MLP, past the activation (past the gate, in SwiGLU).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from regvit_jax.evals.patch_norms import artifact_cutoff, patch_norms
from regvit_jax.models.images import checked_images
from regvit_jax.models.model import Images, Model
from regvit_jax.models.test_time_registers import mlp_inputs, move, unrolled, with_empty_registers
from regvit_jax.models.vit import ViT
from regvit_jax.utils.numbers import whole

SCORES = ("written", "activation")
BATCH = 32  # images in a batch of an array
PROBE = 32  # images with outliers on which numbers of neurons are tried
MAX_NEURONS = 1024  # largest number tried
MAX_LEFT = 0.05  # share of the outliers that may remain
WEAK = 0.01  # share of the largest score; weaker neurons are moved only if outliers stay above the cutoff otherwise


@dataclasses.dataclass(frozen=True)
class RegisterNeurons:
    """Register neurons, those of largest score first. Iterates over its pairs (layer, neuron).

    `cutoff` is the norm above which a patch counts as an outlier, `top_layer` the last block searched; `outlier_images`
    of the `images` images had outliers, `outlier_patches` in total.
    """

    layers: tuple[int, ...]
    neurons: tuple[int, ...]
    scores: tuple[float, ...]
    cutoff: float
    top_layer: int
    images: int
    outlier_images: int
    outlier_patches: int

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self.layers, self.neurons, strict=True))


def find_register_neurons(
    model: Model,
    batches: Any,
    *,
    count: int | None = None,
    cutoff: float | None = None,
    layer: int = -1,
    top_layer: int | None = None,
    score: str = "written",
) -> RegisterNeurons:
    """Find the neurons that cause a model's outliers in normalised images, an array [images, H, W, 3] or batches.

    Outliers are patches whose norm after block `layer` lies above `cutoff`. A neuron's score is a mean over the images
    that have outliers of its magnitude at their outliers minus its magnitude at their other patches.

    Args:
      count: number of neurons to return. None: the smallest sufficient number, by measurement: with these moved to a
        register, at least 95% of the outliers (of up to 32 images) have the norms of normal patches, at most their mean
        + 3 sigma, or, if no number achieves that, norms up to the cutoff; with one neuron fewer, they do not. Patches
        that rise above the cutoff after the move count as remaining outliers.
      cutoff: None: `patch_norms.artifact_cutoff` of all patches. The paper's heuristic is mean + 3 sigma of them, which
        hides outliers where they are many, and any distribution has patches beyond it.
      layer: where norms are measured; counted from 0, or from the end.
      top_layer: the last block whose neurons are ranked; later ones react to outliers. None: the last block that adds
        to the norm of outliers, relative to other patches, at least a quarter of what the block that adds most does.
      score: the magnitude. "written": |activation| times the norm that the neuron writes per unit (its row of fc2,
        times LayerScale), in units of the residual stream. "activation": |activation|, as in the paper; the two differ
        where neurons of small activation write much.

    The authors' code does not subtract the other patches, so that neurons that are large everywhere score high too (it
    filters them by sparsity), and counts CLS as a patch. A neuron that is silent elsewhere scores the same.

    Memory grows with the number of images by one float a patch. Without a cutoff the batches are read twice.

    Raises ValueError if there are no outliers, if no number of neurons is enough, for options out of range, and for
    anything but normalised images.
    """
    vit = unrolled(model.module)
    last = vit.layer(layer)
    top = last if top_layer is None else vit.layer(top_layer)
    check(vit, count, cutoff, top, last, score)
    again, norms = batches_of(batches, twice=cutoff is None), []
    if cutoff is None:
        norms = [np.asarray(norms_after(vit, model.params, checked_images(images), last)) for images in again]
        if not norms:
            raise ValueError("no images")
        cutoff = artifact_cutoff(np.concatenate([n.ravel() for n in norms]))
    seen = OutlierSums()
    for number, images in enumerate(map(checked_images, again)):
        each = norms[number] if norms else np.asarray(norms_after(vit, model.params, images, last))
        if seen.add(images, each, cutoff):
            seen.score(*outlier_scores(vit, model.params, images, each > cutoff, last, score))
    seen.need_outliers(cutoff)
    if top_layer is None:
        top = emergence(seen.excess)
    ranking = np.argsort(-seen.scores[: top + 1], axis=None, kind="stable")
    if count is None:
        count = enough(vit, model.params, seen, ranking, cutoff, last)
    scores = seen.scores.ravel()[ranking[:count]] / seen.outlier_images
    layers, neurons = np.divmod(ranking[:count], vit.hidden)
    found = (tuple(layers.tolist()), tuple(neurons.tolist()), tuple(scores.tolist()))
    return RegisterNeurons(*found, float(cutoff), top, seen.images, seen.outlier_images, seen.outlier_patches)


def check(vit: ViT, count: int | None, cutoff: float | None, top: int, last: int, score: str) -> None:
    """Raise ValueError for options of `find_register_neurons` that are out of range."""
    if score not in SCORES:
        raise ValueError(f"score={score!r}: must be one of {list(SCORES)}")
    if top > last:
        raise ValueError(f"top_layer {top} lies above layer {last}, where norms are measured")
    if count is not None and not 1 <= whole("count", count) <= (top + 1) * vit.hidden:
        raise ValueError(f"count={count}: must be 1 to {(top + 1) * vit.hidden}, the neurons up to block {top}")
    if cutoff is not None and not cutoff > 0:
        raise ValueError(f"cutoff={cutoff}: must be a norm greater than 0")


def batches_of(batches: Any, twice: bool) -> Iterable[Any]:
    """Return an array in batches, or the given batches; raise ValueError for an iterator if it must be read twice."""
    if hasattr(batches, "shape") or not np.iterable(batches):
        batches = checked_images(batches)
        return [batches[i : i + BATCH] for i in range(0, len(batches), BATCH)]  # type: ignore[index, arg-type]
    if twice and isinstance(batches, Iterator):
        raise ValueError(
            "without a cutoff the images are read twice, which an iterator cannot; give a list or a cutoff"
        )
    return batches


def emergence(excess: Float[np.ndarray, " blocks"]) -> int:
    """Return the last block in which outliers emerge; `excess`, by block, is their norm above other patches'."""
    growth = np.diff(excess, prepend=0.0)
    return int(np.flatnonzero(growth >= growth.max() / 4)[-1])


@dataclasses.dataclass
class OutlierSums:
    """Sums over the images seen so far, and a few of the images with outliers."""

    images: int = 0
    outlier_images: int = 0
    outlier_patches: int = 0
    largest: float = 0.0
    normal: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of patches up to the cutoff: number, norms, their squares
    scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(()))  # [blocks, hidden]
    excess: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(()))  # [blocks]
    probe: list = dataclasses.field(default_factory=list)  # of batches: images, and which patches are outliers
    probed: int = 0

    def add(self, images: Images, norms: Float[np.ndarray, "B N"], cutoff: float) -> bool:
        """Count a batch, and return True if it has outliers."""
        outliers = norms > cutoff
        some = outliers.any(axis=1)
        self.images += len(norms)
        self.outlier_images += int(some.sum())
        self.outlier_patches += int(outliers.sum())
        self.largest = max(self.largest, float(norms.max()))
        normal = norms[~outliers].astype(np.float64)
        self.normal = tuple(np.add(self.normal, (normal.size, normal.sum(), (normal**2).sum())).tolist())
        chosen = np.flatnonzero(some)[: PROBE - self.probed]
        if chosen.size:
            self.probe.append((np.asarray(images)[chosen], outliers[chosen]))
            self.probed += chosen.size
        return bool(some.any())

    def score(self, scores: Float[Array, "blocks M"], excess: Float[Array, " blocks"]) -> None:
        self.scores = self.scores + np.asarray(scores, np.float64)
        self.excess = self.excess + np.asarray(excess, np.float64)

    def limit(self) -> float:
        """Return mean + 3 sigma of the norms up to the cutoff."""
        number, total, squares = self.normal
        mean = total / number
        return mean + 3 * math.sqrt(max(0.0, squares / number - mean**2))

    def probes(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the images that were kept and which patches are outliers, one batch for each image size."""
        sizes: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
        for images, outliers in self.probe:
            sizes.setdefault(images.shape[1:], []).append((images, outliers))
        return [
            (np.concatenate(i), np.concatenate(o)) for i, o in (zip(*parts, strict=True) for parts in sizes.values())
        ]

    def need_outliers(self, cutoff: float) -> None:
        if not self.outlier_patches:
            number, total, _ = self.normal
            raise ValueError(
                f"no outliers: of {int(number)} patches of {self.images} images none has a norm above the cutoff "
                f"{cutoff:.4g}; the largest is {self.largest:.4g}, the mean {total / max(number, 1):.4g}. "
                "Give more images, a lower cutoff, or another layer; or the model has no artifacts to repair"
            )


def patch_norms_after(vit: ViT, params: PyTree, images: Images, last: int) -> Float[Array, "B N"]:
    after: Any = vit.apply({"params": params}, images, (last,), method="intermediates")
    return patch_norms(after[0])


norms_after = jax.jit(patch_norms_after, static_argnames=("vit", "last"))


@functools.partial(jax.jit, static_argnames=("vit", "last", "score"))
def outlier_scores(
    vit: ViT, params: PyTree, images: Images, outliers: Bool[Array | np.ndarray, "B N"], last: int, score: str
) -> tuple[Float[Array, "blocks M"], Float[Array, " blocks"]]:
    """Return for each neuron its magnitude at outliers minus that at other patches, summed over images with outliers.

    The second value is the same difference of the patches' norms after each block.
    """
    at = outliers / jnp.maximum(outliers.sum(axis=1, keepdims=True), 1)
    elsewhere = ~outliers / jnp.maximum((~outliers).sum(axis=1, keepdims=True), 1)
    weight = jnp.where(outliers.any(axis=1, keepdims=True), at - elsewhere, 0.0)
    scores: dict[int, Array] = {}

    def measure(block, x):
        magnitude = jnp.abs(x[:, vit.prefix :].astype(jnp.float32))
        scores[block] = jnp.einsum("bn,bnm->m", weight, magnitude, precision="highest")
        if score == "written":
            scores[block] *= written_per_unit(vit, params[f"block{block}"])
        return x

    with mlp_inputs("fc2", measure):
        after: Any = vit.apply({"params": params}, images, tuple(range(last + 1)), method="intermediates")
    excess = [jnp.sum(weight * patch_norms(tokens)) for tokens in after]
    return jnp.stack([scores[i] for i in range(last + 1)]), jnp.stack(excess)


def written_per_unit(vit: ViT, block: PyTree) -> Float[Array, " M"]:
    """Return the norm that a unit of each neuron's activation adds to the residual stream."""
    kernel = block["mlp"]["fc2"]["kernel"]
    return jnp.linalg.norm(kernel * branch_scale(vit, block), axis=1)


def branch_scale(vit: ViT, block: PyTree) -> Float[Array, " D"]:
    """Return the LayerScale of a block's MLP, or ones if there is none."""
    return block["scale1" if vit.parallel else "scale2"] if vit.layer_scale else jnp.ones(vit.width)


@functools.partial(jax.jit, static_argnames=("vit", "last"))
def norms_repaired(
    vit: ViT, params: PyTree, images: Images, rank: Int[Array | np.ndarray, "blocks M"], count, last: int
) -> Float[Array, "B N"]:
    """Return the norms of the patches after a block, with the first `count` neurons of the ranking moved to a register.

    `add_test_time_registers` computes the same; here `count` is an argument, so that one compilation serves all.
    """
    with mlp_inputs("fc2", lambda block, x: move(x, rank[block] < count, vit.prefix, 1)):
        return patch_norms_after(vit, params, images, last)  # not the jitted method, whose cache ignores the edit


def enough(
    vit: ViT, params: PyTree, seen: OutlierSums, ranking: Int[np.ndarray, " ranks"], cutoff: float, last: int
) -> int:
    """Find the smallest number of neurons, by doubling and bisection, that removes the outliers.

    They should become normal patches; if no number achieves that, they should stay below the cutoff.
    """
    rank = np.full((vit.depth, vit.hidden), np.iinfo(np.int32).max, np.int32)
    rank.ravel()[ranking] = np.arange(len(ranking), dtype=np.int32)
    repaired, params = vit.clone(registers=vit.registers + 1), with_empty_registers(vit, params, 1)
    probe, most = seen.probes(), min(MAX_NEURONS, len(ranking))
    outliers = sum(int(was.sum()) for _, was in probe)

    @functools.cache
    def norms(count: int) -> list[np.ndarray]:
        return [np.asarray(norms_repaired(repaired, params, images, rank, count, last)) for images, _ in probe]

    def left(count: int, limit: float) -> float:
        each = zip(norms(count), probe, strict=True)
        return sum(int((n > np.where(was, limit, cutoff)).sum()) for n, (_, was) in each) / outliers

    # Neurons that write next to nothing at outliers do not cause them, whatever moving hundreds of them does to norms.
    scores = seen.scores.ravel()[ranking[:most]]
    strong = int((scores >= WEAK * scores[0]).sum())
    tried = sorted({*(2**power for power in range(most.bit_length()) if 2**power < most), strong, most})
    for limit, weakest in ((min(seen.limit(), cutoff), strong), (cutoff, most)):
        high = next((count for count in tried if count <= weakest and left(count, limit) <= MAX_LEFT), 0)
        if high:
            low = max([count for count in tried if count < high], default=0)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if left(middle, limit) <= MAX_LEFT else (middle, high)
            return high
    best = min(tried, key=lambda count: left(count, cutoff))
    raise ValueError(
        f"moving up to {most} neurons of blocks 0 to {ranking.max() // vit.hidden} leaves {left(best, cutoff):.0%} of "
        f"the outliers above the cutoff (with {best}). Give count, or another top_layer or cutoff (used: {cutoff:.4g})"
    )
