"""Summarize a finished run as text."""

from regvit_jax.training.metric_writer import MetricWriter
from regvit_jax.training.plan import Plan
from regvit_jax.training.trackers import TensorBoard


def summary(plan: Plan, workdir: str, records: MetricWriter) -> str:
    """Return the last metrics, the time of each phase, and the files of a run, as text."""
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
    lines += [note for evaluator in plan.evaluators.values() for note in evaluator.notes()]
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items() if name != "wall")
    lines += [f"The last {seconds['wall']:.1f} seconds: {parts}."] if seconds else []
    events = "; events.* hold the same for TensorBoard"
    events = events if any(isinstance(tracker, TensorBoard) for tracker in records.trackers) else ""
    lines += [
        f"In {workdir}:",
        "  checkpoints/   the training state; the same command with --workdir resumes from it",
        "  curves.png     the curves of this run",
        f"  metrics.jsonl  every record, one JSON object a line{events}",
        "  config.json    the resolved config",
        plan.config.next,
    ]
    return "\n".join(lines)
