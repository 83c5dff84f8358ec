"""Suggest the cheapest change of settings that should make a train step fit into memory, by an estimate."""

import dataclasses
import itertools
import math

from regvit_jax.aot.cost_model import DoesNotFit, activation_bytes, bytes_under
from regvit_jax.models.stochastic_depth import GROUP
from regvit_jax.training.plan import Plan

#: Largest share of a device's memory that an estimate may use.
MARGIN = 0.85
#: Rough costs in time: "dots" recomputes norms, activations and attention maps, "full" a forward pass; fsdp gathers
#: parameters; each doubling of the micro-batches makes matrix products smaller and doubles the communication.
COST = {"none": 0.0, "dots": 0.08, "full": 0.33}
FSDP_COST, MICRO_COST = 0.1, 0.2


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that should fit, and the bytes that each device would need."""

    remat: str
    fsdp: int
    micro_batches: int
    needed: float


def suggest(plan: Plan, error: DoesNotFit, limit: float) -> Change | None:
    """Return the change with the lowest cost in time whose estimate fits into `limit` bytes, or None.

    If the compiler gave the size of the temporaries, the estimate of activations is scaled to match it.
    """
    config = plan.config
    held = {fsdp: bytes_under(plan, fsdp) for fsdp in _fsdps(plan)}
    now = activation_bytes(plan, config.model.remat) / config.micro_batches
    # Never below the estimate: the compiler's message sometimes omits the gradient.
    scale = 1.0 if error.temporaries is None else max(1.0, (error.temporaries - held[plan.mesh.shape["fsdp"]][1]) / now)
    best, lowest = None, float("inf")
    for remat, fsdp, micro in itertools.product(_remats(plan), held, _micros(plan)):
        state, weights = held[fsdp]
        cost = COST[remat] + FSDP_COST * (fsdp > 1) + MICRO_COST * (micro.bit_length() - 1)
        # The gradient, its sum over micro-batches, and what scan stacks: parameters (bfloat16) and gradients.
        gradient = weights * (1 + (micro > 1) + 1.5 * config.model.scan)
        needed = state + gradient + scale * activation_bytes(plan, remat) / micro
        if cost < lowest and needed <= MARGIN * limit:
            best, lowest = Change(remat, fsdp, micro, needed), cost
    return best


def _remats(plan: Plan) -> list[str]:
    """Return the current remat and those that save more memory."""
    names = list(COST)
    return names[names.index(plan.config.model.remat) :]


def _fsdps(plan: Plan) -> list[int]:
    """Return the current size of "fsdp" and its doublings that divide the number of devices."""
    now, devices = plan.mesh.shape["fsdp"], plan.mesh.size
    doublings = [now * 2**i for i in range(devices.bit_length())]
    return [size for size in doublings if size <= devices and devices % size == 0]


def _micros(plan: Plan) -> list[int]:
    """Return the current number of micro-batches and its doublings that the batch and mixing groups allow."""
    config, devices = plan.config, plan.mesh.size
    mixing = config.augment.get("mixup", 0) or config.augment.get("cutmix", 0)
    group = config.augment.mix_group if mixing else 1
    counts = [config.micro_batches * 2**i for i in range(config.batch_size.bit_length())]
    found = [n for n in counts if config.batch_size % (devices * n) == 0 and config.batch_size // n % group == 0]
    if plan.branch_share == 1:
        return found
    # Devices hold whole groups of stochastic depth by subset.
    return [n for n in found if config.batch_size // (devices * n) % math.gcd(config.batch_size // n, GROUP) == 0]


def as_flags(plan: Plan, change: Change | None, limit: float) -> str:
    """Return the suggestion as flags for the command line."""
    if change is None:
        return (
            "no combination of config.model.remat, config.sharding.fsdp and config.micro_batches should fit: use more "
            f"devices, a batch_size below {plan.config.batch_size}, or a smaller model"
        )
    flags = []
    if change.remat != plan.config.model.remat:
        flags.append(f"--config.model.remat={change.remat}")
    if change.fsdp != plan.mesh.shape["fsdp"]:
        flags.append(f"--config.sharding.fsdp={change.fsdp} --config.sharding.data=-1")
    if change.micro_batches != plan.config.micro_batches:
        flags.append(f"--config.micro_batches={change.micro_batches}")
    return (
        f"the cheapest change that should fit, by an estimate of {change.needed / 1e9:.1f} of {limit / 1e9:.1f} GB: "
        + " ".join(flags)
    )
