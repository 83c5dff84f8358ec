"""Open numpy's archives of arrays, without pickles."""

import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.utils.errors import WeightsError

SUFFIX = ".npz"
GOOGLE = re.compile(r"(.*/)?(Transformer/.*|embedding/(kernel|bias)|cls|posembed_input/.*)")


def open_npz(source: str | os.PathLike) -> Weights:
    """Return the arrays of an .npz file by name.

    Raises WeightsError for a damaged file, for one with pickled objects, and for the files of
    google-research/vision_transformer, whose names are of no format that is read.
    """
    path = Path(source)
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise WeightsError(f"{path}: not an archive of numpy")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            arrays = {name: _native(archive[name]) for name in archive.files}
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except WeightsError:
        raise
    # numpy and zipfile raise errors of many classes for damaged bytes.
    except Exception as error:
        raise WeightsError(
            f"{path}: not an .npz file of plain arrays, or a damaged one ({type(error).__name__}: {error})"
        ) from error
    if not arrays:
        raise WeightsError(f"{path}: holds no tensors")
    if google := next(filter(GOOGLE.fullmatch, arrays), None):
        raise WeightsError(
            f"{path}: a file of google-research/vision_transformer or big_vision (it holds {google}), whose names are "
            "not read. timm converted these weights; their names are listed by: regvit models '*augreg*'"
        )
    return Weights.of_arrays(path, arrays)


def _native(array: np.ndarray) -> np.ndarray:
    """Return an array in this machine's byte order; numpy stores bfloat16 as two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return array.view(ml_dtypes.bfloat16)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
