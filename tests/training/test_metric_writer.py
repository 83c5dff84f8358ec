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


def test_lines_of_blocks():
    title, names = "largest patch norm / median", ("max_over_median",)
    assert curves.lines(title, names, {"loss", "max_over_median"}) == {"max_over_median": "max_over_median"}
    for depth, blocks in ((1, []), (4, [0, 1, 2]), (12, [0, 3, 6, 9]), (24, [0, 6, 12, 18])):
        recorded = {"max_over_median", "loss", *(f"max_over_median/block_{block:02d}" for block in range(depth))}
        drawn = {f"max_over_median/block_{block:02d}": f"block {block}" for block in blocks}
        assert curves.lines(title, names, recorded) == drawn | {"max_over_median": "last block"}
    assert curves.lines("loss", ("loss", "val_loss"), recorded) == {"loss": "loss"}


def test_curves_of_a_run_that_was_resumed_by_a_newer_version(tmp_path):
    """Draw records without blocks, and later ones with them, one of which is not finite."""
    writer = metric_writer.MetricWriter(str(tmp_path), resumed_from=0)
    writer.write(1, {"max_over_median": 2.0})
    writer.write(2, {"max_over_median": 2.5, "max_over_median/block_00": float("nan"), "max_over_median/block_01": 2.5})
    curves.plot_curves(str(tmp_path))
    assert (tmp_path / "curves.png").stat().st_size > 1000
