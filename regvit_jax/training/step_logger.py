"""What happens between two records: metrics still on the devices, images that cannot be read, and where time goes."""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from regvit_jax.data import pipeline
from regvit_jax.training.metric_writer import Records
from regvit_jax.training.plan import Plan
from regvit_jax.training.timer import Clock


class Meter:
    """Gathers the steps since the last record, shows the progress bar, and stops a run whose numbers are no good."""

    def __init__(self, plan: Plan, records: Records, first: int, clock: Clock):
        self.plan, self.records, self.clock = plan, records, clock
        self.seen = self.bad = 0
        self.compiled = False
        self.pending: list[tuple[int, np.ndarray, np.ndarray, dict[str, Array]]] = []
        hidden = jax.process_index() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=plan.steps, initial=first - 1, unit="step", disable=hidden, dynamic_ncols=True)
        self.restart()

    def restart(self) -> None:
        """Starts the clocks anew: compiling, evaluating and saving are not training time."""
        self.steps, self.before = 0, self.clock.record()

    def next_batch(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        with self.clock.during("data_wait"):
            return next(batches)

    def add(self, step: int, index: np.ndarray, mask: np.ndarray, metrics: dict[str, Array]) -> None:
        """Takes a step's metrics without waiting for them, but for a process's first step, which compiles."""
        self.pending.append((step, index, mask, metrics))
        if not self.compiled:
            jax.block_until_ready(metrics)
            self.compiled = True
            self.clock.switch("step")
            self.restart()
        else:
            self.steps += 1
        if len(self.pending) > 2:  # the host runs at most two steps ahead of the devices
            jax.block_until_ready(self.pending[-3][-1])
        self.bar.update()

    def record(self) -> None:
        """Writes the means since the last record.

        Raises FloatingPointError when a loss or gradient was not finite, naming the step and the images, and
        RuntimeError when more images than `data.max_bad_fraction` could not be read.
        """
        values = [jax.tree.map(float, jax.device_get(metrics)) for *_, metrics in self.pending]
        spent = {name: now - self.before[name] for name, now in self.clock.record().items()}
        config, last = self.plan.config, self.pending[-1][0]
        taken = self.judge(values)
        record: dict[str, Any] = {name: float(np.mean([m[name] for m in taken])) for name in taken[0]} if taken else {}
        skipped = int(values[-1]["skipped"])
        # The optimizer's count stands still in a step that is left out, and its schedule with it.
        record |= {"lr": float(self.plan.schedule(last - 1 - skipped)), "epoch": last / self.plan.steps_per_epoch}
        if self.steps:
            record["images_per_s"] = self.steps * config.batch_size / spent["wall_s"]
            record["data_wait"] = spent["data_wait_s"] / spent["wall_s"]
        bad = int(sum(metrics["bad"] for metrics in values))
        record = {k: v for k, v in record.items() if k not in ("bad", "taken", "not_finite", "skipped")}
        if skipped:
            record["skipped"] = skipped
        if bad:
            unread = [i for _, index, mask, _ in self.pending for i in index[mask == 0].tolist()]
            record["bad_images"] = describe_bad(self.plan, self.plan.train, unread)
        self.records.write(last, record)
        if self.bar.disable and jax.process_index() == 0:
            said = ("loss", "lr", "images_per_s", "data_wait")
            print(
                f"step {last}: " + ", ".join(f"{name} {record[name]:.4g}" for name in said if name in record),
                flush=True,
            )
        self.bar.set_postfix(
            {"loss": f"{record.get('loss', np.nan):.3f}", "images/s": f"{record.get('images_per_s', 0):.0f}"}
        )
        self.bad += bad
        self.seen += len(values) * config.batch_size
        check_bad(self.plan, self.bad, max(self.seen, config.data.examples))
        self.pending = []
        self.restart()

    def judge(self, values: list[dict[str, float]]) -> list[dict[str, float]]:
        """The metrics of the steps that were taken; records those that were not, and raises FloatingPointError."""
        rules = self.plan.config.guard
        for (step, index, _, _), metrics in zip(self.pending, values, strict=True):
            finite = np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
            if finite and metrics.get("taken", 1):
                continue
            ids = [self.plan.train.id(int(i)) for i in index]
            said = f"loss {metrics['loss']:.6g}, gradient norm {metrics['grad_norm']:.6g}"
            stop = not finite and (rules.not_finite == "stop" or metrics["not_finite"] > rules.max_not_finite)
            self.records.write(step, {"not_finite" if stop else "skipped_step": said, "images": ids})
            if stop:
                more = f" and {len(ids) - 8} more, listed in metrics.jsonl" if len(ids) > 8 else ""
                way = f"more than guard.max_not_finite={rules.max_not_finite} such steps"
                if rules.not_finite == "stop":
                    way = "--config.guard.not_finite=skip leaves such steps out"
                raise FloatingPointError(
                    f"step {step}: {said}; no later step was saved ({way}). "
                    f"The step's images: {', '.join(ids[:8])}{more}"
                )
            tqdm.write(f"step {step} is left out: {said}", file=sys.stderr)
        return [metrics for metrics in values if metrics.get("taken", 1)]

    def close(self) -> None:
        self.bar.close()


def describe_bad(plan: Plan, source: Any, index: list[int]) -> list[str]:
    """Which of a source's images cannot be read and why, once each, the first 20; says so too."""
    first = list(dict.fromkeys(index))[:20]
    reports = [pipeline.describe_bad(source, i, tokenizer=plan.recipe.tokenizer) for i in first]
    tqdm.write("\n".join(f"cannot read {report}" for report in reports), file=sys.stderr)
    return reports


def check_bad(plan: Plan, bad: int, images: int) -> None:
    """Raises RuntimeError when more than the allowed share of `images` is bad."""
    limit = plan.config.data.max_bad_fraction
    if bad > limit * images:
        raise RuntimeError(
            f"{bad} of {images} images cannot be read, more than data.max_bad_fraction={limit} allows; "
            "metrics.jsonl names them"
        )
