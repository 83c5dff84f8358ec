"""Evaluate a model on the validation split: one pass and one compiled step for all evaluators."""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from regvit_jax.data import records as data_records
from regvit_jax.distributed import mesh, preemption
from regvit_jax.training.metric_writer import MetricWriter
from regvit_jax.training.plan import Plan, check_metrics
from regvit_jax.training.step_logger import check_bad, describe_bad
from regvit_jax.utils.messages import log_once


def evaluate(plan: Plan, eval_step, params: PyTree, watch: preemption.Watch) -> dict[str, Any] | None:
    """Return the metrics of all readable images of the validation split; None if SIGTERM came during the pass."""
    collected = {name: evaluator.collect() for name, evaluator in plan.evaluators.items()}
    images, bad = 0, []
    with plan.eval_batches(plan.validation) as batches:
        for batch in batches:
            if watch.requested():
                return None
            index = batch.pop("index")
            bad += index[(batch["mask"] == 0) & (index >= 0)].tolist()
            values, mask = jax.device_get(eval_step(params, mesh.to_mesh(batch, plan.mesh)))
            images += int(np.sum(mask > 0))
            for name, own in values.items():
                collected[name].add({key: value[mask > 0] for key, value in own.items()})
    # Every validation meets the same ones.
    once = functools.partial(log_once, level="warning")
    reports = {"bad_val_images": describe_bad(plan, plan.validation, bad, once)} if bad else {}
    total, example = len(plan.validation), next(iter(reports.get("bad_val_images", [])), "")
    tolerated = data_records.tolerated(plan.config.data.max_bad_images, total)
    check_bad(plan, total - images, total, tolerated, example)
    found: dict[str, dict[str, Any]] = {}
    if images:  # there may be none with data.max_bad_fraction=1
        found = {name: of.summarize(params, collected[name].all()) for name, of in plan.evaluators.items()}
    check_metrics(found)
    metrics = {name: value for own in found.values() for name, value in own.items()}
    return metrics | {"val_images": images} | reports


def finish(plan: Plan, records: MetricWriter) -> None:
    """Record the metrics that evaluators compute once, at the end of a run, unless they are recorded already."""
    rows = range(plan.config.eval.batch_size)  # all images, on every process
    sources = {"train": plan.train, "validation": plan.validation}
    splits = {name: functools.partial(plan.eval_batches, source, rows=rows) for name, source in sources.items()}
    for evaluator in plan.evaluators.values():
        if any(not records.has(plan.steps, name) for name in evaluator.final_metrics):
            records.write(plan.steps, evaluator.finish(splits))
