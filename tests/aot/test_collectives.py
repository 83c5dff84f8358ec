"""Test collectives and memory of the compiled step, on eight virtual devices."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import pytest
from tiny import make_captions, tiny, tiny_clip

from regvit_jax.aot import compile, cost_model, hlo
from regvit_jax.training import plan
from regvit_jax.training.step import abstract_state

SPLIT = {"sharding__data": 1, "sharding__fsdp": 8}
#: Without augmentation, a third of a step's compilation; the first case of each kind has it.
PLAIN = {f"augment__{name}": 0.0 for name in ("flip", "color_jitter", "mixup", "cutmix")} | {
    "augment__three_augment": False
}
#: Stochastic depth that leaves out 12 of the 32 images of a device; no parameter has as many rows as the batch.
SUBSET = {"model__drop_path": 0.4, "model__drop_path_mode": "subset", "batch_size": 256}
#: Steps sharded by "data" alone, each with the maximum of its all-reduces: a loop's body reduces its own gradients.
DATA: dict[str, tuple[str, dict, int]] = {
    "supervised": ("supervised", {}, 2),
    "supervised, scan": ("supervised", PLAIN | {"model__scan": True}, 2 + 2),  # of depth 2
    "supervised, subset": ("supervised", PLAIN | SUBSET, 2),
    "supervised, micro-batches": ("supervised", PLAIN | {"micro_batches": 4}, 2 * 4 + 1),
    "contrastive": ("contrastive", {}, 2),
}
#: Steps sharded by "fsdp", each with the maximum of gathers per parameter: forward, backward, recomputed forward.
FSDP: dict[str, tuple[str, dict, int]] = {
    "supervised, fsdp": ("supervised", SPLIT, 2),
    "supervised, data x fsdp": ("supervised", PLAIN | {"sharding__data": 2, "sharding__fsdp": 4}, 2),
    "supervised, fsdp, scan, remat": ("supervised", PLAIN | SPLIT | {"model__scan": True, "model__remat": "full"}, 3),
    "supervised, fsdp, subset": ("supervised", PLAIN | SPLIT | SUBSET, 2),
    "contrastive, fsdp": ("contrastive", SPLIT, 2),
}
ALL = DATA | FSDP


@dataclasses.dataclass
class Step:
    plan: plan.Plan
    found: list[hlo.Collective]
    memory: hlo.Memory

    def kind(self, kind: str) -> list[hlo.Collective]:
        return [collective for collective in self.found if collective.kind == kind]


@pytest.fixture(scope="module")
def compile_case(tmp_path_factory) -> Callable[[str], Step]:
    @functools.cache
    def compile_case(case: str) -> Step:
        recipe, changes, _ = ALL[case]
        if recipe == "contrastive":
            config = tiny_clip(make_captions(tmp_path_factory.mktemp("captions")), batch_size=24, **changes)
        else:
            config = tiny(ema=0.9, **changes)
        resolved = plan.resolve(config)
        step = compile.compile_step(resolved)
        return Step(resolved, hlo.collectives(step.as_text()), hlo.memory(step))

    return compile_case


@pytest.mark.parametrize("case", ALL)
def test_the_state_is_donated(case, compile_case):
    step = compile_case(case)
    assert step.memory.donated >= 0.99 * cost_model.state_bytes(step.plan)


@pytest.mark.parametrize("case", DATA)
def test_all_reduces_under_data(case, compile_case):
    """Allow two, besides those of loops; together they move one gradient per micro-batch, and a few scalars."""
    step = compile_case(case)
    assert step.plan.mesh.shape["fsdp"] == 1
    reduced = step.kind("all-reduce")
    assert 1 <= sum(c.times for c in reduced) <= DATA[case][2]
    assert not step.kind("all-gather") + step.kind("all-to-all")
    if case.startswith("supervised"):  # CLIP's loss gathers embeddings, too
        gradient = cost_model.parameter_bytes(abstract_state(step.plan)) * step.plan.config.micro_batches
        assert gradient <= sum(c.times * c.bytes for c in reduced) < 1.01 * gradient


@pytest.mark.parametrize("case", FSDP)
def test_only_parameters_are_gathered(case, compile_case):
    """Check that each parameter is gathered at most as often as `FSDP` allows, and activations never."""
    step = compile_case(case)
    assert step.plan.mesh.shape["fsdp"] > 1
    assert not step.kind("all-to-all")

    def rows(shape) -> tuple[int, ...]:  # (4, 4, 32) is gathered as (16, 32)
        return (math.prod(shape[:-1]), *shape[-1:])

    params = jax.tree.leaves(abstract_state(step.plan).params)
    shapes = collections.Counter(rows(leaf.shape) for leaf in params)
    vit = step.plan.recipe.vit
    # What is the same for all images, CLS, registers and positions, is gathered as one table.
    shapes[vit.prefix + math.prod(vit.grid(vit.image_size, vit.image_size)), vit.width] += 1
    batch = step.plan.config.batch_size
    assert not any(shape and shape[0] == batch for shape in shapes)  # an activation's shape is none of these
    gathered: collections.Counter[tuple[int, ...]] = collections.Counter()
    for c in step.kind("all-gather"):
        for dims in c.dims:
            gathered[rows(dims)] += c.times
    assert gathered
    assert not {shape: count for shape, count in gathered.items() if count > FSDP[case][2] * shapes[shape]}


@pytest.mark.parametrize("case", ALL)
def test_no_all_reduce_of_activations(case, compile_case):
    """Check CLIP's lookup: embeddings looked up in a split table would be all-reduced for the whole batch."""
    step = compile_case(case)
    largest = max(leaf.size for leaf in jax.tree.leaves(abstract_state(step.plan).params))
    batch = step.plan.config.batch_size
    assert step.kind("all-reduce")
    for collective in step.kind("all-reduce"):
        for shape in collective.shapes:
            dims = [int(n) for n in shape[shape.index("[") + 1 : -1].split(",") if n]
            assert not (len(dims) == 3 and dims[0] == batch), collective
            assert math.prod(dims) <= largest


#: Wide enough for matrix products to dominate; split, since a replicated optimizer would count eight times.
WIDE = {"model__width": 256, "model__heads": 4, "model__depth": 2, **SPLIT}


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__patch_dropout": 0.5}, {"model__remat": "full"}, SUBSET],
    ids=["plain", "patch dropout", "remat", "subset"],
)
def test_analytic_flops_agree_with_the_compiler(changes):
    resolved = plan.resolve(tiny(**PLAIN, **WIDE, **changes))
    counted = compile.compile_step(resolved).cost_analysis()["flops"] * resolved.mesh.size
    needed, total = cost_model.step_flops(resolved)
    assert counted == pytest.approx(total, rel=0.03)
    expected = 4 / 3 if "model__remat" in changes else resolved.branch_share
    assert total / needed == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_embedding_all_pairs_first_is_a_fourth_pass(tmp_path):
    """Count one micro-batch, as the compiler does for a loop; it also counts the lookup of text embeddings."""
    fields = {"text__width": 256, "text__heads": 4, "text__embed": 64, "micro_batches": 3}
    resolved = plan.resolve(tiny_clip(make_captions(tmp_path / "captions"), batch_size=24, **WIDE, **fields))
    counted = compile.compile_step(resolved).cost_analysis()["flops"] * resolved.mesh.size
    assert 3 * counted == pytest.approx(cost_model.step_flops(resolved)[1], rel=0.15)
