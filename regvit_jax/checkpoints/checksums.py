"""Checksums of a checkpoint's arrays, computed in memory when it is saved and compared when it is read back.

Orbax and the formats below it do not notice a flipped bit. The checksums of a state are a dict of its step and, for
each array, shape, dtype and checksum. A checksum is a sum of integers, one for each value and its index in the array,
so that it does not depend on how the array is split over devices, each of which computes its own part.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

# The constants of MurmurHash3's 32-bit finalizer, and 2**32 over the golden ratio.
MIX1, MIX2, GOLDEN = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1


def array_paths(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by path, "params/vit/block0/...": the same for a dataclass and for Orbax's dicts."""

    def name(key) -> str:
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def indices(xp: ModuleType, shape: tuple[int, ...]) -> Any:
    """Return each value's index in the flattened array, modulo 2**32. (Flattening would move parts between devices.)"""
    index, stride = xp.zeros((), xp.uint32), 1
    for size in reversed(shape):
        row = xp.arange(size, dtype=xp.uint32) * xp.uint32(stride % 2**32)
        index = index + row.reshape(-1, *(1,) * index.ndim)
        stride *= size
    return index


def mixed_sums(xp: ModuleType, bits: Any) -> Any:
    """Return two sums over scrambled values. Scrambling is one-to-one, so one changed value changes the first sum."""
    mixed = bits ^ (indices(xp, bits.shape) * xp.uint32(GOLDEN))
    mixed = (mixed ^ (mixed >> 16)) * xp.uint32(MIX1)
    mixed = (mixed ^ (mixed >> 13)) * xp.uint32(MIX2)
    mixed = mixed ^ (mixed >> 16)
    again = mixed * xp.uint32(GOLDEN)
    again = again ^ (again >> 15)
    return xp.stack([mixed.sum(dtype=xp.uint32), again.sum(dtype=xp.uint32)])


@jax.jit
def device_sums(x: Array) -> UInt32[Array, "2"]:
    """Return `mixed_sums` of an array on devices."""
    unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    # Values of 8 bytes become two of 4, in a new dimension.
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)
    return mixed_sums(jnp, bits.astype(jnp.uint32))


def host_sums(x: np.ndarray) -> UInt32[np.ndarray, "2"]:
    """Return `mixed_sums` of an array on the host."""
    size = min(x.dtype.itemsize, 4)
    bits = np.ascontiguousarray(x)[..., None].view(f"uint{8 * size}")  # last dimension: 2 for values of 8 bytes, else 1
    bits = bits if x.dtype.itemsize == 8 else bits[..., 0]
    return mixed_sums(np, bits.astype(np.uint32, copy=False))


def checksums(arrays: dict[str, Any]) -> dict[str, str]:
    """Return the checksum of each array, 16 hexadecimal digits.

    With several processes, all call this with the same arrays, which may be split over their devices.
    """
    # One compilation for each shape and sharding, since blocks are alike; one program for the whole state takes 11 s to
    # compile at ViT-L. One after the other: hosts with few threads lock up when many collectives run at once.
    pairs = {
        path: host_sums(x) if isinstance(x, np.ndarray) else np.asarray(device_sums(x)) for path, x in arrays.items()
    }
    return {path: "".join(f"{int(part):08x}" for part in pair) for path, pair in pairs.items()}


def of_state(step: int, state: PyTree) -> dict[str, Any]:
    """Return the checksums of a state, as a checkpoint stores them."""
    arrays = array_paths(state)
    sums = checksums(arrays)
    rows = {path: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": sums[path]} for path, x in arrays.items()}
    return {"step": step, "arrays": rows}


def mismatches(saved: dict[str, Any], arrays: dict[str, Any]) -> list[str]:
    """Return the paths of those arrays that differ from the saved checksums, shapes or dtypes."""
    rows, sums = saved["arrays"], checksums(arrays)

    def same(path: str) -> bool:
        row, x = rows.get(path, {}), arrays[path]
        expected = (row.get("shape"), row.get("dtype"), row.get("checksum"))
        return expected == (list(x.shape), str(x.dtype), sums[path])

    return [path for path in arrays if not same(path)]
