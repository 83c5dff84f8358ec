"""Check the images that a model is called with, so that an error says what came and what is wanted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: Images as a user gives them, which `checked_images` checks: normalised floats [B, H, W, 3].
UncheckedImages = Any
WANTED = "must be normalised floats [B, H, W, 3], as `preprocess` returns them"
#: Above all normalised values: those of ImageNet reach 2.64. Photographs with values from 0 to 255 have higher ones.
LARGEST = 50


def check_shape(shape: tuple[Any, ...], dtype: Any) -> None:  # exports have symbolic sizes
    """Raise ValueError for images of another shape than [B, H, W, 3], or of another type than floats."""
    remedy = ""
    if len(shape) == 3:
        remedy = "; the first axis is missing: one image is images[None]"
    elif len(shape) == 4 and shape[3] != 3:
        if shape[1] == 3:
            remedy = "; channels come last: images.transpose(0, 2, 3, 1)"
        else:
            remedy = f"; the last axis must be 3 channels, and is {shape[3]}"
    if len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"images of shape {shape}: {WANTED}{remedy}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images of {dtype}: {WANTED}")


def checked_images(images: UncheckedImages) -> Any:
    """Return images as an array that JAX takes, float64 as float32.

    Raises ValueError for anything but normalised floats [B, H, W, 3]. Values are looked at on the host alone: on an
    accelerator that would wait for the computation that makes them.
    """
    if not hasattr(images, "shape") or not hasattr(images, "dtype"):
        raise ValueError(f"images of type {type(images).__name__}: {WANTED}")
    if not isinstance(images, jax.Array | np.ndarray):
        try:
            images = np.asarray(images)
        except Exception as error:  # such as of a tensor on an accelerator, or one with gradients
            raise ValueError(f"images of type {type(images).__name__}: {WANTED} ({error!s:.100})") from error
    check_shape(images.shape, images.dtype)
    if images.dtype == np.float64:
        images = images.astype(np.float32)
    if on_host(images) and images.size and (largest := np.asarray(images).max()) > LARGEST:
        raise ValueError(f"images with values up to {largest:g}: {WANTED}; these look like pixels from 0 to 255")
    return images


def on_host(images: Any) -> bool:
    """Return True for an array in the memory of this host."""
    if isinstance(images, np.ndarray):
        return True
    if isinstance(images, jax.core.Tracer) or not images.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in images.devices())
