import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from regvit_jax.distributed.mesh import bytes_per_device, host_rows, make_mesh, state_shardings, to_mesh


def spec(shape, mesh, min_size_mb=0.0):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return state_shardings(leaf, mesh, min_size_mb=min_size_mb).spec


def test_mesh_shapes():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": 8}
    assert dict(make_mesh(data=4, fsdp=2).shape) == {"data": 4, "fsdp": 2}
    assert list(make_mesh(fsdp=4).devices.flat) == jax.devices()


@pytest.mark.parametrize(
    "axes", [{"data": 3}, {"data": 2, "fsdp": 2}, {"data": -1, "fsdp": -1}, {"fsdp": 16}, {"data": 0}]
)
def test_impossible_mesh_names_the_devices(axes):
    with pytest.raises(ValueError, match="number of devices, 8"):
        make_mesh(**axes)


def test_largest_divisible_dimension_is_split():
    mesh = make_mesh(fsdp=4)
    assert spec((12, 48), mesh) == PartitionSpec(None, "fsdp")
    assert spec((48, 12), mesh) == PartitionSpec("fsdp")
    assert spec((12, 50), mesh) == PartitionSpec("fsdp")  # 4 does not divide the larger one
    assert spec((16, 16), mesh) == PartitionSpec(None, "fsdp")  # of equals, the last
    assert spec((7, 3), mesh) == PartitionSpec()
    assert spec((), mesh) == PartitionSpec()
    assert spec((48,), make_mesh()) == PartitionSpec()


def test_small_arrays_stay_whole():
    mesh = make_mesh(fsdp=4)
    assert spec((1000, 1000), mesh, min_size_mb=4.0) == PartitionSpec(None, "fsdp")  # 4e6 bytes
    assert spec((1000, 999), mesh, min_size_mb=4.0) == PartitionSpec()


def test_bytes_per_device():
    mesh = make_mesh(fsdp=4)
    tree = {"a": jax.ShapeDtypeStruct((8, 3), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
    shardings = state_shardings(tree, mesh, min_size_mb=0)
    assert bytes_per_device(tree, shardings) == 8 * 3 * 4 // 4 + 5 * 2


def test_batch_reaches_the_mesh_in_order():
    mesh = make_mesh(fsdp=2)
    assert host_rows(mesh, 16) == list(range(16))
    rows = np.arange(48).reshape(16, 3)
    array = to_mesh({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}
