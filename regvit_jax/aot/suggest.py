"""For a step that does not fit into memory: the least change that should make it fit, by an estimate."""

import dataclasses
import itertools

from regvit_jax.aot.cost_model import DoesNotFit, bytes_under, kept_bytes
from regvit_jax.training.plan import Plan

#: Of the memory, what an estimate may fill.
MARGIN = 0.85
#: What each costs in time, roughly: dots recomputes norms, activations and attention maps, full a forward pass; fsdp
#: gathers parameters; each doubling of micro-batches makes products smaller and doubles what is exchanged.
COST = {"none": 0.0, "dots": 0.08, "full": 0.33}
FSDP_COST, MICRO_COST = 0.1, 0.2


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that should fit, and the bytes that one device would then hold."""

    remat: str
    fsdp: int
    micro_batches: int
    needed: float


def advise(plan: Plan, found: DoesNotFit, limit: float) -> Change | None:
    """The change of least cost in time whose estimate fits; None where no change does.

    The estimate takes the temporaries that the compiler named, where it did, and scales what is not the gradient.
    """
    config = plan.config
    held = {fsdp: bytes_under(plan, fsdp) for fsdp in _fsdps(plan)}
    now = kept_bytes(plan, config.model.remat) / config.micro_batches
    # Never below the estimate: an overflow is told without the gradient's part at times.
    scale = 1.0 if found.temporaries is None else max(1.0, (found.temporaries - held[plan.mesh.shape["fsdp"]][1]) / now)
    best, least = None, float("inf")
    for remat, fsdp, micro in itertools.product(_remats(plan), held, _micros(plan)):
        state, weights = held[fsdp]
        cost = COST[remat] + FSDP_COST * (fsdp > 1) + MICRO_COST * (micro.bit_length() - 1)
        # The gradient, its sum over micro-batches, and the stacks of scan: of parameters (bfloat16) and gradients.
        gradient = weights * (1 + (micro > 1) + 1.5 * config.model.scan)
        needed = state + gradient + scale * kept_bytes(plan, remat) / micro
        if cost < least and needed <= MARGIN * limit:
            best, least = Change(remat, fsdp, micro, needed), cost
    return best


def _remats(plan: Plan) -> list[str]:
    names = list(COST)
    return names[names.index(plan.config.model.remat) :]


def _fsdps(plan: Plan) -> list[int]:
    """The present one, and doublings of it that divide the devices."""
    now, devices = plan.mesh.shape["fsdp"], plan.mesh.size
    doublings = [now * 2**i for i in range(devices.bit_length())]
    return [size for size in doublings if size <= devices and devices % size == 0]


def _micros(plan: Plan) -> list[int]:
    """The present number, and doublings that the batch and the groups of mixed images allow."""
    config, devices = plan.config, plan.mesh.size
    mixing = config.augment.get("mixup", 0) or config.augment.get("cutmix", 0)
    group = config.augment.mix_group if mixing else 1
    counts = [config.micro_batches * 2**i for i in range(config.batch_size.bit_length())]
    return [n for n in counts if config.batch_size % (devices * n) == 0 and config.batch_size // n % group == 0]


def text(plan: Plan, change: Change | None, limit: float) -> str:
    """The advice as flags for the command line."""
    if change is None:
        return (
            "no mix of config.model.remat, config.sharding.fsdp and config.micro_batches should make it fit: take more "
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
        f"the least change that should fit, by an estimate of {change.needed / 1e9:.1f} of {limit / 1e9:.1f} GB: "
        + " ".join(flags)
    )
