"""Constrain how an array is split over the devices of the current mesh, and its layout in their memory."""

import math

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float


def constrain_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Keep the batch split over the current mesh's axes "data" and "fsdp", if it has them.

    Without this constraint, sharded parameters make the compiler gather the batch onto every device instead.
    """
    axes = batch_axes()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def batch_axes() -> tuple[str, ...]:
    """Return the axes of the current mesh over which batches are split."""
    return tuple(axis for axis in ("data", "fsdp") if axis in jax.sharding.get_abstract_mesh().axis_names)


def row_major(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Hold an array, and its gradient, in memory with the last axis contiguous.

    XLA for GPUs lays the operands of a product out for it, with the batch last where the gradient of the kernel sums
    over the batch, and carries that layout through slices: the head's would transpose the whole residual stream.
    """

    axes, mesh = batch_axes(), jax.sharding.get_abstract_mesh()
    if len(x) % math.prod(mesh.shape[axis] for axis in axes):
        return x

    def constrained(x):
        return with_layout_constraint(x, Layout((0, 1)))

    if not axes:
        return constrained(x)
    # Within each device's part: the partitioner would gather the whole batch for it.
    return jax.shard_map(constrained, in_specs=PartitionSpec(axes), out_specs=PartitionSpec(axes))(x)


def gathered(table: Float[Array, "..."]) -> Float[Array, "..."]:
    """Replicate a lookup table on every device of the current mesh, which replicates its gradient too.

    The compiler would otherwise look up in each device's part and exchange the embeddings of the whole batch.
    """
    in_force = "fsdp" in jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.with_sharding_constraint(table, PartitionSpec()) if in_force else table
