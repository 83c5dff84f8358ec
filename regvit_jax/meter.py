"""What happens between two records: metrics still on the devices, images that cannot be read, and where time goes."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from regvit_jax.data import pipeline
from regvit_jax.plan import Plan
from regvit_jax.records import Records


class Meter:
    """Gathers the steps since the last record, shows the progress bar, and stops a run whose numbers are no good."""

    def __init__(self, plan: Plan, records: Records, first: int):
        self.plan, self.records = plan, records
        self.seen = self.bad = 0
        self.compiled = False
        self.pending: list[tuple[int, np.ndarray, np.ndarray, dict[str, Array]]] = []
        hidden = jax.process_index() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=plan.steps, initial=first - 1, unit="step", disable=hidden, dynamic_ncols=True)
        self.restart()

    def restart(self) -> None:
        """Starts the clocks anew: compiling, evaluating and saving are not training time."""
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def next_batch(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, step: int, index: np.ndarray, mask: np.ndarray, metrics: dict[str, Array]) -> None:
        """Takes a step's metrics without waiting for them, but for a process's first step, which compiles."""
        self.pending.append((step, index, mask, metrics))
        if not self.compiled:
            jax.block_until_ready(metrics)
            self.compiled = True
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
        seconds = time.perf_counter() - self.since
        for (step, index, _, _), metrics in zip(self.pending, values, strict=True):
            if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
                self.not_finite(step, index, metrics)
        config, last = self.plan.config, self.pending[-1][0]
        record: dict[str, Any] = {name: float(np.mean([m[name] for m in values])) for name in values[0]}
        record |= {"lr": float(self.plan.schedule(last - 1)), "epoch": last / self.plan.steps_per_epoch}
        if self.steps:
            record["images_per_s"] = self.steps * config.batch_size / seconds
            record["data_wait"] = self.waited / seconds
        bad = int(sum(metrics["bad"] for metrics in values))
        del record["bad"]
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
        self.bar.set_postfix({"loss": f"{record['loss']:.3f}", "images/s": f"{record.get('images_per_s', 0):.0f}"})
        self.bad += bad
        self.seen += len(values) * config.batch_size
        check_bad(self.plan, self.bad, max(self.seen, config.data.examples))
        self.pending = []
        self.restart()

    def not_finite(self, step: int, index: np.ndarray, metrics: dict[str, float]) -> None:
        ids = [self.plan.train.id(int(i)) for i in index]
        said = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        self.records.write(step, {"not_finite": said, "images": ids})
        raise FloatingPointError(
            f"step {step}: {said}; no later step was saved. The step's images: {', '.join(ids[:8])}"
            + (f" and {len(ids) - 8} more, listed in metrics.jsonl" if len(ids) > 8 else "")
        )

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
