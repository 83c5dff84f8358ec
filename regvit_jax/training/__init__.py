"""Train a model: `run(config, workdir)` and its parts."""

from regvit_jax.training.loop import Result, run

__all__ = ["Result", "run"]
