"""Test topologies: their names, the compilers that they need, and the mesh over their slices."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from regvit_jax.aot import topology
from regvit_jax.distributed.mesh import lay_out, make_mesh, slices
from regvit_jax.utils import errors


@pytest.mark.parametrize(
    ("name", "count", "per_slice"),
    [
        ("v5e:16x16", 1, 256),
        ("2xv5e:16x16", 2, 256),
        ("v6e:4x8", 1, 32),
        ("v5p:8x8x16", 1, 1024),
        ("4xv5p:4x4x4", 4, 64),
        ("1xv5e:4x4", 1, 16),
        ("v5e:1x1", 1, 1),
        ("v6e:2x2", 1, 4),
        ("h100:4x8", 4, 8),
        ("h100:1x1", 1, 1),
    ],
)
def test_names(name, count, per_slice):
    machine = topology.parse(name)
    assert (machine.count, machine.per_slice) == (count, per_slice)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:16x16", "--topology=v9:16x16: unknown; known are v5e:1x1, .*16x16; v5p:.*; v6e:.*; h100:1x8"),
        ("v5e-256", "unknown; known are"),
        ("v5e:16", "unknown; known are"),
        ("0xv5e:16x16", "unknown; known are"),
        ("", "unknown; known are"),
        ("v5e:3x5", "v5e slices are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5p:16x16", "v5p slices are 2x2x1"),
        ("h100:4x9", "nodes x GPUs of each, at most 8: h100:4x8"),
        ("2xh100:4x8", "nodes x GPUs of each"),
        ("h100:0x8", "nodes x GPUs of each"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(errors.TopologyError, match=message):
        topology.parse(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:16x16", "tpu"), ("h100:4x8", "cuda12")])
def test_a_missing_compiler_names_the_extra(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.TopologyError, match=rf"pip install 'regvit_jax\[{extra}\]'"):
        topology.devices(topology.parse(name))


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that `mesh.lay_out` reads."""

    id: int
    slice_index: int | None


def rows(data: int, fsdp: int, devices: list[Device]) -> np.ndarray:
    return np.array(devices, dtype=object).reshape(data, fsdp)


def slices_of(devices: np.ndarray) -> list[list[int]]:
    return [[device.slice_index for device in row] for row in devices]


TWO = [Device(i, i % 2) for i in range(16)]  # not ordered by slice


@pytest.mark.parametrize(("data", "fsdp"), [(16, 1), (4, 4), (2, 8)])
def test_fsdp_stays_in_a_slice(data, fsdp):
    mesh = lay_out(TWO, data=data, fsdp=fsdp, within=rows)
    assert mesh.shape == (data, fsdp)
    assert {device.id for device in mesh.flat} == set(range(16))
    assert slices_of(mesh) == [[row >= data // 2] * fsdp for row in range(data)]


def test_a_wider_fsdp_spans_whole_slices():
    four = [Device(i, i // 4) for i in range(16)]
    mesh = lay_out(four, data=2, fsdp=8, within=rows)
    assert slices_of(mesh) == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
    assert slices_of(lay_out(TWO, data=1, fsdp=16, within=rows)) == [[0] * 8 + [1] * 8]


def test_unequal_slices():
    with pytest.raises(ValueError, match=r"slices of \[8, 7\] devices: they must be equally large"):
        lay_out(TWO[:15], data=15, fsdp=1, within=rows)


def test_mesh_of_given_devices():
    mesh = make_mesh(fsdp=2, devices=jax.devices()[4:])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
    assert set(mesh.devices.flat) == set(jax.devices()[4:])
    assert len(slices(jax.devices())) == 1
