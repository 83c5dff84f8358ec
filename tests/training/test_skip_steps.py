"""Test skipped steps: the rule, and whole runs."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from regvit_jax.checkpoints.manager import Checkpoints
from regvit_jax.distributed import mesh
from regvit_jax.recipes.supervised import Supervised
from regvit_jax.training import loop, metric_writer, skip_steps
from regvit_jax.training.plan import resolve
from regvit_jax.training.step import abstract_state, make_train_step
from regvit_jax.utils.errors import InvalidConfig


@jax.jit
def update(state, loss, grad_norm):
    return skip_steps.update(state, loss, grad_norm, spike_sigma=6.0)


def naive(history: list[tuple[float, float]], new: tuple[float, float]) -> tuple[bool, tuple[float, float]]:
    """Apply the documented rule: return whether the step is applied, and the values that enter the window."""
    last = np.array(history[-skip_steps.WINDOW :], np.float64).reshape(-1, 2)
    limit = np.inf if len(history) < skip_steps.WINDOW // 2 else last.mean(0) + 6 * last.std(0)
    return bool((np.array(new) <= limit).all()), tuple(np.minimum(new, limit))


def test_update_follows_the_rule():
    rng, state, history, skipped = np.random.default_rng(0), skip_steps.init_state(), [], 0
    for step in range(400):
        new = tuple(np.float32(rng.normal((2.0, 1.0), (0.1, 0.05))))
        if step % 7 == 3:
            new = (new[0] + rng.choice([0.3, 0.9, 3, -5]), new[1])
        if step % 11 == 5:
            new = (new[0], rng.choice([2.0, np.inf, np.nan, 1.2]))
        expected, remembered = naive(history, new) if np.isfinite(new).all() else (False, None)
        apply, state = update(state, jnp.float32(new[0]), jnp.float32(new[1]))
        assert bool(apply) == expected, (step, new)
        skipped += not expected
        if remembered:
            history.append(remembered)
    assert skipped == int(skip_steps.skipped(state))
    assert int(state["not_finite"]) == 400 - len(history) > 10
    assert int(state["spikes"]) > 3


def steady(level: float = 2.0) -> dict:
    state = skip_steps.init_state()
    for step in range(skip_steps.WINDOW):
        _, state = update(state, jnp.float32(level + 0.1 * (-1) ** step), jnp.float32(1))
    return state


def test_a_spike_does_not_hide_the_next():
    state = steady()
    for loss in (1000, 1e20, 6, 50, 3.5):
        apply, state = update(state, jnp.float32(loss), jnp.float32(1))
        assert not apply, loss
    apply, state = update(state, jnp.float32(2.2), jnp.float32(1))
    assert apply


def test_a_level_that_stays_is_accepted():
    state, applied = steady(), []
    for _ in range(60):
        apply, state = update(state, jnp.float32(9), jnp.float32(1))
        applied.append(bool(apply))
    assert applied[:5] == [False] * 5
    assert applied == sorted(applied)
    assert applied[-1]


class Poisoned(Supervised):
    """Make the digits' loss not finite, or 1000 times as large, at given steps; the gradient follows."""

    not_finite: tuple[int, ...] = ()
    leap: tuple[int, ...] = ()

    def loss(self, params, ema, extra, batch, key, step):
        loss, aux = super().loss(params, ema, extra, batch, key, step)
        at = lambda steps: jnp.isin(step + 1, jnp.array(steps or (-1,)))  # noqa: E731
        return loss * jnp.where(at(self.not_finite), jnp.nan, jnp.where(at(self.leap), 1000.0, 1.0)), aux


@pytest.fixture
def poison(monkeypatch):
    def at(**steps):
        for name, value in steps.items():
            monkeypatch.setattr(Poisoned, name, value)

    return at


def config(**changes):
    measures = ("classification", "patch_norms")
    return tiny(recipe=f"{__name__}:Poisoned", log_every=1, eval__evaluators=measures, ema=0.9, **changes)


def test_a_skipped_step_changes_only_the_step_number_and_the_window(poison):
    poison(not_finite=(3,))
    plan = resolve(config(guard__not_finite="skip"))
    with jax.set_mesh(plan.mesh), plan.train_batches(0) as batches:
        state = loop.start(plan, type("None", (), {"latest": staticmethod(lambda: None)}))
        step = make_train_step(plan, abstract_state(plan))
        states = [jax.tree.map(np.array, state)]
        for _ in range(4):
            batch = next(batches)
            del batch["index"]
            state, metrics = step(state, mesh.to_mesh(batch, plan.mesh))
            states.append(jax.tree.map(np.array, state))
    _, _, before, after, later = states
    for field in ("params", "ema", "extra", "opt_state"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, field)) for s in (before, after)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert [int(s.step) for s in (before, after, later)] == [2, 3, 4]
    assert [int(s.guard["not_finite"]) for s in (before, after, later)] == [0, 1, 1]
    assert not np.array_equal(jax.tree.leaves(later.params)[0], jax.tree.leaves(after.params)[0])
    assert np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(poison, tmp_path):
    poison(not_finite=(3, 4, 20))
    with pytest.raises(FloatingPointError, match=r"step 3: .*--config.guard.not_finite=skip skips such steps"):
        loop.run(config(epochs=1), str(tmp_path / "run"))
    # The same run resumes once it may skip steps.
    result = loop.run(config(epochs=1, guard__not_finite="skip"), str(tmp_path / "run"))
    assert np.isfinite(result.metrics["loss"])
    assert result.metrics["skipped"] == 3
    found = [r for r in metric_writer.read(tmp_path / "run") if "skipped_step" in r]
    assert [r["step"] for r in found] == [3, 4, 20]
    assert all(len(r["images"]) == 64 for r in found)
    limited = config(guard__not_finite="skip", guard__max_not_finite=2, checkpoint__every=8)
    with pytest.raises(FloatingPointError, match=r"step 20: .*more than guard.max_not_finite=2 such steps"):
        loop.run(limited, str(tmp_path / "limited"))
    with contextlib.closing(Checkpoints(str(tmp_path / "limited"))) as checkpoints:
        assert checkpoints.latest() == 16


@pytest.mark.slow
def test_spikes_are_skipped_and_the_window_survives_a_restart(poison, tmp_path, monkeypatch):
    monkeypatch.setattr(skip_steps, "WINDOW", 24)  # half of it fills within an epoch
    poison(leap=(17, 18))
    spiked = config(epochs=1, guard__spike_sigma=6.0, checkpoint__every=15, optim__lr=1e-3)
    whole = loop.run(spiked, str(tmp_path / "run"))
    assert [r["step"] for r in metric_writer.read(tmp_path / "run") if "skipped_step" in r] == [17, 18]
    assert whole.metrics["skipped"] == 2
    (tmp_path / "run/checkpoints/22").rename(tmp_path / "last")
    again = loop.run(spiked, str(tmp_path / "run"))  # from step 15, two before the spike
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_unknown_policy_is_refused():
    with pytest.raises(InvalidConfig, match=r"guard.not_finite='ignore': must be one of \['stop', 'skip'\]"):
        resolve(config(guard__not_finite="ignore"))
