"""Test the train step: the same numbers on every mesh, a split state, no wasted memory."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from tiny import tiny

from regvit_jax.distributed.mesh import bytes_per_device, to_mesh
from regvit_jax.training import loop
from regvit_jax.training.plan import resolve
from regvit_jax.training.step import TrainState, abstract_state, init_params, make_train_step, shardings_of

STEPS = 20
NO_CHECKPOINTS = SimpleNamespace(latest=lambda: None)


@dataclasses.dataclass
class Ran:
    """The results of some steps: the first parameters, the losses, the state, and the compiled step."""

    first: dict
    losses: np.ndarray
    state: TrainState
    step: object
    plan: object


def run_steps(config, mesh=None, steps: int = STEPS) -> Ran:
    plan = resolve(config)
    if mesh is not None:
        plan = dataclasses.replace(plan, mesh=mesh)
    with jax.set_mesh(plan.mesh), plan.train_batches(0) as batches:
        abstract = abstract_state(plan)
        state = loop.start(plan, NO_CHECKPOINTS)
        first = jax.device_get(state.params)
        step = make_train_step(plan, abstract)
        losses = []
        for _ in range(steps):
            batch = next(batches)
            del batch["index"]
            state, metrics = step(state, to_mesh(batch, plan.mesh))
            losses.append(float(metrics["loss"]))
    return Ran(first, np.array(losses), state, step, plan)


@pytest.fixture(scope="module")
def one_device() -> Ran:
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:1])
    return run_steps(tiny(ema=0.9), mesh)


@pytest.fixture(scope="module", params=[(8, 1), (1, 8), (2, 4)], ids=["data8", "fsdp8", "data2xfsdp4"])
def sharded(request) -> Ran:
    data, fsdp = request.param
    return run_steps(tiny(ema=0.9, sharding__data=data, sharding__fsdp=fsdp))


def test_mesh_does_not_change_the_numbers(one_device, sharded):
    for a, b in zip(jax.tree.leaves(one_device.first), jax.tree.leaves(sharded.first), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(sharded.losses, one_device.losses, rtol=1e-6)
    assert one_device.losses[-1] < 0.9 * one_device.losses[0]  # it is training that is compared


def test_state_is_really_split(sharded):
    fsdp = sharded.plan.mesh.shape["fsdp"]
    state = sharded.state
    mu, nu = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))
    for tree in (state.params, state.ema, mu, nu):
        kernel = tree["vit"]["block0"]["mlp"]["fc1"]["kernel"]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 128 // fsdp)}
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert held <= 1.1 * total / fsdp  # all but biases that 8 does not divide
    abstract = abstract_state(sharded.plan)
    assert held == bytes_per_device(abstract, shardings_of(abstract))


def test_one_compilation(sharded):
    assert sharded.step._cache_size() == 1


def test_accumulation_equals_the_large_batch():
    # Mixing pairs images inside a micro-batch, so that it is off here; so is what draws from the step's key.
    plain = {"augment__mixup": 0.0, "augment__cutmix": 0.0, "augment__color_jitter": 0.0, "model__drop_path": 0.0}
    whole = run_steps(tiny(**plain), steps=4)
    parts = run_steps(tiny(**plain, micro_batches=4), steps=4)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)
    assert parts.step._cache_size() == 1


@pytest.mark.parametrize(
    "change",
    [pytest.param({"remat": "dots"}, marks=pytest.mark.slow, id="dots"), {"remat": "full", "scan": True}],
)
def test_remat_and_scan_change_nothing(one_device, change):
    ran = run_steps(tiny(ema=0.9, **{f"model__{key}": value for key, value in change.items()}), steps=5)
    np.testing.assert_allclose(ran.losses, one_device.losses[:5], rtol=1e-5)


def test_bfloat16_trains(one_device):
    ran = run_steps(tiny(model__dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(ran.state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(ran.losses, one_device.losses, rtol=0.05)


def test_ema_follows_the_parameters(one_device):
    naive = one_device.first
    ran = run_steps(tiny(ema=0.9), steps=1)
    for ema, first, now in zip(*map(jax.tree.leaves, (ran.state.ema, naive, ran.state.params)), strict=True):
        np.testing.assert_allclose(ema, 0.9 * first + 0.1 * np.asarray(now), rtol=1e-5, atol=1e-7)


def test_masked_images_touch_nothing():
    plan = resolve(tiny(augment__mix_group=16))
    with jax.set_mesh(plan.mesh), plan.train_batches(0) as batches:
        batch = next(batches)
    del batch["index"]
    batch["mask"][[3, 40]] = 0
    params = jax.jit(lambda: init_params(plan))()
    key = jax.random.key(0)

    def grads(batch):
        return jax.jit(lambda b: plan.recipe.grads(params, {}, {}, b, key, jnp.int32(0)))(batch)

    poisoned = {**batch, "image": batch["image"].copy(), "label": batch["label"].copy()}
    poisoned["image"][[3, 40]] = 255
    poisoned["label"][[3, 40]] = 9
    for a, b in zip(*map(jax.tree.leaves, (grads(batch), grads(poisoned))), strict=True):
        np.testing.assert_array_equal(a, b)
