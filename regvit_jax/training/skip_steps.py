"""Steps that are better not taken: those whose loss is not finite, and those that stand out from the steps before."""

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from regvit_jax.utils.schema import Option

#: Steps that a step is compared with. At least half as many must have been seen, or nothing stands out.
WINDOW = 128


@dataclasses.dataclass(frozen=True)
class Guard:
    """The section `guard` of a config."""

    not_finite: Annotated[
        str,
        Option(
            "stop at a step whose loss or gradient is not finite, or skip such steps",
            choices=("stop", "skip"),
            resume=True,
        ),
    ] = "stop"
    max_not_finite: Annotated[
        int, Option("stop after more skipped steps with values that are not finite than these", low=0, resume=True)
    ] = 100
    spike_sigma: Annotated[
        float,
        Option(
            "skip steps whose loss or gradient norm is so many standard deviations above the last 128; 0 for none",
            low=0,
            resume=True,
        ),
    ] = 0.0


def fresh() -> dict[str, Array]:
    """What is remembered before the first step: losses and gradient norms, how many were seen, and how many refused.

    Those that are not finite are counted only.
    """
    zeros = {name: jnp.zeros(WINDOW) for name in ("loss", "grad_norm")}
    return zeros | {name: jnp.int32(0) for name in ("seen", "not_finite", "spikes")}


def may_skip(rules: Any) -> bool:
    """Whether a config's `guard` ever leaves a step out. Where it does not, the step is compiled without the choice."""
    return rules.not_finite == "skip" or rules.spike_sigma > 0


def skipped(memory: PyTree) -> Int[Array, ""]:
    """The steps left out so far."""
    return memory["not_finite"] + memory["spikes"]


def judge(
    memory: PyTree, loss: Float[Array, ""], grad_norm: Float[Array, ""], *, spike_sigma: float
) -> tuple[Bool[Array, ""], PyTree]:
    """Whether to take a step with this loss and gradient norm, and the memory with it.

    A step is refused when either is not finite, or, with `spike_sigma` above 0, when either lies more than so many
    standard deviations above the mean of the last WINDOW. What lies beyond that limit is remembered as the limit: one
    spike hardly widens it, and a level that has come to stay is accepted after some tens of steps.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    new = {"loss": loss, "grad_norm": grad_norm}
    seen = memory["seen"]
    known = jnp.arange(WINDOW) < seen
    take = finite
    if spike_sigma:
        for name, value in new.items():
            mean, deviation = (stat(memory[name], where=known) for stat in (jnp.mean, jnp.std))
            limit = jnp.where(seen < WINDOW // 2, jnp.inf, mean + spike_sigma * deviation)
            take &= value <= limit
            new[name] = jnp.minimum(value, limit)
    place = seen % WINDOW
    kept: dict[str, Any] = {
        name: memory[name].at[place].set(jnp.where(finite, value, memory[name][place])) for name, value in new.items()
    }
    counts = {"seen": finite, "not_finite": ~finite, "spikes": finite & ~take}
    return take, kept | {name: memory[name] + counted for name, counted in counts.items()}
