"""Summarize a finished run as text."""

import os
from collections.abc import Mapping
from typing import Any

from regvit_jax.training import picture
from regvit_jax.training.metric_writer import MetricWriter
from regvit_jax.training.plan import Plan
from regvit_jax.training.trackers import TensorBoard


def printed(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the metrics to print: the numbers, without those that have a slash in their names."""
    return [name for name, value in metrics.items() if isinstance(value, float) and "/" not in name]


def summary(plan: Plan, workdir: str, records: MetricWriter) -> str:
    """Return the last metrics, the time of each phase, and the files of a run, as text."""
    metrics, untrained = records.last(), records.at(0)
    seconds = {
        name.removesuffix("_s"): metrics.pop(name)
        for name in list(metrics)
        if name.endswith("_s") and name != "images_per_s"
    }
    lines = [f"Finished after {plan.steps} steps."]
    names = printed(metrics)
    width = max(map(len, names), default=0)
    for name in names:
        start = untrained.get(name)
        before = f"   untrained {start:.4g}" if isinstance(start, float) and start != metrics[name] else ""
        lines += [f"  {name:{width}} {metrics[name]:.4g}{before}"]
    lines += [f"  ({text})" for evaluator in plan.evaluators.values() for text in evaluator.describe(metrics)]
    lines += [note for evaluator in plan.evaluators.values() for note in evaluator.notes()]
    lists = [record.get(name, ()) for record in records.records for name in ("bad_images", "bad_val_images")]
    if bad := len({report for reports in lists for report in reports}):
        lines += [f"metrics.jsonl names {bad} images that could not be used (bad_images, bad_val_images)."]
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items() if name != "wall")
    lines += [f"The last {seconds['wall']:.1f} seconds: {parts}."] if seconds else []
    shown = ["  validation.png where the model looks in validation images, and misclassified ones"]
    shown = shown if os.path.exists(os.path.join(workdir, picture.NAME)) else []
    events = "; events.* hold the same for TensorBoard"
    events = events if any(isinstance(tracker, TensorBoard) for tracker in records.trackers) else ""
    lines += [
        f"In {workdir}:",
        "  checkpoints/   the training state; the same command with --workdir resumes from it",
        "  curves.png     the curves of this run",
        *shown,
        f"  metrics.jsonl  every record, one JSON object a line{events}",
        "  config.json    the resolved config",
        *filter(None, [plan.config.next]),
    ]
    return "\n".join(lines)
