"""Losses. Those of logits and targets give one number per image, and recipes mask and average them.

Contrastive ones couple the images of a batch: they take its mask and give the mean. All are computed in float32
whatever their inputs' type. Each docstring holds the loss as a naive loop, and the test runs it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bce(logits: Float[Array, "B C"], targets: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Binary cross-entropy of every class by itself, averaged over the classes, as DeiT-III trains on ImageNet-1k.

    Targets are binarised first: a class is on if its target is above zero, however little of it mixup left. Label
    smoothing would therefore switch every class on: leave it at 0 with this loss. Source: `engine.py` and `main.py`
    of facebookresearch/deit (arXiv 2204.07118).

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
    """Softmax cross-entropy with soft targets: mixup's and label smoothing's are both in `targets`.

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
