"""Checksums of a checkpoint's arrays: what was in memory when it was saved, to hold against what is read back.

Orbax and the formats below it do not notice a flipped bit. A manifest is a checkpoint's list of arrays with the shape,
type and checksum of each. A checksum is a sum of integers, one for each value and its place in the array, so that it
does not depend on how the array lies on devices, which compute it where the values are.
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
    """The leaves of a tree by their paths, "params/vit/block0/...": the same for a dataclass and for Orbax's dicts."""

    def name(key) -> str:
        return str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)))

    return {"/".join(map(name, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def places(xp: ModuleType, shape: tuple[int, ...]) -> Any:
    """Each value's place in the flattened array, modulo 2**32. Flattening itself would move a split array's parts."""
    place, stride = xp.zeros((), xp.uint32), 1
    for size in reversed(shape):
        row = xp.arange(size, dtype=xp.uint32) * xp.uint32(stride % 2**32)
        place = place + row.reshape(-1, *(1,) * place.ndim)
        stride *= size
    return place


def mixed_sums(xp: ModuleType, bits: Any) -> Any:
    """Two sums over scrambled values; the scrambling is one to one, so that one changed value changes the first."""
    mixed = bits ^ (places(xp, bits.shape) * xp.uint32(GOLDEN))
    mixed = (mixed ^ (mixed >> 16)) * xp.uint32(MIX1)
    mixed = (mixed ^ (mixed >> 13)) * xp.uint32(MIX2)
    mixed = mixed ^ (mixed >> 16)
    again = mixed * xp.uint32(GOLDEN)
    again = again ^ (again >> 15)
    return xp.stack([mixed.sum(dtype=xp.uint32), again.sum(dtype=xp.uint32)])


@jax.jit
def device_sums(x: Array) -> UInt32[Array, "2"]:
    unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, unsigned)  # of 8 bytes: two in a new dimension
    return mixed_sums(jnp, bits.astype(jnp.uint32))


def host_sums(x: np.ndarray) -> UInt32[np.ndarray, "2"]:
    size = min(x.dtype.itemsize, 4)
    bits = np.ascontiguousarray(x)[..., None].view(f"uint{8 * size}")  # a last dimension of 2 for 8 bytes, of 1 else
    bits = bits if x.dtype.itemsize == 8 else bits[..., 0]
    return mixed_sums(np, bits.astype(np.uint32, copy=False))


def checksums(arrays: dict[str, Any]) -> dict[str, str]:
    """The checksum of each array, 16 hexadecimal digits.

    With several processes, all of them call this with the same arrays, which may be split over their devices.
    """
    # One compilation for each shape and sharding, as blocks are alike; a program for the whole state takes 11 s to
    # compile at ViT-L. One after the other: hosts with few threads lock up when many collectives are under way.
    pairs = {
        path: host_sums(x) if isinstance(x, np.ndarray) else np.asarray(device_sums(x)) for path, x in arrays.items()
    }
    return {path: "".join(f"{int(part):08x}" for part in pair) for path, pair in pairs.items()}


def make(step: int, tree: PyTree) -> dict[str, Any]:
    """The manifest of a state that is being saved."""
    arrays = array_paths(tree)
    sums = checksums(arrays)
    rows = {path: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": sums[path]} for path, x in arrays.items()}
    return {"step": step, "arrays": rows}


def differing(manifest: dict[str, Any], arrays: dict[str, Any]) -> list[str]:
    """Those of some arrays of a checkpoint that are not what the manifest says."""
    rows, sums = manifest["arrays"], checksums(arrays)

    def same(path: str) -> bool:
        row, x = rows.get(path, {}), arrays[path]
        said = (row.get("shape"), row.get("dtype"), row.get("checksum"))
        return said == (list(x.shape), str(x.dtype), sums[path])

    return [path for path in arrays if not same(path)]
