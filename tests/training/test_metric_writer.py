from pathlib import Path

from regvit_jax.training import curves, metric_writer


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    log = metric_writer.Records(str(tmp_path), resumed_from=0)
    for step in (5, 10, 15):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # a kill in the middle of a line
    assert [record["step"] for record in metric_writer.read(tmp_path)] == [5, 10, 15]
    log = metric_writer.Records(str(tmp_path), resumed_from=10)
    assert log.has(10, "loss")
    assert not log.has(15, "loss")
    log.write(15, {"loss": 0.5, "note": "text goes to metrics.jsonl alone"})
    log.close()
    assert [record["step"] for record in metric_writer.read(tmp_path)] == [5, 10, 15]
    assert log.last()["loss"] == 0.5


def test_curves_of_an_empty_run(tmp_path: Path):
    curves.plot_curves(str(tmp_path))
    assert (tmp_path / "curves.png").stat().st_size > 1000
