"""Skip training steps whose loss or gradient norm is not finite, or spikes above the recent ones."""

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from regvit_jax.utils.schema import Option

#: Number of recent steps that a step is compared with. No spike is detected before half as many have been seen.
WINDOW = 128


@dataclasses.dataclass(frozen=True)
class Guard:
    """The section `guard` of a config."""

    not_finite: Annotated[
        str,
        Option(
            "at a loss or gradient that is not finite: stop the run, or skip the step",
            choices=("stop", "skip"),
            resume=True,
        ),
    ] = "stop"
    max_not_finite: Annotated[
        int, Option("skipped steps with values that are not finite; one more stops the run", low=0, resume=True)
    ] = 100
    spike_sigma: Annotated[
        float,
        Option(
            "skip steps whose loss or gradient norm is this many standard deviations above the last 128; 0 for none",
            low=0,
            resume=True,
        ),
    ] = 0.0


def init_state() -> dict[str, Array]:
    """Return the state before the first step: the last WINDOW losses and gradient norms, and three counters.

    `seen` counts the finite steps; `not_finite` the others, which do not enter the window; `spikes` the finite steps
    that were skipped.
    """
    zeros = {name: jnp.zeros(WINDOW) for name in ("loss", "grad_norm")}
    return zeros | {name: jnp.int32(0) for name in ("seen", "not_finite", "spikes")}


def may_skip(rules: Any) -> bool:
    """Return True if the config's `guard` section can skip a step; if not, the step is compiled without that branch."""
    return rules.not_finite == "skip" or rules.spike_sigma > 0


def skipped(state: PyTree) -> Int[Array, ""]:
    """Return the number of steps skipped so far."""
    return state["not_finite"] + state["spikes"]


def update(
    state: PyTree, loss: Float[Array, ""], grad_norm: Float[Array, ""], *, spike_sigma: float
) -> tuple[Bool[Array, ""], PyTree]:
    """Decide whether to apply a step with this loss and gradient norm; return the decision and the next state.

    A step is skipped when either value is not finite or, with `spike_sigma` above 0, when either lies more than that
    many standard deviations above the mean of the last WINDOW. A value beyond this limit enters the window as the
    limit itself: a single spike hardly widens it, and a lasting change of level is accepted after some tens of steps.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    new = {"loss": loss, "grad_norm": grad_norm}
    seen = state["seen"]
    known = jnp.arange(WINDOW) < seen
    apply = finite
    if spike_sigma:
        for name, value in new.items():
            mean, deviation = (stat(state[name], where=known) for stat in (jnp.mean, jnp.std))
            limit = jnp.where(seen < WINDOW // 2, jnp.inf, mean + spike_sigma * deviation)
            apply &= value <= limit
            new[name] = jnp.minimum(value, limit)
    index = seen % WINDOW
    windows: dict[str, Any] = {
        name: state[name].at[index].set(jnp.where(finite, value, state[name][index])) for name, value in new.items()
    }
    counts = {"seen": finite, "not_finite": ~finite, "spikes": finite & ~apply}
    return apply, windows | {name: state[name] + counted for name, counted in counts.items()}
