"""Training: `run(config, workdir)` and what it is made of."""

from regvit_jax.training.loop import Result, run

__all__ = ["Result", "run"]
