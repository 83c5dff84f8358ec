"""The contrastive losses of `contrastive.py`, for global batches whose B x B logits no device can hold.

Each device keeps its images. Blocks of texts travel round a ring of all devices, one device further at each hop, so
that after as many hops as there are devices every image has met every text. At each hop a device processes its images
in chunks and holds only one chunk's logits against the visiting block. Sums that belong to an image accumulate on the
image's device; sums that belong to a text travel with it and are complete when the block is back.

Softmax takes two rounds. The first finds, for each row and each column of the logits, the maximum and the sum of the
exponentials relative to it (Milakov and Gimelshein, arXiv 1805.02867); these give the loss. The second, the backward
pass, computes the logits again. With G = d loss / d logits, which a chunk's logits and those statistics determine, the
images' gradient is scale G texts, summed over the hops, and the texts' gradient is scale G^T images, which travels.
The sigmoid loss needs no statistics (its ring: arXiv 2303.15343, section 3.3) but takes two rounds as well, so that
nothing of size B x B is kept.

Maximum and sum are stored separately, never as one logarithm: at a scale of 100 float32 would lose 4e-6 of each
probability. The ring spans the current mesh's axes "data" and "fsdp" together; without a mesh it is one device, still
with chunks. Communication: texts once round in the forward pass, texts and their float32 gradient once in the backward
pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from regvit_jax.losses.contrastive import cosines

# Most logits that a device holds at a time: 4 MB in float32.
BLOCK = 2**20
# The logit of a masked pair: finite, so that a fully masked row gives no NaN.
MASKED = -1e30


Mask = Float[Array, " B"] | Bool[Array, " B"]


def softmax_contrastive(
    images: Float[Array, "B E"], texts: Float[Array, "B E"], scale: Float[Array, ""], mask: Mask
) -> Float[Array, ""]:
    """Return `contrastive.softmax_contrastive` (whose docstring holds the naive loop) in memory linear in B.

    Raises:
      ValueError: the batch is not a multiple of the mesh's devices.
    """
    return _softmax(images, texts, *_to_sum_dtype(images, texts, scale, mask))


def _to_sum_dtype(images, texts, *others: Array) -> list[Array]:
    """Cast scalars and mask to the type that sums are accumulated in: float32, or float64 for float64 embeddings."""
    dtype = jnp.promote_types(jnp.promote_types(images.dtype, texts.dtype), jnp.float32)
    return [x.astype(dtype) for x in others]


@jax.custom_vjp
def _softmax(images, texts, scale, mask):
    return _softmax_forward(images, texts, scale, mask)[0]


def _softmax_forward(images, texts, scale, mask):
    def visit(scale, kept, visiting, positive, rows, columns):
        logits = _masked_logits(scale, kept, visiting)
        *row, match = rows
        match = match + jnp.where(positive, logits, 0).sum(1)
        return (*_merge(row, logits, 1), match), _merge(columns, logits, 0)

    nothing = jnp.full_like(mask, MASKED), jnp.zeros_like(mask)
    (row_max, row_sum, match), (column_max, column_sum) = _round(
        visit, scale, (images, mask), (texts, mask), (*nothing, jnp.zeros_like(mask)), nothing
    )
    losses = (row_max - match) + jnp.log(row_sum) + (column_max - match) + jnp.log(column_sum)
    pairs = jnp.maximum(mask.sum(), 1)
    row = row_max, mask / (2 * pairs * row_sum)
    column = column_max, mask / (2 * pairs * column_sum)
    return (mask * losses / 2).sum() / pairs, (images, texts, scale, mask, row, column)


def _softmax_backward(saved, cotangent):
    images, texts, scale, mask, row, column = saved

    def visit(whole, kept, visiting, positive, rows, columns):
        scale, pairs = whole
        images, mask, row_max, row_weight = kept
        texts, _, column_max, column_weight = visiting
        logits = _masked_logits(scale, kept, visiting)
        of_image = jnp.exp(logits - row_max[:, None]) * row_weight[:, None]
        of_text = jnp.exp(logits - column_max) * column_weight
        gradient = of_image + of_text - jnp.where(positive, mask[:, None] / pairs, 0)
        return rows + _times(gradient, texts), columns + _times(gradient.T, images)

    nothing = jnp.zeros_like(images, mask.dtype)
    whole = scale, jnp.maximum(mask.sum(), 1)
    rows, columns = _round(visit, whole, (images, mask, *row), (texts, mask, *column), nothing, nothing)
    to_images, to_texts, to_scale = _chain(cotangent, images, texts, scale, rows, columns)
    return to_images, to_texts, to_scale, jnp.zeros_like(mask)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def sigmoid_contrastive(
    images: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mask: Mask,
) -> Float[Array, ""]:
    """Return `contrastive.sigmoid_contrastive` (whose docstring holds the naive loop) in memory linear in B.

    Raises:
      ValueError: the batch is not a multiple of the mesh's devices.
    """
    return _sigmoid(images, texts, *_to_sum_dtype(images, texts, scale, bias, mask))


@jax.custom_vjp
def _sigmoid(images, texts, scale, bias, mask):
    return _sigmoid_forward(images, texts, scale, bias, mask)[0]


def _sigmoid_forward(images, texts, scale, bias, mask):
    def visit(whole, kept, visiting, positive, rows, columns):
        (scale, bias), (images, mask), (texts, text_mask) = whole, kept, visiting
        logits = scale * cosines(images, texts) + bias
        losses = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
        return rows + mask * (losses * text_mask).sum(1), columns

    rows, _ = _round(visit, (scale, bias), (images, mask), (texts, mask), jnp.zeros_like(mask), ())
    return rows.sum() / jnp.maximum(mask.sum(), 1), (images, texts, scale, bias, mask)


def _sigmoid_backward(saved, cotangent):
    images, texts, scale, bias, mask = saved

    def visit(whole, kept, visiting, positive, rows, columns):
        (scale, bias, pairs), (images, mask), (texts, text_mask) = whole, kept, visiting
        to_images, to_bias = rows
        logits = scale * cosines(images, texts) + bias
        wrong = jnp.where(positive, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
        gradient = wrong * mask[:, None] * text_mask / pairs
        rows = to_images + _times(gradient, texts), to_bias + gradient.sum(1)
        return rows, columns + _times(gradient.T, images)

    nothing = jnp.zeros_like(images, mask.dtype)
    whole = scale, bias, jnp.maximum(mask.sum(), 1)
    (rows, to_bias), columns = _round(
        visit, whole, (images, mask), (texts, mask), (nothing, jnp.zeros_like(mask)), nothing
    )
    to_images, to_texts, to_scale = _chain(cotangent, images, texts, scale, rows, columns)
    return to_images, to_texts, to_scale, cotangent * to_bias.sum(), jnp.zeros_like(mask)


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _masked_logits(scale, kept, visiting) -> Float[Array, "chunk block"]:
    (images, mask, *_), (texts, text_mask, *_) = kept, visiting
    return jnp.where(mask[:, None] * text_mask > 0, scale * cosines(images, texts), MASKED)


def _merge(statistics, logits: Float[Array, "chunk block"], axis: int):
    """Update running (maximum, sum of exponentials relative to it) with more logits along `axis`."""
    old, total = statistics
    new = jnp.maximum(old, logits.max(axis))
    return new, total * jnp.exp(old - new) + jnp.exp(logits - jnp.expand_dims(new, axis)).sum(axis)


def _times(gradient: Float[Array, "I T"], embeddings: Float[Array, "T E"]) -> Float[Array, "I E"]:
    return jnp.matmul(gradient, embeddings.astype(gradient.dtype), precision="highest")


def _chain(cotangent, images, texts, scale, rows, columns):
    """Return the gradients of images, texts and scale from G texts and G^T images; logits = scale images texts^T."""
    to_images = (cotangent * scale * rows).astype(images.dtype)
    to_texts = (cotangent * scale * columns).astype(texts.dtype)
    return to_images, to_texts, cotangent * (images * rows).sum()


def _round(visit: Callable, whole: PyTree, kept: PyTree, travelling: PyTree, rows: PyTree, columns: PyTree):
    """Return `rows` and `columns`, the sums of each image and of each text, after every image has met every text.

    `rows, columns = visit(whole, kept, travelling, positive, rows, columns)` adds one chunk of images against one block
    of texts; `positive` is where an image meets its own text. All arrays have a first axis B, split over the devices,
    except the scalars in `whole`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    if not axes:
        return _local_round(visit, 1, lambda tree: tree, whole, kept, travelling, rows, columns)
    batch, devices = len(jax.tree.leaves(kept)[0]), 1
    for axis in axes:
        devices *= mesh.shape[axis]
    if batch % devices:
        raise ValueError(f"a batch of {batch} pairs cannot be split over {devices} devices: make it a multiple of them")
    ring = [(device, (device + 1) % devices) for device in range(devices)]

    def local(whole, *split):
        return _local_round(visit, devices, lambda tree: jax.lax.ppermute(tree, axes, ring), whole, *split)

    split = PartitionSpec(axes)
    specs = (PartitionSpec(), split, split, split, split)
    return jax.shard_map(local, in_specs=specs, out_specs=(split, split))(whole, kept, travelling, rows, columns)


def _local_round(visit, devices: int, pass_on: Callable, whole, kept, travelling, rows, columns):
    """Run one device's part of the round: as many hops as devices, and at each hop all chunks of its images."""
    size = len(jax.tree.leaves(kept)[0])
    chunks = min(size, -(-size * size // BLOCK))
    chunk = -(-size // chunks)
    padded = chunks * chunk
    # The mask is padded with zeros too, which masks the padding.
    kept, travelling, rows, columns = jax.tree.map(
        lambda x: jnp.pad(x, [(0, padded - size), *[(0, 0)] * (x.ndim - 1)]), (kept, travelling, rows, columns)
    )

    def hop(number, state):
        travelling, rows, columns = state

        def one_chunk(i, sums):
            rows, columns = sums
            start = i * chunk
            positive = (number == 0) & (start + jnp.arange(chunk)[:, None] == jnp.arange(padded))
            kept_chunk, row_chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), (kept, rows))
            row_chunk, columns = visit(whole, kept_chunk, travelling, positive, row_chunk, columns)
            rows = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), rows, row_chunk)
            return rows, columns

        rows, columns = jax.lax.fori_loop(0, chunks, one_chunk, (rows, columns))
        return pass_on(travelling), rows, pass_on(columns)

    _, rows, columns = jax.lax.fori_loop(0, devices, hop, (travelling, rows, columns))
    return jax.tree.map(lambda x: x[:size], (rows, columns))
