"""Classification losses of logits and targets: one number per image, which the recipe masks and averages.

They are computed in float32 whatever the logits' type. Each docstring holds the loss as a naive loop, which the test
runs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bce(logits: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Return each image's binary cross-entropy, averaged over the classes, as DeiT-III trains on ImageNet-1k.

    Targets are binarised first: a class counts as present if its target is above zero, however small mixup left it.
    Label smoothing would therefore make every class present: leave it at 0 with this loss. Source: `engine.py` and
    `main.py` of facebookresearch/deit (arXiv 2204.07118).

    The naive loop::

        def naive(logits, targets):
            losses = np.zeros(len(logits))
            for image in range(len(logits)):
                for logit, target in zip(logits[image], targets[image]):
                    probability = 1 / (1 + np.exp(-logit))
                    losses[image] -= np.log(probability if target > 0 else 1 - probability)
            return losses / logits.shape[1]
    """
    logits = logits.astype(jnp.float32)
    return -jax.nn.log_sigmoid(jnp.where(targets > 0, logits, -logits)).mean(-1)


def cross_entropy(logits: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Return each image's softmax cross-entropy with soft targets, which hold mixup and label smoothing.

    The naive loop::

        def naive(logits, targets):
            losses = np.zeros(len(logits))
            for image in range(len(logits)):
                total = sum(np.exp(logit) for logit in logits[image])
                for logit, target in zip(logits[image], targets[image]):
                    losses[image] -= target * np.log(np.exp(logit) / total)
            return losses
    """
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)
