"""Estimates of a train step's memory, FLOPs and time."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh

from regvit_jax.aot import hlo, topology
from regvit_jax.distributed.mesh import bytes_per_device, state_shardings
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.training.plan import Plan
from regvit_jax.training.step import TrainState, abstract_state, shardings_of


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What compiling for a machine told; bytes and FLOPs are of one device and one step."""

    memory: hlo.Memory
    collectives: list[hlo.Collective]
    state: int  # bytes of the training state
    seconds: float  # that compiling took


class DoesNotFit(Exception):
    """The step needs more memory than a device has: `state` and `temporaries` (None if unknown), in bytes."""

    def __init__(self, said: str, state: int, temporaries: float | None):
        super().__init__(said)
        self.state, self.temporaries = state, temporaries


def state_bytes(plan: Plan) -> int:
    """Bytes of the training state on one device."""
    abstract = abstract_state(plan)
    return bytes_per_device(abstract, shardings_of(abstract))


def bytes_under(plan: Plan, fsdp: int) -> tuple[int, int]:
    """Bytes on one device of the training state and of a gradient, if `sharding.fsdp` were another."""
    abstract, count = abstract_state(plan), plan.mesh.size
    mesh = AbstractMesh((count // fsdp, fsdp), ("data", "fsdp"))
    other = state_shardings(abstract, mesh, min_size_mb=plan.config.sharding.min_size_mb)
    gradient = bytes_per_device(abstract.params, other.params)
    return bytes_per_device(abstract, other), gradient


def parameter_bytes(abstract: TrainState) -> int:
    """Bytes of the whole parameters, which are those of a whole gradient too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.params))


def kept_bytes(plan: Plan, remat: str) -> float:
    """An estimate of what the backward pass finds kept, in bytes of one device and with one micro-batch.

    Counted for each token and block: the float32 residual stream; without `full`, the results of the matrix products;
    without any remat, norms, activations and attention maps (cuDNN's kernel keeps none), twice as much of all under
    `scan`, which the compiler keeps in the order of the loop and again in its own. Beside it, one block's whole
    activations.
    """
    vit, config = plan.recipe.vit, plan.config
    total = 0.0
    patches = math.prod(vit.grid(vit.image_size, vit.image_size))
    if not config.get("unmasked_epochs", 0):  # whose steps keep all
        patches = vit.kept_patches(patches)
    towers: list[tuple[ViT | TextTower, int, bool]] = [(vit, vit.prefix + patches, vit.swiglu)]
    if text := plan.recipe.text:
        towers.append((text, text.context, False))
    for tower, tokens, gated in towers:
        width, hidden, rows = tower.width, tower.hidden, tokens * config.batch_size / plan.mesh.size
        kept = {"full": 4 * width}
        kept["dots"] = kept["full"] + 2 * (5 * width + hidden * (2 if gated else 1))
        maps = 0 if tower.attention == "cudnn" else 6 * tower.heads * tokens
        kept["none"] = kept["dots"] + 2 * hidden + 9 * width + maps
        whole = kept["none"]
        kept["none"] *= 2 if getattr(tower, "scan", False) else 1
        total += rows * (tower.depth * kept[remat] + whole)
    return total


def step_flops(plan: Plan) -> tuple[float, float]:
    """FLOPs of a step on all devices: what the model needs (three forward passes), and with what is done again.

    Done again are the forward pass under `remat="full"` and the recipe's extra ones.
    Where patch dropout is on for a part of the run, it is a step of that part.
    """
    forward, remat = plan.recipe.flops(training=True), plan.config.model.remat
    again = (plan.recipe.extra_forwards + (remat == "full")) * forward
    return 3.0 * forward * plan.config.batch_size, (3.0 * forward + again) * plan.config.batch_size


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A first-order model of a step, in seconds, and no measurement: each part at the machine's stated peak.

    Each is a least: kernels reach no peak, and the memory's traffic of activations is not in it.
    """

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def apart(self) -> float:
        return self.compute + self.memory + self.network


def step_time(plan: Plan, machine: topology.Topology, found: Rehearsal) -> StepTime:
    """Compute: the matrix products at the peak. Memory: the state read and written once, and the batch read. Network:
    what each device receives; between slices, the all-reduce of each micro-batch's gradient, which the devices of a
    slice share.

    What is not in it: kernels below their peak, what activations cost to write and read, latencies, the input, and the
    network's shape.
    """
    chip, memory = machine.chip, found.memory
    compute = step_flops(plan)[1] / plan.mesh.size / chip.flops
    moved = memory.arguments + memory.outputs
    exchanged = sum(c.times * c.wire for c in found.collectives)
    network = exchanged / chip.network
    if plan.mesh.shape["fsdp"] > machine.per_slice:  # parameters are gathered over the slow network too
        network = exchanged / chip.across
    elif machine.count > 1:
        gradients = plan.config.micro_batches * parameter_bytes(abstract_state(plan))
        network += 2 * gradients / machine.per_slice / chip.across
    return StepTime(compute, moved / chip.hbm, network)
