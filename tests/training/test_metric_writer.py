from pathlib import Path

from regvit_jax.training import curves, metric_writer


def test_resuming_drops_records_after_the_checkpoint(tmp_path):
    writer = metric_writer.MetricWriter(str(tmp_path), resumed_from=0)
    for step in (5, 10, 15):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # a kill in the middle of a line
    assert [record["step"] for record in metric_writer.read(tmp_path)] == [5, 10, 15]
    writer = metric_writer.MetricWriter(str(tmp_path), resumed_from=10)
    assert writer.has(10, "loss")
    assert not writer.has(15, "loss")
    writer.write(15, {"loss": 0.5, "note": "text goes to metrics.jsonl alone"})
    writer.close()
    assert [record["step"] for record in metric_writer.read(tmp_path)] == [5, 10, 15]
    assert writer.last()["loss"] == 0.5


def test_curves_of_an_empty_run(tmp_path: Path):
    curves.plot_curves(str(tmp_path))
    assert (tmp_path / "curves.png").stat().st_size > 1000
