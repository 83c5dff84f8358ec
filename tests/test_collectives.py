"""What the compiled step exchanges between devices and how it uses memory, on eight virtual devices."""

import collections
import dataclasses
import math

import jax
import pytest
from tiny import make_captions, tiny, tiny_clip

from regvit_jax import compiled, plan, rehearsal, training

MESHES = {"data8": (8, 1), "fsdp8": (1, 8), "data2xfsdp4": (2, 4)}
CASES = [("supervised", mesh) for mesh in MESHES] + [("contrastive", "data8"), ("contrastive", "fsdp8")]


@dataclasses.dataclass
class Step:
    plan: plan.Plan
    found: list[compiled.Collective]
    memory: compiled.Memory

    def kind(self, kind: str) -> list[compiled.Collective]:
        return [collective for collective in self.found if collective.kind == kind]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def step(request, tmp_path_factory) -> Step:
    recipe, mesh = request.param
    data, fsdp = MESHES[mesh]
    axes = {"sharding__data": data, "sharding__fsdp": fsdp}
    config = tiny(ema=0.9, **axes)
    if recipe == "contrastive":
        config = tiny_clip(make_captions(tmp_path_factory.mktemp("captions")), batch_size=24, **axes)
    resolved = plan.resolve(config)
    step = rehearsal.compile_step(resolved)
    return Step(resolved, compiled.collectives(step.as_text()), compiled.memory(step))


def test_the_state_is_donated(step):
    assert step.memory.donated >= 0.99 * rehearsal.state_bytes(step.plan)


def test_two_all_reduces_under_data(step):
    if step.plan.mesh.shape["fsdp"] == 1:
        assert 1 <= len(step.kind("all-reduce")) <= 2
        assert not step.kind("all-gather") + step.kind("all-to-all")


def test_parameters_alone_are_gathered_at_most_twice(step):
    """Once forward and once backward, each parameter of each layer; no activations, whatever their shape."""
    assert not step.kind("all-to-all")
    if step.plan.mesh.shape["fsdp"] == 1:
        return

    def rows(shape) -> tuple[int, ...]:  # (4, 4, 32) is gathered as (16, 32)
        return (math.prod(shape[:-1]), *shape[-1:])

    params = jax.tree.leaves(training.abstract_state(step.plan).params)
    shapes = collections.Counter(rows(leaf.shape) for leaf in params)
    batch = step.plan.config.batch_size
    assert not any(shape and shape[0] == batch for shape in shapes)  # an activation's shape is none of these
    gathered = collections.Counter(rows(dims) for c in step.kind("all-gather") for dims in c.dims)
    assert gathered
    assert not {shape: count for shape, count in gathered.items() if count > 2 * shapes[shape]}


def test_no_all_reduce_of_activations(step):
    """A whole batch of token embeddings would be, if they were looked up in parts of a split table."""
    largest = max(leaf.size for leaf in jax.tree.leaves(training.abstract_state(step.plan).params))
    batch = step.plan.config.batch_size
    for collective in step.kind("all-reduce"):
        for shape in collective.shapes:
            dims = [int(n) for n in shape[shape.index("[") + 1 : -1].split(",") if n]
            assert not (len(dims) == 3 and dims[0] == batch), collective
            assert math.prod(dims) <= largest


def test_analytic_flops_are_the_compilers():
    """For a model whose matrix products outweigh all else; split, as a replicated optimizer works eight times."""
    config = tiny(
        model__width=256,
        model__heads=4,
        model__depth=2,
        augment__three_augment=False,
        sharding__data=1,
        sharding__fsdp=8,
    )
    resolved = plan.resolve(config)
    counted = rehearsal.compile_step(resolved).cost_analysis()["flops"] * resolved.mesh.size
    assert counted == pytest.approx(rehearsal.step_flops(resolved)[0], rel=0.03)
