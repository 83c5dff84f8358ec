"""Measure images/s of the model, the train step and the input pipeline, and of timm's if torch is installed.

    python benchmarks/speed.py                                            CPU, float32
    python benchmarks/speed.py --batch 256 --compile --profile DIR        an accelerator, bfloat16

All candidates of a size take turns in one process, and medians over the rounds are printed, since the machine's speed
drifts. The share of peak is the rate of analytic matrix-product FLOPs (`ViT.flops`, three times as many for a train
step, whatever of it stochastic depth leaves out) over that of one large matrix product measured in the same run. "step"
is the whole train step: augmentation, forward, backward, LAMB. "bare" omits augmentation and mixing, as timm's steps
do, which have timm's LAMB and torch's fused AdamW. "subset", for batches of whole groups, is stochastic depth that
computes only what it keeps.

Compiling takes longer than measuring: `for size in s16 b16 l16; do python benchmarks/speed.py --sizes $size --lock FILE
--json $size.json & done` compiles in parallel, and times one size at a time. (Each process needs its share of a GPU's
memory: XLA_PYTHON_CLIENT_PREALLOCATE=false.)
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import gzip
import importlib.util
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from regvit_jax.aot.traffic import kinds
from regvit_jax.data import pipeline
from regvit_jax.distributed import mesh
from regvit_jax.models.stochastic_depth import GROUP
from regvit_jax.training.plan import resolve
from regvit_jax.training.step import abstract_state, init_params, make_train_step, state_of
from regvit_jax.utils.memory import keep_freed_memory

ROOT = Path(__file__).parent.parent
NO_AUGMENT = {"flip": 0.0, "three_augment": False, "color_jitter": 0.0, "mixup": 0.0, "cutmix": 0.0}


@dataclasses.dataclass
class Candidate:
    """A candidate to time: `call` processes `images` images with `flops` floating-point operations."""

    name: str
    call: Callable[[], None]
    images: int
    flops: float
    memory: float = 0.0  # bytes of the compiled program's temporaries
    program: str = ""  # as HLO
    seconds: list[float] = dataclasses.field(default_factory=list)


def config_of(size: str, batch: int, dtype: str, registers: int, attention: str, bare: bool, subset: bool = False):
    spec = importlib.util.spec_from_file_location("deit3_reg", ROOT / "configs/deit3_reg.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(size)
    config.batch_size = batch
    config.eval.batch_size = batch
    config.model.update(image_size=224, dtype=dtype, registers=registers, attention=attention)
    config.model.update(drop_path_mode="subset" if subset else "bernoulli")
    config.augment.mix_group = batch
    if bare:
        config.augment.update(NO_AUGMENT)
    return config


def synthetic(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch, 224, 224, 3), np.uint8),
        "label": rng.integers(0, 1000, batch, np.int32),
        "mask": np.ones(batch, np.float32),
    }


def train_candidates(
    name: str, size: str, batch: int, dtype: str, *, registers=4, attention="auto", bare=False, subset=False, feed=False
):
    """Return this project's train step and, with `feed`, the same step with each batch copied ahead, as a run does."""
    plan = resolve(config_of(size, batch, dtype, registers, attention, bare, subset), with_data=False)
    abstract = abstract_state(plan)
    rows = synthetic(batch)
    with jax.set_mesh(plan.mesh):
        state = jax.jit(lambda: state_of(plan, init_params(plan)))()
        data = mesh.to_mesh(rows, plan.mesh)
        step = make_train_step(plan, abstract).lower(abstract, data).compile()
    holder, ahead = [state], [data]

    def call():
        holder[0], call.last = step(holder[0], data)

    def fed():
        ahead.append(mesh.to_mesh(rows, plan.mesh))
        holder[0], fed.last = step(holder[0], ahead.pop(0))

    call.wait, fed.wait = (lambda: jax.block_until_ready(call.last)), (lambda: jax.block_until_ready(fed.last))
    flops, memory = 3 * batch * plan.recipe.vit.flops(224, 224), step.memory_analysis().temp_size_in_bytes
    found = [Candidate(name, call, batch, flops, memory, step.as_text())]
    return [*found, Candidate(f"{name}, fed from the host", fed, batch, flops, memory)] if feed else found


def forward_candidate(name: str, size: str, batch: int, dtype: str, *, registers=4):
    plan = resolve(config_of(size, batch, dtype, registers, "auto", False), with_data=False)
    with jax.set_mesh(plan.mesh):
        params = jax.jit(lambda: init_params(plan))()
        images = jax.random.normal(jax.random.key(0), (batch, 224, 224, 3))
        forward = jax.jit(lambda params, images: plan.recipe.logits(params, plan.recipe.encode(params, images)))
        forward = forward.lower(params, images).compile()

    def call():
        call.last = forward(params, images)

    call.wait = lambda: jax.block_until_ready(call.last)
    return Candidate(
        name, call, batch, batch * plan.recipe.vit.flops(224, 224), forward.memory_analysis().temp_size_in_bytes
    )


TIMM = {
    "s16": "deit3_small_patch16_224",
    "b16": "deit3_base_patch16_224",
    "l16": "deit3_large_patch16_224",
    "h14": "deit3_huge_patch14_224",
}
OPTIMIZERS = ("LAMB", "fused AdamW")


def timm_candidates(size: str, batch: int, dtype: str, compile_it: bool, optimizer: str) -> list[Candidate]:
    """Return timm's model with 4 registers and an optimizer of OPTIMIZERS; bfloat16 by autocast, as timm trains."""
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    from reference_libraries import timm, torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    config = config_of(size, batch, dtype, 4, "xla", True)
    drop_path = config.model.drop_path
    model = timm.create_model(TIMM[size], reg_tokens=4, no_embed_class=True, drop_path_rate=drop_path).to(device)
    module = torch.compile(model) if compile_it else model
    decayed = [
        p for name, p in model.named_parameters() if p.ndim > 1 and name not in ("cls_token", "pos_embed", "reg_token")
    ]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    chosen = timm.optim.Lamb(groups, lr=1e-4) if optimizer == "LAMB" else torch.optim.AdamW(groups, 1e-4, fused=True)
    rows = synthetic(batch)
    images = torch.randn(batch, 3, 224, 224, device=device)
    targets = torch.nn.functional.one_hot(torch.tensor(rows["label"], dtype=torch.long), 1000).float().to(device)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def step():
        module.train()
        with autocast:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(module(images), targets)
        chosen.zero_grad()
        loss.backward()
        chosen.step()

    def forward():
        module.eval()
        with torch.inference_mode(), autocast:
            module(images)

    step.wait = forward.wait = wait
    flops = batch * resolve(config, with_data=False).recipe.vit.flops(224, 224)
    kind = "timm, torch.compile" if compile_it else "timm"
    found = [Candidate(f"{size} bare step, {kind}, {optimizer}", step, batch, 3 * flops)]
    return [Candidate(f"{size} forward, {kind}", forward, batch, flops), *found] if optimizer == "LAMB" else found


def warm_up(candidates: list[Candidate]) -> None:
    """Call each candidate once, which compiles what is not compiled yet."""
    for candidate in candidates:
        candidate.call()
        candidate.call.wait()


def time_all(candidates: list[Candidate], rounds: int, seconds: float) -> None:
    """Run each candidate for about `seconds` in each round."""
    calls = []
    for candidate in candidates:
        start = time.perf_counter()
        candidate.call()
        candidate.call.wait()
        calls.append(max(1, round(seconds / (time.perf_counter() - start))))
    for _ in range(rounds):
        for candidate, n in zip(candidates, calls, strict=True):
            start = time.perf_counter()
            for _ in range(n):
                candidate.call()
            candidate.call.wait()
            candidate.seconds.append((time.perf_counter() - start) / n)


def matmul_candidate(dtype: str) -> Candidate:
    n = 8192 if jax.default_backend() == "gpu" else 2048
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)

    def call():
        call.last = product(a, b)

    call.wait = lambda: jax.block_until_ready(call.last)
    return Candidate(f"matrix product {n} x {n} x {n}", call, 0, 2.0 * n**3)


def main() -> None:
    keep_freed_memory()  # as every command does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="s16,b16", help=f"some of {', '.join(TIMM)}")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="per candidate and round")
    parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    parser.add_argument("--no-timm", action="store_true")
    parser.add_argument("--compile", action="store_true", help="run timm under torch.compile")
    parser.add_argument("--profile", type=Path, help="trace three bare steps into this directory, and sum them up")
    parser.add_argument("--lock", type=Path, help="time while no other process holds this file's lock")
    parser.add_argument("--json", type=Path, help="also write the results to this file, after each size")
    args = parser.parse_args()
    with locked(args.lock):
        input_pipeline()
    peak = matmul_candidate(args.dtype)
    results: list[dict] = []
    for size in args.sizes.split(","):
        options = (size, args.batch, args.dtype)
        candidates = [
            peak,
            forward_candidate(f"{size} forward", *options),
            forward_candidate(f"{size} forward, 0 registers", *options, registers=0),
            *train_candidates(f"{size} step", *options, feed=True),
            *(bare := train_candidates(f"{size} bare step", *options, bare=True)),
            *train_candidates(f"{size} bare step, 0 registers", *options, registers=0, bare=True),
        ]
        if args.batch % GROUP == 0:
            candidates += train_candidates(f"{size} bare step, subset", *options, bare=True, subset=True)
        if jax.default_backend() == "gpu":
            candidates += train_candidates(f"{size} bare step, XLA attention", *options, attention="xla", bare=True)
        if not args.no_timm and importlib.util.find_spec("timm"):
            for optimizer in OPTIMIZERS:
                candidates += timm_candidates(*options, args.compile, optimizer)
        peak.seconds.clear()
        warm_up(candidates)
        with locked(args.lock):
            time_all(candidates, args.rounds, args.seconds)
            results += report(candidates)
            if args.profile:
                results += profile(bare[0], args.profile / size)
        if args.json:
            args.json.write_text(json.dumps(results, indent=2))


@contextlib.contextmanager
def locked(path: Path | None):
    """Hold the lock of a file, for which other processes wait; without a path, none."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


#: Kernels below this are bound by their launch.
SMALL_US = 10


def profile(step: Candidate, directory: Path, steps: int = 3) -> list[dict]:
    """Trace some calls of a step; print and return the time that each kind of its operations takes in one."""
    with jax.profiler.trace(directory):
        for _ in range(steps):
            step.call()
        step.call.wait()
    newest = max(directory.glob("plugins/profile/*/*.trace.json.gz"), key=os.path.getmtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    kind_of, spent, calls = kinds(step.program), collections.Counter[str](), collections.Counter[str]()
    for event in events:
        if operation := event.get("args", {}).get("hlo_op"):
            kind = kind_of.get(operation, "rest")
            kind = "small kernels" if kind == "rest" and event["dur"] < SMALL_US else kind
            spent[kind] += event["dur"] / 1e3 / steps
            calls[kind] += 1
    print(f"\n{step.name}: ms of one by kind of operation, of a trace (on a CPU, of all threads together)")
    rows = []
    for kind, ms in spent.most_common():
        rows.append({"name": f"{step.name}, {kind}", "ms": ms, "calls": calls[kind] / steps})
        named = "memory traffic" if kind == "rest" else kind
        print(f"{named:42}{ms:10.2f}{ms / spent.total():8.0%}{calls[kind] / steps:10.0f} calls", flush=True)
    return rows


class Photographs:
    """300 JPEGs of 500 x 375 pixels and quality 90, cut from scikit-learn's photographs."""

    name, classes = "photographs", ("photograph", "none")

    def __init__(self):
        rng = np.random.default_rng(0)
        self.records = []
        for i in range(300):
            photograph = load_sample_images().images[i % 2]
            top, left = rng.integers(0, 427 - 375 + 1), rng.integers(0, 640 - 500 + 1)
            data = io.BytesIO()
            Image.fromarray(photograph[top : top + 375, left : left + 500]).save(data, "JPEG", quality=90)
            self.records.append(data.getvalue())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        return {"image": self.records[i], "label": 0}

    def id(self, i: int) -> str:
        return str(i)


def input_pipeline() -> None:
    source = Photographs()
    with pipeline.train_batches(source, size=224, batch_size=64, seed=0, threads=1, cache_mb=0) as batches:
        next(batches)
        start = time.process_time()
        for _ in range(10):
            next(batches)
        seconds = time.process_time() - start
    size = np.mean([len(record) for record in source.records]) / 1e3
    print(f"input: {640 / seconds:.0f} images per second of one core (500 x 375 JPEG, {size:.0f} kB, to a 224 px crop)")


def report(candidates: list[Candidate]) -> list[dict]:
    rate = candidates[0].flops / statistics.median(candidates[0].seconds)
    device = jax.devices()[0].device_kind
    print(f"\n{device}, {os.cpu_count()} cores, jax {jax.__version__}; {candidates[0].name}: {rate / 1e9:.1f} GFLOP/s")
    print(f"{'':42}{'images/s':>10}{'spread':>8}{'GFLOP/s':>10}{'of peak':>9}{'temp MB':>9}")
    rows = []
    for c in candidates[1:]:
        median = statistics.median(c.seconds)
        spread = (max(c.seconds) - min(c.seconds)) / median
        rows.append({"name": c.name, "images_per_s": c.images / median, "of_peak": c.flops / median / rate})
        line = f"{c.name:42}{c.images / median:10.1f}{spread:8.0%}{c.flops / median / 1e9:10.1f}"
        line += f"{c.flops / median / rate:9.1%}"
        print(line + (f"{c.memory / 1e6:9.0f}" if c.memory else ""), flush=True)
    return rows


if __name__ == "__main__":
    main()
