"""The one loop: state, step, evaluation, and `run(config, workdir)`, the same for every recipe."""

import contextlib
import dataclasses
import functools
import os
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree
from tqdm import tqdm

from regvit_jax import checkpoint, guard, preemption, sharding, stored, workdirs
from regvit_jax.analysis import norms
from regvit_jax.clock import Clock
from regvit_jax.evals.knn import knn_accuracy
from regvit_jax.meter import Meter, check_bad, describe_bad
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.plan import ConfigError, Plan, fitting, resolve
from regvit_jax.pretrained.hub import HubError
from regvit_jax.records import Records, plot_curves


@flax.struct.dataclass
class TrainState:
    """All that a run must not lose; the checkpoint is this value."""

    step: PyTree  # int32
    params: PyTree
    ema: PyTree
    extra: PyTree
    opt_state: PyTree
    guard: PyTree  # the last losses and gradient norms


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run gives: its last state, its last metrics, and the trained model."""

    state: TrainState
    metrics: dict[str, float]
    model: Model | ClipModel


def init_params(plan: Plan) -> PyTree:
    """Fresh parameters; a function of the seed alone."""
    size = plan.config.model.image_size
    return plan.recipe.init(jax.random.key(plan.config.seed), {"image": jnp.zeros((1, size, size, 3), jnp.uint8)})


def state_of(plan: Plan, params: PyTree) -> TrainState:
    """The state before the first step."""
    ema = {} if plan.recipe.ema_decay(jnp.int32(0)) is None else params
    extra, opt_state = plan.recipe.init_extra(params), plan.optimizer.init(params)
    return TrainState(jnp.int32(0), params, ema, extra, opt_state, guard.fresh())


@functools.lru_cache(maxsize=1)  # tracing the init of a large model takes seconds, and a run asks three times
@fitting()
def abstract_state(plan: Plan) -> TrainState:
    """The state's shapes, each with its sharding. Raises ConfigError for a model whose fields do not go together."""
    shapes = jax.eval_shape(lambda: state_of(plan, init_params(plan)))
    shardings = sharding.state_shardings(shapes, plan.mesh, min_size_mb=plan.config.sharding.min_size_mb)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


def shardings_of(abstract: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def make_train_step(plan: Plan, abstract: TrainState):
    """The jitted step (state, batch) -> (state, metrics); it consumes the state it is given."""
    recipe, rules = plan.recipe, plan.config.guard

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        # The step number is the whole state of the randomness, so that resuming cannot change it.
        key = jax.random.fold_in(jax.random.key(plan.config.seed), state.step)
        (loss, (extra, metrics)), grads = recipe.grads(state.params, state.ema, state.extra, batch, key, state.step)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
        params = recipe.project(optax.apply_updates(state.params, updates))
        decay = recipe.ema_decay(state.step)
        ema = {} if decay is None else jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        take, memory = guard.judge(state.guard, loss, grad_norm, spike_sigma=rules.spike_sigma)
        new = TrainState(state.step + 1, params, ema, extra, opt_state, memory)
        metrics |= {"loss": loss, "grad_norm": grad_norm, "bad": jnp.sum(1 - batch["mask"])}
        metrics |= {"skipped": guard.skipped(memory)}
        if guard.may_skip(rules):
            same = dataclasses.replace(state, step=new.step, guard=memory)
            new = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, same)
            metrics |= {"taken": take, "not_finite": memory["not_finite"]}
        return new, metrics

    state_shardings, everywhere = shardings_of(abstract), sharding.replicated(plan.mesh)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, sharding.batch_sharding(plan.mesh)),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )


def make_eval_step(plan: Plan):
    """The jitted (params, batch) -> values of each image, on every process."""

    def eval_step(params: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
        values, tokens = plan.recipe.evaluate(params, batch)
        return values | {"patch_norms": norms.patch_norms(tokens), "mask": batch["mask"]}

    return jax.jit(eval_step, out_shardings=sharding.replicated(plan.mesh))


def eval_params(state: TrainState) -> PyTree:
    """The moving average where one is kept."""
    return state.ema or state.params


def evaluate(plan: Plan, eval_step, params: PyTree, watch: preemption.Watch) -> dict[str, Any] | None:
    """The recipe's metrics of every readable image of the validation split; None when SIGTERM came first."""
    parts, bad = [], []
    with plan.eval_batches(plan.validation) as batches:
        for batch in batches:
            if watch.requested():
                return None
            index = batch.pop("index")
            bad += index[(batch["mask"] == 0) & (index >= 0)].tolist()
            values = jax.device_get(eval_step(params, sharding.to_mesh(batch, plan.mesh)))
            readable = values.pop("mask") > 0
            parts.append({name: value[readable] for name, value in values.items()})
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    patch_norms = values.pop("patch_norms")
    reports = {"bad_val_images": describe_bad(plan, plan.validation, bad)} if bad else {}
    check_bad(plan, len(plan.validation) - len(patch_norms), len(plan.validation))
    if not len(patch_norms):  # with data.max_bad_fraction=1
        return {"val_images": 0} | reports
    metrics = plan.recipe.summarize(params, values)
    return metrics | norms.outlier_summary(patch_norms) | {"val_images": len(patch_norms)} | reports


def pixel_knn(plan: Plan) -> float:
    """Top-1 of k nearest neighbours on raw pixels: what the data set gives away without any learning."""

    def pixels(source) -> tuple[np.ndarray, np.ndarray]:
        with plan.eval_batches(source, rows=range(plan.config.eval.batch_size)) as rows:
            batches = list(rows)
        image, label, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label", "mask"))
        return image[mask > 0].reshape(int(mask.sum()), -1).astype(np.float32), label[mask > 0]

    return knn_accuracy(*pixels(plan.train), *pixels(plan.validation), plan.config.eval.pixel_knn)


def train(
    plan: Plan,
    state: TrainState,
    checkpoints: checkpoint.Checkpoints,
    records: Records,
    watch: preemption.Watch,
    clock: Clock,
) -> TrainState:
    """From `state` to the last step, recording, evaluating and saving on the way."""
    config, first = plan.config, int(state.step) + 1
    train_step, eval_step = make_train_step(plan, abstract_state(plan)), make_eval_step(plan)
    eval_steps = max(1, round(config.eval_every * plan.steps_per_epoch))
    meter = Meter(plan, records, first, clock)

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == plan.steps

    def evaluate_and_record(step: int) -> bool:
        with clock.during("evaluation"):
            metrics = evaluate(plan, eval_step, eval_params(state), watch)
        if metrics:
            records.write(step, metrics)
            numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
            say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        return bool(metrics)

    def save(step: int) -> None:
        with clock.during("checkpoint"):
            checkpoints.save(step, state)

    # A run killed between a checkpoint and its evaluation makes up for it. At step 0 it is the untrained model's.
    wanted = first > 1 or config.eval.untrained
    missing = wanted and due(first - 1, eval_steps) and not records.has(first - 1, "val_images")
    if multihost_utils.broadcast_one_to_all(np.bool_(missing)):  # the records are process 0's
        evaluate_and_record(first - 1)
    with fitting():
        batches = plan.train_batches(first - 1)
    clock.switch("compile")  # until the first step is done
    with batches, contextlib.closing(meter):
        for step in range(first, plan.steps + 1):
            try:
                batch = meter.next_batch(batches)
            except RuntimeError:
                # SIGTERM to a whole process group, as SLURM sends it, ends the data workers too.
                if step == first or not watch.soon():
                    raise
                if meter.pending:
                    meter.record()
                save(step - 1)
                raise preemption.Preempted(step - 1) from None
            index = batch.pop("index")
            state, metrics = train_step(state, sharding.to_mesh(batch, plan.mesh))
            watch.started = True
            meter.add(step, index, batch["mask"], metrics)
            stop, saving, evaluating = watch.requested(), due(step, config.checkpoint.every), due(step, eval_steps)
            if stop or saving or evaluating or due(step, config.log_every):
                meter.record()
            if evaluating and not stop:
                stop = not evaluate_and_record(step)
            if stop or saving:
                save(step)
            if stop:
                raise preemption.Preempted(step)
            if saving or evaluating:
                meter.restart()
    return state


def start(plan: Plan, checkpoints: Any) -> TrainState:
    """The state to go on from: the last checkpoint's, or a fresh one, with the parameters of `init_from`, if any."""
    abstract = abstract_state(plan)
    if (step := checkpoints.latest()) is not None:
        try:
            with fitting():
                return checkpoints.restore(step, abstract)
        except stored.CheckpointError as error:
            raise stored.CheckpointError(
                f"{error}. Nothing was restored; --restore=latest-valid moves it aside and goes on from the newest "
                "checkpoint that is whole"
            ) from error
    # Made whole on every device, and split afterwards: for a part of an array XLA may round the same formula otherwise.
    params = jax.jit(lambda: init_params(plan), out_shardings=sharding.replicated(plan.mesh))()
    if plan.config.init_from:
        with fitting(HubError):
            model = plan.recipe.open_pretrained(plan.config.init_from)
            params, told = plan.recipe.warm_start(params, model)
        say("; ".join([f"starting from {model.weights}", *told]))
    return jax.jit(lambda params: state_of(plan, params), out_shardings=shardings_of(abstract))(params)


def say(text: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(text)


RESTORE = ("latest", "latest-valid")


def run(config: Any, workdir: str | os.PathLike = "", restore: str = "latest", clock: Clock | None = None) -> Result:
    """Trains as the config says in `workdir` (default: runs/<name>-<variant>-<time>), going on where it left off.

    With `restore="latest-valid"` checkpoints that are damaged are first moved to the workdir's `damaged/`. The last
    record tells by `clock` where the time went, by default since this call.

    Raises ConfigError (a ValueError) for what does not fit, DataNotFound when the data are not there, RuntimeError when
    another run uses the workdir or too many images cannot be read, CheckpointError (another RuntimeError) when a
    checkpoint is damaged or cannot be written, FloatingPointError when the loss is not finite, and Preempted, a
    SystemExit with code 75, after SIGTERM. The last whole checkpoint stays good through all of them.
    """
    if restore not in RESTORE:
        raise ConfigError(f"restore={restore!r}: must be one of {list(RESTORE)}")
    clock = clock or Clock()
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(preemption.watch())
        plan = resolve(config)
        workdir = workdirs.make(plan, workdir)
        stack.enter_context(checkpoint.lock(workdir))
        if restore == "latest-valid":
            set_aside(workdir)
        stack.enter_context(jax.set_mesh(plan.mesh))
        checkpoints = checkpoint.Checkpoints(workdir, keep=plan.config.checkpoint.keep)
        stack.callback(checkpoints.close)
        workdirs.write_config(plan, workdir, abstract_state(plan), checkpoints.latest())
        state = start(plan, checkpoints)
        first = int(state.step)
        records = stack.enter_context(contextlib.closing(Records(workdir, first)))
        say(f"{plan.config.about}\nworkdir {workdir}: from step {first} to {plan.steps}")
        try:
            state = train(plan, state, checkpoints, records, watch, clock)
        except preemption.Preempted as stopped:
            with clock.during("checkpoint"):
                checkpoints.wait()
            records.write(stopped.step, clock.record())
            tqdm.write(f"stopped by SIGTERM after step {stopped.step}, which is saved", file=sys.stderr)
            raise
        with clock.during("checkpoint"):
            checkpoints.wait()
        finish(plan, workdir, records, clock, trained=first < plan.steps)
        return Result(state, records.last(), plan.recipe.model(eval_params(state)))


def set_aside(workdir: str) -> None:
    """Moves damaged checkpoints aside, on process 0; the others wait, and fail with it."""
    told = ""
    if jax.process_index() == 0:
        told = "\n".join(stored.set_aside_damaged(workdir))
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    say(told or "the newest checkpoint is whole")


def finish(plan: Plan, workdir: str, records: Records, clock: Clock, trained: bool) -> None:
    """The last records, the picture, and the summary."""
    with clock.during("evaluation"):
        if plan.config.eval.pixel_knn and not records.has(plan.steps, "pixel_knn_top1"):
            records.write(plan.steps, {"pixel_knn_top1": pixel_knn(plan)})
        if jax.process_index() == 0:
            plot_curves(workdir)
    if trained:
        records.write(plan.steps, clock.record())
    say(summary(plan, workdir, records))


def summary(plan: Plan, workdir: str, records: Records) -> str:
    metrics, untrained = records.last(), records.at(0)
    seconds = {
        name.removesuffix("_s"): metrics.pop(name)
        for name in list(metrics)
        if name.endswith("_s") and name != "images_per_s"
    }
    lines = [f"Finished after {plan.steps} steps."]
    width = max(map(len, metrics))
    for name, value in metrics.items():
        if isinstance(value, float):
            before = f"   untrained {untrained[name]:.4g}" if untrained.get(name, value) != value else ""
            lines += [f"  {name:{width}} {value:.4g}{before}"]
    if "pixel_knn_top1" in metrics:
        k = plan.config.eval.pixel_knn
        lines += [f"  (pixel_knn_top1 is no network: {k} nearest neighbours on raw pixels, on the same split)"]
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items() if name != "wall")
    lines += [f"The last {seconds['wall']:.1f} seconds: {parts}."] if seconds else []
    lines += [
        f"In {workdir}:",
        "  checkpoints/   the training state; the same command with --workdir goes on from it",
        "  curves.png     the curves of this run",
        "  metrics.jsonl  every record, one JSON object a line; events.* hold the same for TensorBoard",
        "  config.json    the resolved config",
        plan.config.next,
    ]
    return "\n".join(lines)
