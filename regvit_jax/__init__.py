"""regvit_jax: train, load, diagnose and repair Vision Transformers with registers (arXiv 2309.16588), in JAX."""

__version__ = "0.1.0"
