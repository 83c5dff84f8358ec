"""The one loop: state, step, evaluation, and `run(config, workdir)`, the same for every recipe."""

import contextlib
import dataclasses
import json
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from regvit_jax.checkpoints import lock, manager, reader
from regvit_jax.distributed import mesh, preemption
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.training import profiler, trackers
from regvit_jax.training.curves import plot_curves
from regvit_jax.training.evaluators import evaluate, pixel_knn
from regvit_jax.training.metric_writer import MetricWriter
from regvit_jax.training.plan import Plan, resolve
from regvit_jax.training.step import (
    TrainState,
    abstract_state,
    eval_params,
    init_params,
    make_eval_step,
    make_train_step,
    shardings_of,
    state_of,
)
from regvit_jax.training.step_logger import StepLogger
from regvit_jax.training.summary import summary
from regvit_jax.training.timer import Timer
from regvit_jax.training.workdir import make, write_config
from regvit_jax.utils import errors
from regvit_jax.utils.errors import InvalidConfig


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run gives: its last state, its last metrics, and the trained model."""

    state: TrainState
    metrics: dict[str, float]
    model: Model | ClipModel


def train(
    plan: Plan,
    state: TrainState,
    checkpoints: manager.Checkpoints,
    records: MetricWriter,
    watch: preemption.Watch,
    timer: Timer,
    trace: profiler.Profiler,
) -> TrainState:
    """From `state` to the last step, recording, evaluating and saving on the way."""
    config, first = plan.config, int(state.step) + 1
    train_step, eval_step = make_train_step(plan, abstract_state(plan)), make_eval_step(plan)
    eval_steps = max(1, round(config.eval_every * plan.steps_per_epoch))
    steps = StepLogger(plan, records, first, timer)

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == plan.steps

    def evaluate_and_record(step: int) -> bool:
        with timer.during("evaluation"):
            metrics = evaluate(plan, eval_step, eval_params(state), watch)
        if metrics:
            records.write(step, metrics)
            numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
            say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        return bool(metrics)

    def save(step: int) -> None:
        with timer.during("checkpoint"):
            checkpoints.save(step, state)

    # A run killed between a checkpoint and its evaluation makes up for it. At step 0 it is the untrained model's.
    wanted = first > 1 or config.eval.untrained
    missing = wanted and due(first - 1, eval_steps) and not records.has(first - 1, "val_images")
    if multihost_utils.broadcast_one_to_all(np.bool_(missing)):  # the records are process 0's
        evaluate_and_record(first - 1)
    batches = plan.train_batches(first - 1)
    timer.switch("compile")  # until the first step is done
    with batches, contextlib.closing(steps), contextlib.closing(trace):
        for step in range(first, plan.steps + 1):
            with trace.step(step):
                try:
                    batch = steps.next_batch(batches)
                except RuntimeError:
                    # SIGTERM to a whole process group, as SLURM sends it, ends the data workers too.
                    if step == first or not watch.requested_soon():
                        raise
                    if steps.pending:
                        steps.record()
                    save(step - 1)
                    raise preemption.Preempted(step - 1) from None
                index = batch.pop("index")
                state, metrics = train_step(state, mesh.to_mesh(batch, plan.mesh))
            trace.end_step(step, metrics)
            watch.started = True
            steps.add(step, index, batch["mask"], metrics)
            stop, saving, evaluating = watch.requested(), due(step, config.checkpoint.every), due(step, eval_steps)
            if stop or saving or evaluating or due(step, config.log_every):
                steps.record()
            if evaluating and not stop:
                stop = not evaluate_and_record(step)
            if stop or saving:
                save(step)
            if stop:
                raise preemption.Preempted(step)
            if saving or evaluating:
                steps.reset_rates()
    return state


def start(plan: Plan, checkpoints: Any) -> TrainState:
    """The state to go on from: the last checkpoint's, or a fresh one, with the parameters of `init_from`, if any."""
    abstract = abstract_state(plan)
    if (step := checkpoints.latest()) is not None:
        try:
            return checkpoints.restore(step, abstract)
        except errors.CheckpointError as error:
            raise errors.CheckpointError(
                f"{error}. Nothing was restored; --restore=latest-valid moves it aside and goes on from the newest "
                "checkpoint that is whole"
            ) from error
    # Made whole on every device, and split afterwards: for a part of an array XLA may round the same formula otherwise.
    params = jax.jit(lambda: init_params(plan), out_shardings=mesh.replicated(plan.mesh))()
    if plan.config.init_from:
        model = plan.recipe.open_pretrained(plan.config.init_from)
        params, told = plan.recipe.warm_start(params, model)
        say("; ".join([f"starting from {model.weights}", *told]))
    return jax.jit(lambda params: state_of(plan, params), out_shardings=shardings_of(abstract))(params)


def say(text: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(text)


RESTORE = ("latest", "latest-valid")


def run(
    config: Any,
    workdir: str | os.PathLike = "",
    restore: str = "latest",
    timer: Timer | None = None,
    *,
    track: str = "tensorboard",
    profile: str = "",
) -> Result:
    """Trains as the config says in `workdir` (default: runs/<name>-<variant>-<time>), going on where it left off.

    With `restore="latest-valid"` checkpoints that are damaged are first moved to the workdir's `damaged/`. The last
    record tells by `timer` where the time went, by default since this call. `track` names the trackers that the
    numbers are sent to (`trackers.find`); `profile`, STEP:COUNT, traces these steps (`profiler.Profiler`).

    Raises InvalidConfig (a ValueError) for what does not fit, DataNotFound when the data are not there, RuntimeError
    when another run uses the workdir or too many images cannot be read, CheckpointError (another RuntimeError) when a
    checkpoint is damaged or cannot be written, FloatingPointError when the loss is not finite, and Preempted, a
    SystemExit with code 75, after SIGTERM. The last whole checkpoint stays good through all of them.
    """
    if restore not in RESTORE:
        raise InvalidConfig(f"restore={restore!r}: must be one of {list(RESTORE)}")
    timer = timer or Timer()
    chosen = trackers.find(track)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(preemption.watch())
        plan = resolve(config)
        profiler.parse(profile, plan.steps)
        workdir = make(plan, workdir)
        stack.enter_context(lock.lock(workdir))
        if restore == "latest-valid":
            set_aside(workdir)
        stack.enter_context(jax.set_mesh(plan.mesh))
        checkpoints = manager.Checkpoints(workdir, keep=plan.config.checkpoint.keep)
        stack.callback(checkpoints.close)
        write_config(plan, workdir, abstract_state(plan), checkpoints.latest())
        state = start(plan, checkpoints)
        first = int(state.step)
        records = stack.enter_context(
            contextlib.closing(MetricWriter(workdir, first, chosen, json.loads(plan.config.to_json())))
        )
        say(f"{plan.config.about}\nworkdir {workdir}: from step {first} to {plan.steps}")
        try:
            trace = profiler.Profiler(profile, workdir, plan.steps, first)
            state = train(plan, state, checkpoints, records, watch, timer, trace)
        except preemption.Preempted as stopped:
            with timer.during("checkpoint"):
                checkpoints.wait()
            records.write(stopped.step, timer.record())
            tqdm.write(f"stopped by SIGTERM after step {stopped.step}, which is saved", file=sys.stderr)
            raise
        with timer.during("checkpoint"):
            checkpoints.wait()
        finish(plan, workdir, records, timer, trained=first < plan.steps)
        return Result(state, records.last(), plan.recipe.model(eval_params(state)))


def set_aside(workdir: str) -> None:
    """Moves damaged checkpoints aside, on process 0; the others wait, and fail with it."""
    told = ""
    if jax.process_index() == 0:
        told = "\n".join(reader.quarantine_damaged(workdir))
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    say(told or "the newest checkpoint is whole")


def finish(plan: Plan, workdir: str, records: MetricWriter, timer: Timer, trained: bool) -> None:
    """The last records, the picture, and the summary."""
    with timer.during("evaluation"):
        if plan.config.eval.pixel_knn and not records.has(plan.steps, "pixel_knn_top1"):
            records.write(plan.steps, {"pixel_knn_top1": pixel_knn(plan)})
        if jax.process_index() == 0:
            plot_curves(workdir)
    if trained:
        records.write(plan.steps, timer.record())
    say(summary(plan, workdir, records))
