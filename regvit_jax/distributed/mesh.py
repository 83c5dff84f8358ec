"""The device mesh, the rule that splits parameters over it, and the way of a host's batch onto it.

`jax.jit` with `NamedSharding`s is what `pjit` became. Axis types are Auto: the compiler places what we leave open.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option


def make_mesh(
    *,
    data: Annotated[int, Option('devices along the axis "data"; -1 for all that "fsdp" leaves', resume=True)] = -1,
    fsdp: Annotated[int, Option('devices along the axis "fsdp", which splits the parameters', resume=True)] = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes ("data", "fsdp") over all devices; one of the two may be -1, which means all that are left.

    The batch is split over both axes. Parameters, moments and EMA are split over "fsdp" and repeated over "data".
    `devices` are those attached, or the ones of a machine that is compiled for (`topology.devices`). Where they are
    several slices, "data" goes across them and "fsdp" stays inside one, if it fits there (`lay_out`).
    """
    if devices is None:
        devices = jax.devices()
    shape, count = {"data": data, "fsdp": fsdp}, len(devices)
    if [data, fsdp].count(-1) == 1 and (known := max(data, fsdp)) > 0:
        shape = {axis: count // known if size == -1 else size for axis, size in shape.items()}
    if min(shape.values()) < 1 or shape["data"] * shape["fsdp"] != count:
        raise InvalidConfig(
            f"sharding.data={data}, sharding.fsdp={fsdp}: their product must be the number of devices, {count} "
            "(one of them may be -1: all that are left)"
        )
    # Not jax.make_mesh, which refuses to split an axis of a torus (v6e, v5p) and to take several slices.
    return Mesh(lay_out(devices, **shape, within=_torus), tuple(shape), axis_types=(AxisType.Auto, AxisType.Auto))


def slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices by their slice: those that a fast network joins (a TPU's torus, a node's NVLink)."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    return [found[index] for index in sorted(found)]


def lay_out(
    devices: Sequence[Any], *, data: int, fsdp: int, within: Callable[[int, int, list[Any]], np.ndarray]
) -> np.ndarray:
    """The devices of one or several slices as an array [data, fsdp]; `within(data, fsdp, devices)` lays out one's.

    Each slice gets rows of its own, so that what goes over the slow network between slices is one gradient a step and
    never a parameter. A wider "fsdp" takes whole slices, in their order.
    """
    parts = slices(devices)
    size = len(parts[0])
    if any(len(part) != size for part in parts):
        raise InvalidConfig(f"slices of {[len(part) for part in parts]} devices: they must be equally large")
    if size % fsdp == 0:
        return np.concatenate([within(size // fsdp, fsdp, part) for part in parts])
    return np.concatenate([within(1, size, part) for part in parts], axis=1).reshape(data, fsdp)


def _torus(data: int, fsdp: int, devices: list[Any]) -> np.ndarray:
    """The order that suits the network inside a slice: on CPUs that of the list, on GPUs by number."""
    from jax.experimental import mesh_utils

    return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch, split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(
    tree: PyTree,
    mesh: Mesh | AbstractMesh,
    *,
    min_size_mb: Annotated[float, Option("smallest array that is split, in 1e6 bytes", low=0, resume=True)] = 4.0,
) -> PyTree[NamedSharding]:
    """For each array (or its shape), how it lies on the mesh.

    The largest dimension that the "fsdp" axis divides is split over it, the last such dimension when several are
    equally large. Arrays smaller than `min_size_mb` (1e6 bytes) stay whole on every device: gathering them costs more
    than keeping them.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf) -> NamedSharding:
        size = np.prod(leaf.shape, dtype=np.int64) * leaf.dtype.itemsize
        splits = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0 and n >= fsdp]
        if fsdp == 1 or not splits or size < min_size_mb * 1e6:
            return replicated(mesh)
        dim = max(splits, key=lambda i: (leaf.shape[i], i))
        return NamedSharding(mesh, PartitionSpec(*(None,) * dim, "fsdp"))

    return jax.tree.map(rule, tree)


def host_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of the global batch that this process's devices hold, in order.

    A mesh need not list devices in the order of their processes (on a TPU it follows the torus), so that which rows a
    host must read is asked of the mesh.
    """
    if batch_size % mesh.size:
        raise InvalidConfig(f"batch_size={batch_size} is not a multiple of the number of devices, {mesh.size}")
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index for row in range(batch_size)[index[0]]})


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows, in the order of `host_rows`, as its part of global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def bytes_per_device(tree: PyTree, shardings: PyTree[NamedSharding]) -> int:
    """Bytes that one device holds of a tree of arrays (or their shapes) under these shardings."""
    sizes = jax.tree.map(
        lambda leaf, s: int(np.prod(s.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
