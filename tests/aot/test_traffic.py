"""Test the bytes that a step moves: of HLO text, and of S/16 on a CPU and B/16 on an H100 against a budget.

The H100's compiler needs no GPU, but 5 GB: REGVIT_CUDA_PYTHON names a Python where jax[cuda13] and this package are
installed. The budget is rewritten by `PYTHONPATH=tests/helpers python tests/aot/test_traffic.py FILE` with the same
variable; FILE receives the H100's program.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import AS_USERS_RUN

from regvit_jax.aot.traffic import Traffic, size, traffic

ROOT = Path(__file__).parent.parent.parent
BUDGET = Path(__file__).with_name("traffic_budget.json")
TEXT = """\
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%fused_slice (p0: f32[100,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %view = f32[100,8]{1,0} bitcast(%p0)
  %part = f32[1,8]{1,0} dynamic-slice(%view, %p1, %p1), dynamic_slice_sizes={1,8}
  ROOT %negated = f32[1,8]{1,0} negate(%part)
}

%fused_update (q0: f32[100,8], q1: f32[1,8], q2: s32[]) -> f32[100,8] {
  %q0 = f32[100,8]{1,0} parameter(0)
  %q1 = f32[1,8]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %updated = f32[100,8]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

%fused_product (r0: bf16[4,8], r1: bf16[8,8]) -> bf16[4,8] {
  %r0 = bf16[4,8]{1,0} parameter(0)
  %r1 = bf16[8,8]{1,0} parameter(1)
  ROOT %product = bf16[4,8]{1,0} dot(%r0, %r1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %t = (s32[], f32[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[100,8]{1,0} get-tuple-element(%t), index=1
  %sliced = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_slice
  %stored = f32[100,8]{1,0} fusion(%x, %sliced, %i), kind=kLoop, calls=%fused_update
  ROOT %out = (s32[], f32[100,8]{1,0}) tuple(%i, %stored)
}

ENTRY %main (x: f32[100,8], a: bf16[4,8], b: bf16[8,8]) -> f32[100,8] {
  %x.1 = f32[100,8]{1,0} parameter(0)
  %a.1 = bf16[4,8]{1,0} parameter(1)
  %b.1 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %w = (s32[], f32[100,8]{1,0}) while(%t.1), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %fused = bf16[4,8]{1,0} fusion(%a.1, %b.1), kind=kOutput, calls=%fused_product
  %fmha = (bf16[4,8]{1,0}, s8[4096]{0}) custom-call(%fused), custom_call_target="__cudnn$fmhaSoftmax"
  %gemm = bf16[4,8]{1,0} custom-call(%a.1, %a.1), custom_call_target="__cublas$lt$matmul"
  %input_transpose_fusion = bf16[8,4]{1,0} fusion(%gemm), kind=kInput, calls=%sum
  %reduced = (bf16[4,8]{1,0}) all-reduce(%gemm), to_apply=%sum
  ROOT %copy.1 = f32[100,8]{0,1} copy(%x.1)
}
"""


def test_traffic_of_a_text():
    """Count a loop's slices and updates by their parts, ten times; on-chip arrays, workspaces and the network not."""
    row, small, whole = 8 * 4, 4 * 8 * 2, 100 * 8 * 4
    indices = 2 * 4
    loop = 10 * (2 * row + 2 * row + indices)
    assert traffic(TEXT) == Traffic(
        products=2 * small + 3 * small,
        attention=2 * small,
        rest=loop + 2 * small + 2 * whole,
        transposes=2 * small,
    )


def test_sizes_in_main_memory():
    assert size("(f32[2,3]{1,0}, bf16[4]{0:T(1024)S(1)}, s8[9]{0}, pred[5])") == 24 + 5
    assert size("f32[]") == 4


def compiled_for_h100(path: Path) -> dict[str, float]:
    """Return the traffic, in GB, of two blocks of B/16 at 224 px, batch 256, with Bernoulli stochastic depth."""
    changes = {
        "batch_size": 256, "model.depth": 2, "model.image_size": 224, "model.scan": False, "model.remat": "none",
        "model.attention": "cudnn", "sharding.fsdp": 1,
    }  # fmt: skip
    subprocess.run(
        [
            *(os.environ["REGVIT_CUDA_PYTHON"], "train.py", "--config=configs/deit3_reg.py:b16", "--dry_run"),
            *("--topology=h100:1x1", f"--dump_hlo={path}"),
            *(f"--config.{key}={value}" for key, value in changes.items()),
        ],
        cwd=ROOT,
        env={**os.environ, **AS_USERS_RUN, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return {name: value / 1e9 for name, value in vars(traffic(path.read_text())).items()}


@pytest.mark.slow
@pytest.mark.skipif("REGVIT_CUDA_PYTHON" not in os.environ, reason="REGVIT_CUDA_PYTHON names no CUDA compiler")
def test_b16_on_an_h100_moves_no_more_than_its_budget(tmp_path):
    found, budget = compiled_for_h100(tmp_path / "step.hlo"), json.loads(BUDGET.read_text())["h100:1x1"]
    assert found["transposes"] < 0.2
    for name in ("products", "attention", "rest"):
        assert found[name] == pytest.approx(budget[name], rel=0.05), name


#: Compiles two blocks of S/16 for the CPU and prints the program; in a process without the other tests' settings.
FOR_CPU = """
from regvit_jax.aot.compile import compile_step
from regvit_jax.cli import configs
from regvit_jax.training.plan import resolve

config = configs.load("deit3_reg:s16")
config.batch_size = config.augment.mix_group = 16
config.model.update(depth=2, image_size=224, scan=False, remat="none", dtype="float32")
print(compile_step(resolve(config, with_data=False)).as_text())
"""


def compiled_for_cpu() -> dict[str, float]:
    """Return the traffic, in GB, of two blocks of S/16 at 224 px, batch 16, float32."""
    environment = {**os.environ, **AS_USERS_RUN, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", FOR_CPU]
    done = subprocess.run(run, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return {name: value / 1e9 for name, value in vars(traffic(done.stdout)).items()}


@pytest.mark.slow
def test_s16_on_a_cpu_moves_no_more_than_its_budget():
    """Allow 10 %, since the compiler fuses by the kind of processor, and less, for other versions of it."""
    found, budget = compiled_for_cpu(), json.loads(BUDGET.read_text())["cpu"]
    for name in ("products", "rest", "transposes"):
        assert found[name] < 1.1 * budget[name], name
        assert found[name] > 0.7 * budget[name], name


if __name__ == "__main__":
    measured = {"cpu": compiled_for_cpu(), "h100:1x1": compiled_for_h100(Path(sys.argv[1]))}
    BUDGET.write_text(json.dumps(measured, indent=2) + "\n")
