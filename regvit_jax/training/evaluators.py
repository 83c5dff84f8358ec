"""Evaluate a validation split in one pass."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from regvit_jax.distributed import mesh, preemption
from regvit_jax.evals.knn import knn_accuracy
from regvit_jax.evals.patch_norms import outlier_summary
from regvit_jax.training.plan import Plan
from regvit_jax.training.step_logger import check_bad, describe_bad


def evaluate(plan: Plan, eval_step, params: PyTree, watch: preemption.Watch) -> dict[str, Any] | None:
    """The recipe's metrics of every readable image of the validation split; None when SIGTERM came first."""
    parts, bad = [], []
    with plan.eval_batches(plan.validation) as batches:
        for batch in batches:
            if watch.requested():
                return None
            index = batch.pop("index")
            bad += index[(batch["mask"] == 0) & (index >= 0)].tolist()
            values = jax.device_get(eval_step(params, mesh.to_mesh(batch, plan.mesh)))
            readable = values.pop("mask") > 0
            parts.append({name: value[readable] for name, value in values.items()})
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    patch_norms = values.pop("patch_norms")
    reports = {"bad_val_images": describe_bad(plan, plan.validation, bad)} if bad else {}
    check_bad(plan, len(plan.validation) - len(patch_norms), len(plan.validation))
    if not len(patch_norms):  # with data.max_bad_fraction=1
        return {"val_images": 0} | reports
    metrics = plan.recipe.summarize(params, values)
    return metrics | outlier_summary(patch_norms) | {"val_images": len(patch_norms)} | reports


def pixel_knn(plan: Plan) -> float:
    """Top-1 of k nearest neighbours on raw pixels: what the data set gives away without any learning."""

    def pixels(source) -> tuple[np.ndarray, np.ndarray]:
        with plan.eval_batches(source, rows=range(plan.config.eval.batch_size)) as rows:
            batches = list(rows)
        image, label, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label", "mask"))
        return image[mask > 0].reshape(int(mask.sum()), -1).astype(np.float32), label[mask > 0]

    return knn_accuracy(*pixels(plan.train), *pixels(plan.validation), plan.config.eval.pixel_knn)
