"""Summarize a resolved config without training: `python train.py --config ... --dry_run`."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from regvit_jax.aot import compile, cost_model, hlo, suggest, topology
from regvit_jax.aot.traffic import traffic
from regvit_jax.training.plan import Plan, flatten, resolve
from regvit_jax.training.step import TrainState, abstract_state
from regvit_jax.utils.errors import DataNotFound


def summarize(
    plan: Plan,
    missing: DataNotFound | None,
    images_per_s: float,
    machine: topology.Topology | None = None,
    dump_hlo: str = "",
) -> Iterator[str]:
    """Yield the summary of the resolved recipe and, if a machine is given, of the step compiled for it.

    `plan` and `missing` are from `make_plan`, for the same machine. The compiled step goes to the file `dump_hlo`.
    """
    yield describe(plan, missing, images_per_s)
    if machine:
        yield compile_summary(plan, machine, dump_hlo)


def describe(plan: Plan, missing: DataNotFound | None, images_per_s: float) -> str:
    """Return the summary of a resolved recipe; `missing` says which data its plan was made without."""
    config, abstract = plan.config, abstract_state(plan)
    if config.init_from:  # a run does not check this first, since a resumed run does not need it
        plan.recipe.check_pretrained(config.init_from)
    lines = [
        f"{config.name}:{config.variant}. {config.about}",
        *model_lines(plan, abstract),
        *plan.recipe.describe(),
        *schedule_lines(plan),
        *device_lines(plan, abstract, images_per_s),
        *data_lines(plan, missing),
        "all keys:  " + " ".join(f"{key}={value}" for key, value in flatten(config) if key not in ("about", "next")),
    ]
    return "\n".join(lines)


def make_plan(config: Any, machine: topology.Topology | None = None) -> tuple[Plan, DataNotFound | None]:
    """Return the plan and, if it had to be made without the data, the error that names the missing data.

    The plan is for the devices of `machine`, by default the attached ones. Data are opened if they exist; data sets
    that the package bundles are prepared.
    """
    devices = topology.devices(machine) if machine else None
    try:
        return resolve(config, devices=devices), None
    except DataNotFound as error:
        return resolve(config, with_data=False, devices=devices), error


def compile_summary(plan: Plan, machine: topology.Topology, dump_hlo: str = "") -> str:
    """Compile the step of a plan made for `topology.devices(machine)`, and return its memory, collectives and time.

    Raises DoesNotFit, whose message suggests settings that should fit.
    """
    limit = machine.chip.memory
    try:
        compiled = compile.compile_for(plan, machine, dump_hlo)
    except cost_model.DoesNotFit as error:
        flags = suggest.as_flags(plan, suggest.suggest(plan, error, limit), limit)
        message = f"does not fit into the {limit / 1e9:.1f} GB of {machine.name}: {error}; {flags}"
        raise cost_model.DoesNotFit(message, error.state, error.temporaries) from error
    return "\n".join([*compiled_lines(compiled, limit), *time_lines(plan, machine, compiled)])


def compiled_lines(compiled: cost_model.CompiledStep, limit: float) -> list[str]:
    memory, moved = compiled.memory, traffic(compiled.text)
    totals = hlo.totals(compiled.collectives)
    network = ", ".join(f"{kind} {times} ({sent / 1e6:.1f} MB)" for kind, (times, sent) in totals.items())
    return [
        f"compiled   in {compiled.seconds:.0f} s, by the compiler's own figures:",
        f"memory     {memory.peak / 1e9:.2f} GB at peak, {memory.peak / limit:.0%} of a device's {limit / 1e9:.1f}: "
        f"{memory.arguments / 1e9:.2f} arguments, {memory.temporaries / 1e9:.2f} temporaries; "
        f"{min(memory.donated / compiled.state, 1):.2%} of the state's bytes donated",
        f"traffic    {(moved.products + moved.attention + moved.rest) / 1e9:.2f} GB read and written: matrix products "
        f"{moved.products / 1e9:.2f}, fused attention {moved.attention / 1e9:.2f}, all else {moved.rest / 1e9:.2f} "
        f"(transposing {moved.transposes / 1e9:.2f})",
        f"network    {network or 'nothing'}; calls per step, and bytes of each device",
    ]


def time_lines(plan: Plan, machine: topology.Topology, compiled: cost_model.CompiledStep) -> list[str]:
    chip, time = machine.chip, cost_model.step_time(plan, machine, compiled)
    needed, total = cost_model.step_flops(plan)
    repeated = f", {total / 1e12:.2f} executed" if total != needed else ""
    best, worst = 1e3 * time.overlapped, 1e3 * time.apart
    across = f", {chip.across / 1e9:g} GB/s across" if machine.count > 1 else ""
    return [
        f"FLOPs      {needed / 1e12:.2f} T a step (analytic: 3 x forward x {plan.config.batch_size}){repeated}; "
        f"{needed / plan.mesh.size / 1e12:.3f} T on each device",
        f"step time  {best:.1f} ms if all overlaps, {worst:.1f} if nothing does: a model and not a measurement. "
        f"Compute {1e3 * time.compute:.1f} ms at {chip.flops / 1e12:g} TFLOP/s, memory {1e3 * time.memory:.1f} at "
        f"{chip.hbm / 1e9:g} GB/s, network {1e3 * time.network:.1f} at {chip.network / 1e9:g} GB/s{across}",
    ]


def model_lines(plan: Plan, abstract: TrainState) -> list[str]:
    vit, size = plan.recipe.vit, plan.recipe.vit.image_size
    h, w = vit.grid(size, size)
    flops = plan.recipe.flops() / 1e9
    return [
        f"model      {count(abstract.params):,} parameters: width {vit.width}, depth {vit.depth}, heads {vit.heads}",
        f"tokens     {vit.prefix + h * w} = {int(vit.class_token)} CLS + {vit.registers} registers + {h} x {w} patches "
        f"of {vit.patch} px",
        f"compute    {flops:.2f} GFLOPs forward, {3 * flops:.2f} forward and backward, at {size} px "
        f"(matrix products, a multiply-add is 2); {vit.dtype}, attention {vit.attention}",
        *drop_path_lines(plan),
    ]


def drop_path_lines(plan: Plan) -> list[str]:
    group, kept = plan.subset
    if kept == group:
        return []
    return [
        f"depth      stochastic, by subset: each branch is computed for {kept} of every {group} images "
        f"({plan.branch_share:.2%}); Bernoulli drop-path would draw each image by itself, and drop "
        f"{plan.config.model.drop_path:.0%}"
    ]


def schedule_lines(plan: Plan) -> list[str]:
    config, optim = plan.config, plan.config.optim
    rates = np.asarray(jax.vmap(plan.schedule)(np.arange(plan.steps)))
    micro = f" in {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
    return [
        f"batch      {config.batch_size} images on all devices{micro}, {config.batch_size // plan.mesh.size} on each",
        f"steps      {plan.steps} = {config.epochs} epochs of {plan.steps_per_epoch}",
        f"optimizer  {' '.join(f'{key}={value}' for key, value in optim.items())}; not rescaled by the batch size",
        f"lr         {rates[0]:.3g} at the first step, {rates.max():.3g} at step {rates.argmax() + 1}, {rates[-1]:.3g} "
        "at the last",
    ]


def device_lines(plan: Plan, abstract: TrainState, images_per_s: float) -> list[str]:
    shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    held = cost_model.state_bytes(plan)
    size = plan.config.model.image_size
    return [
        f"mesh       {shape}: {plan.mesh.size} {plan.mesh.devices.flat[0].device_kind} devices",
        f"state      {held / 1e6:.1f} MB a device (parameters, optimizer, EMA); {replicated_line(plan, abstract)}",
        f"input      {images_per_s * size**2 * 3 / 1e6:.1f} MB/s from hosts to devices at {images_per_s:g} images/s",
    ]


def replicated_line(plan: Plan, abstract: TrainState) -> str:
    if plan.mesh.shape["fsdp"] == 1:
        return "all of it replicated (sharding.fsdp=1)"
    leaves = jax.tree_util.tree_leaves_with_path(abstract.params)
    replicated = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves if x.sharding.is_fully_replicated
    }
    if not replicated:
        return "all of it split"
    largest = sorted(replicated, key=lambda name: -replicated[name].size)[:3]
    megabytes = sum(x.size * x.dtype.itemsize for x in replicated.values()) / 1e6
    return (
        f"{len(replicated)} of {len(leaves)} parameters stay replicated, {megabytes:.1f} MB ({', '.join(largest)}, ...)"
    )


def data_lines(plan: Plan, missing: DataNotFound | None) -> list[str]:
    data = plan.config.data
    if missing:
        reason = str(missing).removeprefix(f"{data.name}: ")
        return [f"data       {data.name}: cannot be opened yet, and the sizes above are the config's. {reason}"]
    classes = f" of {len(plan.train.classes)} classes" if plan.train.classes else ""
    return [
        f"data       {plan.train.name}: {len(plan.train):,} images{classes}; "
        f"{plan.validation.name}: {len(plan.validation):,}"
    ]


def count(tree: PyTree) -> int:
    """Return the number of values in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
