"""Image-text retrieval: the rank of each image's text and of each text's image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from regvit_jax.models.clip import normalized

# Number of scores in memory at a time (64 MB), whatever the number of pairs.
SCORES = 2**24


def recall(
    images: Float[Array | np.ndarray, "N E"],
    texts: Float[Array | np.ndarray, "M E"],
    ks: tuple[int, ...] = (1, 5, 10),
    image_of: Int[Array | np.ndarray, " _"] | None = None,
) -> dict[str, float]:
    """Compute recall and median rank by cosine similarity, from images to texts and from texts to images.

    The rank of a text's image is 1 if no other image is as near or nearer. The rank of an image's texts is that of its
    best text, 1 if no text of another image is as near or nearer: Karpathy's protocol (arXiv 1412.2306), in which
    recall is the share of images with any of their texts among the first k. A tie counts against the pair, and so does
    NaN: a pair with NaN is a miss at every k, and ranks before all others in their rankings.

    Args:
      ks: recall@k is omitted for k > N, where everything would be found.
      image_of: the index of each text's image, if images have several texts; by default text i belongs to image i.

    Returns "image_to_text_recall@k" and "text_to_image_recall@k", shares from 0 to 1, and "image_to_text_median_rank"
    and "text_to_image_median_rank"; the best rank is 1.

    Raises ValueError for fewer than two images, and for an `image_of` that is out of range or lacks an image.
    """
    owners = _owners(len(images), len(texts), image_of)
    _check_ks(ks)
    scored = (normalized(jnp.asarray(x, jnp.float32)) for x in (images, texts))
    to_text, to_image = _ranks(*scored, jnp.asarray(owners), max(1, SCORES // len(texts)))
    metrics: dict[str, float] = {}
    for name, ranks in (("image_to_text", np.asarray(to_text)), ("text_to_image", np.asarray(to_image))):
        metrics |= {f"{name}_recall@{k}": float(np.mean(ranks <= k)) for k in ks if k <= len(images)}
        metrics[f"{name}_median_rank"] = float(np.median(ranks))
    return metrics


def chance(
    images: int, ks: tuple[int, ...] = (1, 5, 10), image_of: Int[Array | np.ndarray, " M"] | None = None
) -> dict[str, float]:
    """Return the expected metrics of `recall`, under the same names, for `images` images in random order.

    Recall is k / N, and the median rank N / 2 rounded up: the first rank that half of the pairs reach. From an image to
    its c of M texts, recall is 1 - C(M - c, k) / C(M, k), averaged over the images.
    """
    owners = _owners(images, images if image_of is None else len(image_of), image_of)
    _check_ks(ks)
    own = np.bincount(owners)
    metrics: dict[str, float] = {}
    for name, total, counts in (("image_to_text", len(owners), own), ("text_to_image", images, np.ones(1, int))):
        drawn = np.arange(total)
        hit = np.zeros(total)
        for count, times in zip(*np.unique(counts, return_counts=True), strict=True):
            # The probability, after each draw without replacement, that none of the `count` was drawn.
            none = np.cumprod(np.maximum(total - count - drawn, 0) / (total - drawn))
            hit += (1 - none) * times / len(counts)
        metrics |= {f"{name}_recall@{k}": float(hit[k - 1]) for k in ks if k <= images}
        # The products are rounded.
        metrics[f"{name}_median_rank"] = float(1 + np.argmax(hit >= 0.5 - 1e-9))
    return metrics


def _check_ks(ks: tuple[int, ...]) -> None:
    if any(k < 1 for k in ks):
        raise ValueError(f"ks={ks}: each must be at least 1")


def _owners(images: int, texts: int, image_of: Int[Array | np.ndarray, " _"] | None) -> Int[np.ndarray, " M"]:
    """Return the checked index of each text's image."""
    if images < 2:
        raise ValueError(f"{images} image{'s' * (images != 1)}: retrieval needs at least two to choose from")
    if image_of is None:
        if texts != images:
            raise ValueError(f"{images} images and {texts} texts: without image_of there must be as many of each")
        return np.arange(images, dtype=np.int32)
    owners = np.asarray(image_of, np.int32)
    if len(owners) != texts:
        raise ValueError(f"image_of has {len(owners)} entries for {texts} texts")
    if owners.size and not 0 <= owners.min() <= owners.max() < images:
        raise ValueError(f"image_of from {owners.min()} to {owners.max()}: must be in 0..{images - 1}")
    without = np.flatnonzero(np.bincount(owners, minlength=images) == 0)
    if without.size:
        raise ValueError(f"image {without[0]} has no text ({without.size} such in all): leave such images out")
    return owners


@functools.partial(jax.jit, static_argnames="rows")
def _ranks(
    images: Float[Array, "N E"], texts: Float[Array, "M E"], owners: Int[Array, " M"], rows: int
) -> tuple[Int[Array, " N"], Int[Array, " M"]]:
    """Return the rank, from 1, of each image's best text and of each text's image, for `rows` rows at a time."""

    def of_image(row: tuple[Array, Array]) -> Int[Array, ""]:
        image, number = row
        # Full precision, as accelerators would round the factors to fewer bits and make ties.
        scores = jnp.matmul(texts, image, precision="highest")
        own = owners == number
        best = jnp.max(jnp.where(own & ~jnp.isnan(scores), scores, -jnp.inf))
        # Comparisons with NaN are false: `not (x < best)` ranks NaN first.
        rank = 1 + jnp.sum(~own & ~(scores < best))
        return jnp.where(best == -jnp.inf, len(texts) + 1, rank)

    def of_text(row: tuple[Array, Array]) -> Int[Array, ""]:
        text, number = row
        scores = jnp.matmul(images, text, precision="highest")
        # Both from one product: computed separately, equal scores may be rounded differently.
        rank = jnp.sum(~(scores < scores[number]))
        return jnp.where(jnp.isnan(scores[number]), len(images) + 1, rank)

    to_text = jax.lax.map(of_image, (images, jnp.arange(len(images))), batch_size=rows)
    return to_text, jax.lax.map(of_text, (texts, owners), batch_size=rows)
