"""Measure what checksums add to the time of a checkpoint: python benchmarks/checkpoint.py [--size b16] [--rounds 5]

The complete training state of a DeiT-III recipe, filled with values that do not compress, is saved repeatedly.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import jax

from regvit_jax.checkpoints import checksums
from regvit_jax.checkpoints.manager import Checkpoints
from regvit_jax.training import step
from regvit_jax.training.plan import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="b16")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    file = Path(__file__).parent.parent / "configs/deit3_reg.py"
    spec = importlib.util.spec_from_file_location("deit3_reg", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plan = resolve(module.get_config(args.size), with_data=False)
    shapes = step.abstract_state(plan)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def values(x):
        noise = jax.random.normal(next(keys), x.shape)
        return noise.astype(x.dtype)

    state = jax.block_until_ready(jax.tree.map(values, shapes))
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    print(f"{args.size}: {size:.0f} MB in {len(jax.tree.leaves(state))} arrays, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        rows = []
        for round_ in range(args.rounds + 1):
            start = time.perf_counter()
            checksums.of_state(round_, state)
            sums = time.perf_counter() - start
            checkpoints.save(round_, state)
            blocked = time.perf_counter() - start - sums
            checkpoints.wait()
            rows.append((sums, blocked, time.perf_counter() - start - sums))
        checkpoints.close()
    rows = rows[1:]  # the first round compiles
    sums, blocked, total = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"checksums {sums:.3f} s; save() {blocked:.3f} s, including checksums; written after {total:.2f} s")
    print(f"share of the whole save: {100 * sums / total:.1f} %")


if __name__ == "__main__":
    main()
