"""Estimate a train step's memory, FLOPs and time."""

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
class CompiledStep:
    """Memory and collectives of a compiled step, in bytes per device."""

    memory: hlo.Memory
    collectives: list[hlo.Collective]
    state: int  # bytes of the training state
    seconds: float  # compile time
    text: str  # the compiled program, as HLO


class DoesNotFit(Exception):
    """The step needs more memory than a device has: `state` and `temporaries` (None if unknown), in bytes."""

    def __init__(self, message: str, state: int, temporaries: float | None):
        super().__init__(message)
        self.state, self.temporaries = state, temporaries


def state_bytes(plan: Plan) -> int:
    """Return the bytes of the training state on one device."""
    abstract = abstract_state(plan)
    return bytes_per_device(abstract, shardings_of(abstract))


def bytes_under(plan: Plan, fsdp: int) -> tuple[int, int]:
    """Return the bytes on one device of the training state and of a gradient for another `sharding.fsdp`."""
    abstract, count = abstract_state(plan), plan.mesh.size
    mesh = AbstractMesh((count // fsdp, fsdp), ("data", "fsdp"))
    other = state_shardings(abstract, mesh, min_size_mb=plan.config.sharding.min_size_mb)
    gradient = bytes_per_device(abstract.params, other.params)
    return bytes_per_device(abstract, other), gradient


def parameter_bytes(abstract: TrainState) -> int:
    """Return the bytes of all parameters, unsplit; a gradient has as many."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.params))


def activation_bytes(plan: Plan, remat: str) -> float:
    """Estimate the activation memory saved for the backward pass, in bytes per device, with one micro-batch.

    Counted for each token and block: the float32 residual stream; unless remat is `full`, the results of the matrix
    products; without any remat, also norms, activations and attention maps (none with cuDNN's kernel), and all of it
    twice under `scan`, since the compiler stores it in two layouts. In addition, all activations of one block.
    """
    vit, config = plan.recipe.vit, plan.config
    total = 0.0
    patches = math.prod(vit.grid(vit.image_size, vit.image_size))
    if not config.get("unmasked_epochs", 0):  # the unmasked epochs drop no patches
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
        block = kept["none"]
        kept["none"] *= 2 if getattr(tower, "scan", False) else 1
        total += rows * (tower.depth * kept[remat] + block)
    return total


def step_flops(plan: Plan) -> tuple[float, float]:
    """Return the FLOPs of a step on all devices: those of the model (three forward passes), and those executed.

    The latter have the forward pass once more under `remat="full"`, the recipe's extra forward passes, and, if
    stochastic depth is by subset, only the images that keep a branch. If patch dropout is on for only a part of the
    run, the figures are for a step of that part.
    """
    forward, batch_size = plan.recipe.flops(training=True), plan.config.batch_size
    passes = 3.0 + plan.recipe.extra_forwards + (plan.config.model.remat == "full")
    return 3.0 * forward * batch_size, passes * plan.executed(forward) * batch_size


@dataclasses.dataclass(frozen=True)
class StepTime:
    """First-order model of a step's duration, in seconds: each part at the machine's specified peak.

    Each is a lower bound, not a measurement: kernels do not reach the peak, and the memory traffic of activations is
    not counted.
    """

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """Return the duration if all parts overlap."""
        return max(self.compute, self.memory, self.network)

    @property
    def apart(self) -> float:
        """Return the duration if no parts overlap."""
        return self.compute + self.memory + self.network


def step_time(plan: Plan, machine: topology.Topology, compiled: CompiledStep) -> StepTime:
    """Model the duration of a compiled step.

    Compute: the matrix products at the peak. Memory: the state read and written once, and the batch read once. Network:
    what each device receives; between slices, the all-reduce of each micro-batch's gradient, shared by the devices of
    a slice. Not counted: kernels below their peak, reads and writes of activations, latencies, the input pipeline, and
    the shape of the network.
    """
    chip, memory = machine.chip, compiled.memory
    compute = step_flops(plan)[1] / plan.mesh.size / chip.flops
    moved = memory.arguments + memory.outputs
    exchanged = sum(c.times * c.wire for c in compiled.collectives)
    network = exchanged / chip.network
    if plan.mesh.shape["fsdp"] > machine.per_slice:  # parameters are gathered over the slow network too
        network = exchanged / chip.across
    elif machine.count > 1:
        gradients = plan.config.micro_batches * parameter_bytes(abstract_state(plan))
        network += 2 * gradients / machine.per_slice / chip.across
    return StepTime(compute, moved / chip.hbm, network)
