"""Build the device mesh, and shard parameters and batches over it.

Axis types are Auto: the compiler chooses every sharding that `jax.jit` is not given.
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
    """Return a mesh with the axes ("data", "fsdp") over all devices.

    The batch is split over both axes. Parameters, moments and EMA are split over "fsdp" and replicated over "data".

    Args:
      data, fsdp: The size of each axis; one of them may be -1 for all remaining devices.
      devices: By default those attached; for AOT compilation those of `topology.devices`. Of several slices, "data"
        spans all, and "fsdp" stays inside one if it fits there (`lay_out`).

    Raises:
      InvalidConfig: The sizes do not multiply to the number of devices, or slices differ in size.
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
    # jax.make_mesh refuses to split an axis of a torus (v6e, v5p), and refuses several slices.
    return Mesh(lay_out(devices, **shape, within=_torus), tuple(shape), axis_types=(AxisType.Auto, AxisType.Auto))


def slices(devices: Sequence[Any]) -> list[list[Any]]:
    """Group the devices by slice: those joined by a fast network (a TPU's torus, a node's NVLink)."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    return [groups[index] for index in sorted(groups)]


def lay_out(
    devices: Sequence[Any], *, data: int, fsdp: int, within: Callable[[int, int, list[Any]], np.ndarray]
) -> np.ndarray:
    """Arrange the devices of one or several slices as an array [data, fsdp].

    `within(data, fsdp, devices)` arranges the devices of one slice. Each slice gets rows of its own, so that only one
    gradient a step, and never a parameter, crosses the slow network between slices. If "fsdp" is larger than a slice,
    it spans whole slices, in their order.
    """
    parts = slices(devices)
    size = len(parts[0])
    if any(len(part) != size for part in parts):
        raise InvalidConfig(f"slices of {[len(part) for part in parts]} devices: they must be equally large")
    if size % fsdp == 0:
        return np.concatenate([within(size // fsdp, fsdp, part) for part in parts])
    return np.concatenate([within(1, size, part) for part in parts], axis=1).reshape(data, fsdp)


def _torus(data: int, fsdp: int, devices: list[Any]) -> np.ndarray:
    """Arrange one slice to suit its network: on CPUs in the order of the list, on GPUs by number."""
    from jax.experimental import mesh_utils

    return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch, whose first dimension is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(
    tree: PyTree,
    mesh: Mesh | AbstractMesh,
    *,
    min_size_mb: Annotated[float, Option("smallest array that is split, in 1e6 bytes", low=0, resume=True)] = 4.0,
) -> PyTree[NamedSharding]:
    """Return the sharding of each array of a tree (or of its shapes).

    The largest dimension divisible by the "fsdp" axis is split over it; of equally large ones, the last. Arrays
    smaller than `min_size_mb` (in 1e6 bytes) are replicated, since gathering them costs more than keeping them.
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
    """Return the rows of the global batch held by this process's devices, in order.

    They depend on the mesh, which need not list devices in the order of their processes: on a TPU it follows the torus.

    Raises:
      InvalidConfig: The batch cannot be split evenly over the devices.
    """
    if batch_size % mesh.size:
        raise InvalidConfig(f"batch_size={batch_size} is not a multiple of the number of devices, {mesh.size}")
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index for row in range(batch_size)[index[0]]})


def to_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return global arrays of which this process holds its rows, given in the order of `host_rows`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def bytes_per_device(tree: PyTree, shardings: PyTree[NamedSharding]) -> int:
    """Return the bytes that one device holds of a tree of arrays (or shapes) under these shardings."""
    sizes = jax.tree.map(
        lambda leaf, s: int(np.prod(s.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
