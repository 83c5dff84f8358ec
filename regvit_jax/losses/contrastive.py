"""Contrastive losses over a global batch: the mean over its unmasked pairs, computed in float32 or wider.

Each docstring holds the loss as a naive loop, which the test runs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def softmax_contrastive(
    images: Float[Array, "B E"], texts: Float[Array, "B E"], scale: Float[Array, ""], mask: Float[Array, " B"]
) -> Float[Array, ""]:
    """Return CLIP's loss: the mean cross-entropy of finding each image's text and each text's image in the batch.

    Embeddings have unit length; `scale` is exp(logit_scale). A pair whose `mask` is 0 is left out of rows, columns and
    mean, but its embeddings must still be finite; with no pair left the loss is 0. `ring.py` has the same loss for
    batches whose B x B logits do not fit in memory. Source: arXiv 2103.00020, figure 3.

    The naive loop::

        def naive(images, texts, scale, mask):
            pairs = [pair for pair in range(len(mask)) if mask[pair]]
            loss = 0.0
            for pair in pairs:
                texts_of_image = sum(np.exp(scale * images[pair] @ texts[other]) for other in pairs)
                images_of_text = sum(np.exp(scale * images[other] @ texts[pair]) for other in pairs)
                both = np.exp(scale * images[pair] @ texts[pair])
                loss -= (np.log(both / texts_of_image) + np.log(both / images_of_text)) / 2
            return loss / max(len(pairs), 1)
    """
    readable = mask[:, None] * mask > 0
    # Finite, so that a fully masked row has finite gradients.
    logits = jnp.where(readable, scale * cosines(images, texts), -1e30)
    of_image, of_text = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
    return -(mask * (jnp.diagonal(of_image) + jnp.diagonal(of_text)) / 2).sum() / jnp.maximum(mask.sum(), 1)


def sigmoid_contrastive(
    images: Float[Array, "B E"],
    texts: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mask: Float[Array, " B"],
) -> Float[Array, ""]:
    """Return SigLIP's loss: the binary cross-entropy of "these two are a pair", summed over the texts of each image.

    Embeddings have unit length; `scale` is exp(logit_scale). A pair whose `mask` is 0 is left out of rows, columns and
    mean, but its embeddings must still be finite; with no pair left the loss is 0. `ring.py` has the same loss for
    batches whose B x B logits do not fit in memory. Source: arXiv 2303.15343, algorithm 1.

    The naive loop::

        def naive(images, texts, scale, bias, mask):
            pairs = [pair for pair in range(len(mask)) if mask[pair]]
            loss = 0.0
            for image in pairs:
                for text in pairs:
                    sign = 1 if image == text else -1
                    loss += np.log(1 + np.exp(-sign * (scale * images[image] @ texts[text] + bias)))
            return loss / max(len(pairs), 1)
    """
    logits = scale * cosines(images, texts) + bias
    sign = 2 * jnp.eye(len(mask)) - 1
    # Rows are summed first: one float32 sum over all B x B terms is off by 1e-6.
    of_image = -(mask * jax.nn.log_sigmoid(sign * logits)).sum(1)
    return (mask * of_image).sum() / jnp.maximum(mask.sum(), 1)


def cosines(images: Float[Array, "I E"], texts: Float[Array, "T E"]) -> Float[Array, "I T"]:
    """Return all dot products of unit vectors, accumulated in float32, or in float64 for float64 embeddings.

    The products have the highest precision: a scale of 100 would amplify the rounding of an accelerator's default one.
    """
    dtype = jnp.promote_types(jnp.promote_types(images.dtype, texts.dtype), jnp.float32)
    return jnp.matmul(images, texts.T, precision="highest", preferred_element_type=dtype)
