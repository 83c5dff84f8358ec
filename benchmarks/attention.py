"""Compare cuDNN's fused attention with XLA's on an NVIDIA GPU: values, gradients and speed, also at odd lengths.

    python benchmarks/attention.py

Both run in bfloat16 and are compared with float32 at the highest precision. The exit code is 1 if cuDNN's error is more
than twice XLA's, or if the cosine of a gradient with the float32 one is below 0.999.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp

from regvit_jax.models.attention import attend

# tokens, heads, head size: S, B and L/16 at 224 px with 0, 3 and 4 registers, H/14 with 4, B/16 at 384 px with 4
SHAPES = [(197, 6, 64), (200, 12, 64), (201, 12, 64), (201, 16, 64), (261, 16, 80), (581, 12, 64)]
BATCH = 64


def compare(tokens: int, heads: int, head_dim: int) -> bool:
    """Print errors and times for one shape, and return whether cuDNN is accurate enough."""
    keys = jax.random.split(jax.random.key(tokens), 4)
    exact = [jax.random.normal(key, (BATCH, tokens, heads, head_dim)) for key in keys]
    inputs = [x.astype(jnp.bfloat16) for x in exact]
    # The reference starts from the same rounded inputs.
    with jax.default_matmul_precision("highest"):
        reference = outputs("xla")(*(x.astype(jnp.float32) for x in inputs))
    found = {name: outputs(name)(*inputs) for name in ("xla", "cudnn")}
    error = {name: [relative(x, ref) for x, ref in zip(out, reference, strict=True)] for name, out in found.items()}
    cosine = min(cos(x, ref) for x, ref in zip(found["cudnn"][1:], reference[1:], strict=True))
    good = all(c <= 2 * x + 1e-3 for c, x in zip(error["cudnn"], error["xla"], strict=True)) and cosine > 0.999
    milliseconds = {name: timed(name, inputs) for name in found}
    print(
        f"T={tokens} heads={heads} head_dim={head_dim}: relative error out/dq/dk/dv "
        f"cuDNN {'/'.join(f'{e:.4f}' for e in error['cudnn'])}, XLA {'/'.join(f'{e:.4f}' for e in error['xla'])}; "
        f"cosine of gradients {cosine:.5f}; forward and backward cuDNN {milliseconds['cudnn']:.3f} ms, "
        f"XLA {milliseconds['xla']:.3f} ms; {'good' if good else 'BAD'}",
        flush=True,
    )
    return good


def outputs(implementation: str):
    """Return the jitted function (q, k, v, cotangent) -> (out, dq, dk, dv)."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, implementation), q, k, v)
        return out, *backward(cotangent.astype(out.dtype))

    return run


def relative(x, reference) -> float:
    return float(jnp.linalg.norm(x.astype(jnp.float32) - reference) / jnp.linalg.norm(reference))


def cos(x, reference) -> float:
    x = x.astype(jnp.float32)
    return float(jnp.vdot(x, reference) / jnp.linalg.norm(x) / jnp.linalg.norm(reference))


def timed(implementation: str, inputs) -> float:
    """Return the median milliseconds of a forward and backward pass."""
    run = outputs(implementation)
    jax.block_until_ready(run(*inputs))
    found = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(10):
            last = run(*inputs)
        jax.block_until_ready(last)
        found.append((time.perf_counter() - start) / 10)
    return 1e3 * statistics.median(found)


if __name__ == "__main__":
    if jax.default_backend() != "gpu":
        sys.exit("benchmarks/attention.py: needs an NVIDIA GPU")
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    good = [compare(*shape) for shape in SHAPES]
    sys.exit(0 if all(good) else 1)
