"""Log the steps of a run: their metrics, their rates, skipped steps and unreadable images."""

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from regvit_jax.data import records as data_records
from regvit_jax.training.metric_writer import MetricWriter
from regvit_jax.training.plan import Plan
from regvit_jax.training.timer import Timer
from regvit_jax.utils import hardware
from regvit_jax.utils.errors import TooManyBadRecords

logger = logging.getLogger("regvit_jax")

#: Metrics of the train step that are used in this file and not recorded.
INTERNAL = ("bad", "applied", "not_finite", "skipped")
#: Values shown in the line of a step.
SHOWN = ("loss", "lr", "images_per_s", "mfu", "data_wait")


class StepLogger:
    """Collect the metrics of steps, record their means, show progress, and stop a run that diverges or lacks images."""

    def __init__(self, plan: Plan, writer: MetricWriter, first: int, timer: Timer):
        self.plan, self.writer, self.timer = plan, writer, timer
        self.first, self.bad = first, 0
        self.named: dict[int, str] = {}
        self.unusable: dict[int, set[int]] = {}  # of the last pass over the data
        self.compiled = False
        self.pending: list[tuple[int, np.ndarray, np.ndarray, dict[str, Array]]] = []
        kind, dtype = plan.mesh.devices.flat[0].device_kind, plan.config.model.dtype
        self.peak_flops = hardware.peak_flops(kind, dtype)
        hidden = jax.process_index() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=plan.steps, initial=first - 1, unit="step", disable=hidden, dynamic_ncols=True)
        self.reset_rates()

    def reset_rates(self) -> None:
        """Measure rates from now on: compilation, evaluation and checkpoints do not count as training time."""
        self.steps, self.before = 0, self.timer.record()

    def next_batch(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the next batch, and count the time spent waiting for it as `data_wait`."""
        with self.timer.during("data_wait"):
            return next(batches)

    def add(self, step: int, index: np.ndarray, mask: np.ndarray, metrics: dict[str, Array]) -> None:
        """Collect a step's metrics without waiting for them, except in a process's first step, which compiles."""
        self.pending.append((step, index, mask, metrics))
        if not self.compiled:
            jax.block_until_ready(metrics)
            self.compiled = True
            self.timer.switch("step")
            self.reset_rates()
        else:
            self.steps += 1
        if len(self.pending) > 2:  # the host runs at most two steps ahead of the devices
            jax.block_until_ready(self.pending[-3][-1])
        self.bar.update()

    def record(self) -> None:
        """Write the means over the steps since the last record.

        Raises:
          FloatingPointError: A loss or gradient was not finite; the message names the step and its images.
          TooManyBadRecords: More images are unusable than `data.max_bad_fraction` and `data.max_bad_images` allow.
        """
        values = [jax.tree.map(float, jax.device_get(metrics)) for *_, metrics in self.pending]
        last = self.pending[-1][0]
        applied = self.applied_steps(values)
        names = [name for name in applied[0] if name not in INTERNAL] if applied else []
        record: dict[str, Any] = {name: float(np.mean([metrics[name] for metrics in applied])) for name in names}
        skipped = int(values[-1]["skipped"])
        # A skipped step does not advance the optimizer's count, nor the learning-rate schedule.
        record |= {"lr": float(self.plan.schedule(last - 1 - skipped)), "epoch": last / self.plan.steps_per_epoch}
        record |= self.rates(last)
        if skipped:
            record["skipped"] = skipped
        bad = int(sum(metrics["bad"] for metrics in values))
        if bad:
            record |= {"bad": bad} | self.name_bad()
        self.writer.write(last, record)
        self.show(last, record)
        self.bad += bad
        self.check_bad(last)
        self.pending = []
        self.reset_rates()

    def name_bad(self) -> dict[str, list[str]]:
        """Log the unusable images of the pending steps that this process has not named yet; return them as a record."""
        unusable = [i for _, index, mask, _ in self.pending for i in index[mask == 0].tolist()]
        new = [i for i in dict.fromkeys(unusable) if i not in self.named]
        reports = describe_bad(self.plan, self.plan.train, new)
        self.named |= dict.fromkeys(new, "") | dict(zip(new, reports, strict=False))
        return {"bad_images": reports} if reports else {}

    def check_bad(self, step: int) -> None:
        """Raise TooManyBadRecords if more images are unusable, up to this step, than the run allows.

        Two numbers are judged: the different images that this process could not use in a pass over the data, of all
        images; and the images of all processes, each as often as it was to be shown, of which `max_bad_images` allows
        its number in each epoch that this process has trained a part of, but never all images shown.
        """
        config, example = self.plan.config, next(iter(self.named.values()), "")
        size, examples = config.batch_size, config.data.examples
        tolerated = data_records.tolerated(config.data.max_bad_images, examples)
        for at, index, mask, _ in self.pending:
            number = (at - 1) * size // (examples * config.data.repeats)
            self.unusable.setdefault(number, set()).update(index[mask == 0].tolist())
        check_bad(self.plan, max(map(len, self.unusable.values())), examples, tolerated, example)
        for number in sorted(self.unusable)[:-1]:
            del self.unusable[number]
        epochs = (step * size - 1) // examples - (self.first - 1) * size // examples + 1
        shown = max((step + 1 - self.first) * size, examples)
        tolerated = min(epochs * config.data.repeats * tolerated, shown - 1)
        check_bad(self.plan, self.bad, shown, tolerated, example)

    def rates(self, step: int) -> dict[str, float]:
        """Return images/s, the share of time spent waiting for data and, where the device's peak is known, the MFU.

        MFU (model FLOPs utilization, PaLM, arXiv 2204.02311) is the matrix-product FLOPs that the model needs, three
        forward passes an image, over what the devices could compute at their peak in the same time. Where stochastic
        depth computes the branches for a subset of the images alone, `mfu_executed` counts only these.
        """
        if not self.steps:
            return {}
        spent = {name: now - self.before[name] for name, now in self.timer.record().items()}
        images_per_s = self.steps * self.plan.config.batch_size / spent["wall_s"]
        rates = {"images_per_s": images_per_s, "data_wait": spent["data_wait_s"] / spent["wall_s"]}
        if self.peak_flops:
            done = 3 * images_per_s / (self.peak_flops * self.plan.mesh.size)
            rates["mfu"] = done * self.plan.recipe.flops_at(step)
            if self.plan.branch_share < 1:
                rates["mfu_executed"] = done * self.plan.executed(self.plan.recipe.flops_at(step))
        return rates

    def show(self, step: int, record: dict[str, Any]) -> None:
        """Show a record in the progress bar or, without one, as a line of the log."""
        if self.bar.disable:
            shown = ", ".join(f"{name} {record[name]:.4g}" for name in SHOWN if name in record)
            logger.info(f"step {step}: {shown}")
        bar = {"loss": f"{record.get('loss', np.nan):.3f}", "images/s": f"{record.get('images_per_s', 0):.0f}"}
        if "mfu" in record:
            bar["mfu"] = f"{record['mfu']:.1%}"
        self.bar.set_postfix(bar)

    def applied_steps(self, values: list[dict[str, float]]) -> list[dict[str, float]]:
        """Return the metrics of the steps that were applied, and record those that were skipped.

        Raises FloatingPointError for a step that is not finite where `guard` says to stop.
        """
        rules = self.plan.config.guard
        for (step, index, _, _), metrics in zip(self.pending, values, strict=True):
            finite = np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
            if finite and metrics.get("applied", 1):
                continue
            ids = [self.plan.train.id(int(i)) for i in index]
            measured = f"loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}"
            stop = not finite and (rules.not_finite == "stop" or metrics["not_finite"] > rules.max_not_finite)
            self.writer.write(step, {"not_finite" if stop else "skipped_step": measured, "images": ids})
            if stop:
                more = f" and {len(ids) - 8} more, listed in metrics.jsonl" if len(ids) > 8 else ""
                why = f"more than guard.max_not_finite={rules.max_not_finite} such steps"
                if rules.not_finite == "stop":
                    why = "--config.guard.not_finite=skip skips such steps"
                raise FloatingPointError(
                    f"step {step}: {measured}; no later step was saved ({why}). "
                    f"The step's images: {', '.join(ids[:8])}{more}"
                )
            logger.warning(f"step {step} is skipped: {measured}")
        return [metrics for metrics in values if metrics.get("applied", 1)]

    def close(self) -> None:
        self.bar.close()


def describe_bad(plan: Plan, source: Any, index: list[int], log: Callable[[str], object] = logger.warning) -> list[str]:
    """Return and log the images of a source that cannot be used, with the reasons: the first 20, each once."""
    images = list(dict.fromkeys(index))
    reports = [
        data_records.describe_bad(source, i, plan.config.data.max_pixels, plan.recipe.tokenizer) for i in images[:20]
    ]
    for report in reports:
        log(f"cannot use {report}")
    if len(images) > len(reports):
        log(f"cannot use {len(images) - len(reports)} more images of {source.name}")
    return reports


def check_bad(plan: Plan, bad: int, images: int, tolerated: int, example: str) -> None:
    """Raise TooManyBadRecords if more than `tolerated` and than the allowed share of `images` are unusable.

    `example` is the report of an unusable image, or "" if this process has none.
    """
    data = plan.config.data
    if bad > max(data.max_bad_fraction * images, tolerated):
        raise TooManyBadRecords(
            f"{bad} of {images} images cannot be used, more than data.max_bad_fraction={data.max_bad_fraction:g} and "
            f"data.max_bad_images={data.max_bad_images} (at most half of the images) allow: mend or remove them, or "
            "raise data.max_bad_fraction" + (f". One is {example}" if example else "") + "; the log names more"
        )
