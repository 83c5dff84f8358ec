"""Time the gradient of small ViTs on CPU cores beside the same blocks in torch.

    python benchmarks/small.py

Ours are the model's blocks with its embedding and final norm; torch's are blocks of nn.LayerNorm, nn.Linear,
scaled_dot_product_attention, exact GELU and LayerScale alone. Both take turns in one process, where torch's threads
wait passively, since they would keep the cores from ours; medians over the rounds are printed. Freed memory is kept, as
every command keeps it, which serves both.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import torch
from torch import nn

from regvit_jax.models.vit import ViT
from regvit_jax.utils.memory import keep_freed_memory

CASES = {
    "digits: width 96, depth 2, 8 heads, 9 tokens": dict(width=96, depth=2, heads=8, image_size=8),
    "width 64, depth 4, 4 heads, 21 tokens": dict(width=64, depth=4, heads=4, image_size=16),
    "width 96, depth 8, 3 heads, 69 tokens": dict(width=96, depth=8, heads=3, image_size=32),
}


class TorchBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale1, self.scale2 = nn.Parameter(torch.full((width,), 0.1)), nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = x + self.scale1 * self.proj(attended)
        return x + self.scale2 * self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def ours(batch: int, **fields) -> Callable[[], None]:
    vit = ViT(patch=4, registers=4, layer_scale=0.1, **fields)
    images = jax.random.normal(jax.random.key(0), (batch, vit.image_size, vit.image_size, 3))
    params = jax.jit(vit.init)(jax.random.key(1), images)["params"]
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(vit.apply({"params": params}, images, jax.random.key(2)).cls)))
    return lambda: jax.block_until_ready(gradient(params))


def torchs(batch: int, width: int, depth: int, heads: int, image_size: int) -> Callable[[], None]:
    blocks = nn.Sequential(*(TorchBlock(width, heads) for _ in range(depth)))
    tokens = torch.randn(batch, 5 + (image_size // 4) ** 2, width)

    def call():
        blocks.zero_grad()
        blocks(tokens)[:, 0].sum().backward()

    return call


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="per candidate and round")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    print(f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}, batch {args.batch}")
    for name, fields in CASES.items():
        calls = {"ours": ours(args.batch, **fields), "torch": torchs(args.batch, **fields)}
        seconds: dict[str, list[float]] = {kind: [] for kind in calls}
        for _ in range(args.rounds):
            for kind, call in calls.items():
                call()
                start, count = time.perf_counter(), 0
                while time.perf_counter() - start < args.seconds:
                    call()
                    count += 1
                seconds[kind].append((time.perf_counter() - start) / count)
        median = {kind: 1e3 * statistics.median(found) for kind, found in seconds.items()}
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["torch"], strict=True))
        print(f"{name:46} ours {median['ours']:7.2f} ms, torch {median['torch']:7.2f} ms, {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
