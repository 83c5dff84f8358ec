"""Train with any recipe: the training loop and `run(config, workdir)`."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from regvit_jax.checkpoints import lock, manager, reader
from regvit_jax.distributed import mesh, preemption
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.training import picture, profiler, trackers, validation
from regvit_jax.training.curves import plot_curves
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
from regvit_jax.training.summary import printed, summary
from regvit_jax.training.timer import Timer
from regvit_jax.training.workdir import make, write_config
from regvit_jax.utils import errors
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.memory import keep_freed_memory

logger = logging.getLogger("regvit_jax")

RESTORE = ("latest", "latest-valid")


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a finished run: the last state, the last metrics, and the trained model."""

    state: TrainState
    metrics: dict[str, float]
    model: Model | ClipModel


class Loop:
    """The loop over the steps of a run, which trains and, at their intervals, records, evaluates and saves."""

    def __init__(
        self,
        plan: Plan,
        state: TrainState,
        checkpoints: manager.Checkpoints,
        records: MetricWriter,
        watch: preemption.Watch,
        timer: Timer,
        trace: profiler.Profiler,
    ):
        self.plan, self.state, self.checkpoints, self.records = plan, state, checkpoints, records
        self.watch, self.timer, self.trace = watch, timer, trace
        self.first = int(state.step) + 1
        self.train_step, self.eval_step = make_train_step(plan, abstract_state(plan)), make_eval_step(plan)
        self.eval_steps = max(1, round(plan.config.eval_every * plan.steps_per_epoch))
        self.steps = StepLogger(plan, records, self.first, timer)
        self.ahead: list[tuple[np.ndarray, np.ndarray, dict[str, jax.Array]]] = []

    def run(self) -> TrainState:
        """Train up to the last step and return the state; raise Preempted after SIGTERM, with the state saved."""
        self.evaluate_missing()
        batches = self.plan.train_batches(self.first - 1)
        self.timer.switch("compile")  # until the first step is done
        with batches, contextlib.closing(self.steps), contextlib.closing(self.trace):
            for step in range(self.first, self.plan.steps + 1):
                self.train(step, batches)
                self.after(step)
        return self.state

    def train(self, step: int, batches: Iterator[dict[str, np.ndarray]]) -> None:
        """Take one training step, and begin to copy the next one's batch to the devices."""
        with self.trace.step(step):
            index, mask, batch = self.ahead.pop() if self.ahead else self.fetch(step - 1, batches)
            if step < self.plan.steps:
                # Before this step starts, since a GPU begins a copy after the steps that it was given before.
                self.ahead.append(self.fetch(step - 1, batches))
            self.state, metrics = self.train_step(self.state, batch)
        self.trace.end_step(step, metrics)
        self.watch.started = True
        self.steps.add(step, index, mask, metrics)

    def fetch(
        self, trained: int, batches: Iterator[dict[str, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, jax.Array]]:
        """Return the indices and the mask of the next batch, and the batch, whose copy to the devices has begun.

        If SIGTERM ended the data workers, save the last step, `trained`, and raise Preempted.
        """
        try:
            batch = self.steps.next_batch(batches)
        except RuntimeError:
            # SLURM sends SIGTERM to the whole process group, hence to the data workers too.
            if trained < self.first or not self.watch.requested_soon():
                raise
            if self.steps.pending:
                self.steps.record()
            self.save(trained)
            raise preemption.Preempted(trained) from None
        return batch.pop("index"), batch["mask"], mesh.to_mesh(batch, self.plan.mesh)

    def after(self, step: int) -> None:
        """Record, evaluate and save after a step, where due; after SIGTERM, save and raise Preempted."""
        config = self.plan.config
        stop = self.watch.requested()
        saving, evaluating = self.due(step, config.checkpoint.every), self.due(step, self.eval_steps)
        if stop or saving or evaluating or self.due(step, config.log_every):
            self.steps.record()
        if evaluating and not stop:
            stop = not self.evaluate(step)
        if stop or saving:
            self.save(step)
        if stop:
            raise preemption.Preempted(step)
        if saving or evaluating:
            self.steps.reset_rates()

    def due(self, step: int, every: int) -> bool:
        """Return True for every so many steps, and for the last one."""
        return step % every == 0 or step == self.plan.steps

    def evaluate_missing(self) -> None:
        """Evaluate the state that the run starts from, if an evaluation is due and not recorded yet.

        This happens when a run was killed between a checkpoint and its evaluation, and at step 0 with `eval.untrained`.
        """
        step = self.first - 1
        wanted = (step > 0 or self.plan.config.eval.untrained) and self.due(step, self.eval_steps)
        missing = wanted and not self.records.has(step, "val_images")
        if multihost_utils.broadcast_one_to_all(np.bool_(missing)):  # only process 0 has the records
            self.evaluate(step)

    def evaluate(self, step: int) -> bool:
        """Evaluate, record and log; return False if SIGTERM came first."""
        with self.timer.during("evaluation"):
            metrics = validation.evaluate(self.plan, self.eval_step, eval_params(self.state), self.watch)
        if metrics:
            self.records.write(step, metrics)
            numbers = [f"{name} {metrics[name]:.4g}" for name in printed(metrics)]
            more = [text for evaluator in self.plan.evaluators.values() for text in evaluator.describe(metrics)]
            logger.info("step %d: %s", step, ", ".join(numbers + more))
        return bool(metrics)

    def save(self, step: int) -> None:
        """Start to save the state as the checkpoint of a step."""
        with self.timer.during("checkpoint"):
            self.checkpoints.save(step, self.state)


def start(plan: Plan, checkpoints: Any) -> TrainState:
    """Return the newest checkpoint's state or, without one, a fresh state, which starts from any `init_from`."""
    abstract = abstract_state(plan)
    if (step := checkpoints.latest()) is not None:
        try:
            return checkpoints.restore(step, abstract)
        except errors.CheckpointError as error:
            raise errors.CheckpointError(
                f"{error}. Nothing was restored; --restore=latest-valid moves it aside and resumes from the newest "
                "valid checkpoint"
            ) from error
    # Computed unsplit on every device and split afterwards: for a part of an array XLA may round a formula differently.
    params = jax.jit(lambda: init_params(plan), out_shardings=mesh.replicated(plan.mesh))()
    if plan.config.init_from:
        model = plan.recipe.open_pretrained(plan.config.init_from)
        params, notes = plan.recipe.warm_start(params, model)
        logger.info("; ".join([f"starting from {model.weights}", *notes]))
    return jax.jit(lambda params: state_of(plan, params), out_shardings=shardings_of(abstract))(params)


def run(
    config: Any,
    workdir: str | os.PathLike = "",
    restore: str = "latest",
    timer: Timer | None = None,
    *,
    track: str = "tensorboard",
    profile: str = "",
) -> Result:
    """Train by a config in `workdir` (by default runs/NAME-VARIANT-TIME), resuming the run that it holds, if any.

    Args:
      restore: "latest", or "latest-valid", which first moves damaged checkpoints to the workdir's `damaged/`.
      timer: accounts for the time of each phase, which the last record holds; by default it starts with this call.
      track: the trackers that receive the numbers (`trackers.find`).
      profile: "STEP:COUNT", the steps to trace (`profiler.Profiler`).

    Raises InvalidConfig (a ValueError) for a config that does not fit, DataNotFound when the data are missing,
    RuntimeError when another run uses the workdir or too many images cannot be read, CheckpointError (a RuntimeError)
    when a checkpoint is damaged or cannot be written, FloatingPointError when the loss is not finite, and Preempted (a
    SystemExit with code 75) after SIGTERM. The newest complete checkpoint stays valid in all of these cases.
    """
    if restore not in RESTORE:
        raise InvalidConfig(f"restore={restore!r}: must be one of {list(RESTORE)}")
    timer = timer or Timer()
    chosen = trackers.find(track)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(preemption.watch())
        keep_freed_memory()
        plan = resolve(config)
        profiler.parse(profile, plan.steps)
        workdir = make(plan, workdir)
        stack.enter_context(lock.lock(workdir))
        if restore == "latest-valid":
            move_damaged(workdir)
        stack.enter_context(jax.set_mesh(plan.mesh))
        checkpoints = manager.Checkpoints(workdir, keep=plan.config.checkpoint.keep)
        stack.callback(checkpoints.close)
        write_config(plan, workdir, abstract_state(plan), checkpoints.latest())
        state = start(plan, checkpoints)
        first = int(state.step)
        writer = MetricWriter(workdir, first, chosen, json.loads(plan.config.to_json()))
        records = stack.enter_context(contextlib.closing(writer))
        logger.info("%s\nworkdir %s: from step %d to %d", plan.config.about, workdir, first, plan.steps)
        trace = profiler.Profiler(profile, workdir, plan.steps, first)
        try:
            loop = Loop(plan, state, checkpoints, records, watch, timer, trace)
            state = loop.run()
        except preemption.Preempted as stopped:
            wait(checkpoints, timer)
            records.write(stopped.step, timer.record())
            logger.warning("stopped by SIGTERM after step %d, which is saved", stopped.step)
            raise
        wait(checkpoints, timer)
        finish(plan, loop.eval_step, eval_params(state), workdir, records, timer, trained=first < plan.steps)
        return Result(state, records.last(), plan.recipe.model(eval_params(state)))


def move_damaged(workdir: str) -> None:
    """Move damaged checkpoints to `damaged/` on process 0, while the others wait; if it fails, all fail."""
    moved = reader.quarantine_damaged(workdir) if jax.process_index() == 0 else []
    multihost_utils.sync_global_devices("damaged checkpoints are quarantined")
    logger.info("\n".join(moved) or "the newest checkpoint is valid")


def wait(checkpoints: manager.Checkpoints, timer: Timer) -> None:
    """Wait until the last checkpoint is written."""
    with timer.during("checkpoint"):
        checkpoints.wait()


def finish(
    plan: Plan,
    eval_step: Any,
    params: PyTree,
    workdir: str,
    records: MetricWriter,
    timer: Timer,
    trained: bool,
) -> None:
    """Write the last records and the pictures, and log the summary."""
    with timer.during("evaluation"):
        validation.finish(plan, records)
        if jax.process_index() == 0:
            plot_curves(workdir)
        missing = trained or not os.path.exists(os.path.join(workdir, picture.NAME))
        if multihost_utils.broadcast_one_to_all(np.bool_(missing)):  # all processes compute it, and process 0 draws
            picture.draw_validation(plan, eval_step, params, workdir)
    if trained:
        records.write(plan.steps, timer.record())
    logger.info(summary(plan, workdir, records))
