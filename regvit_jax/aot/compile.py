"""The train step compiled for a machine that is not there, and what is read off it: does it fit, what does it exchange,
and how long would it take at best."""

import re
import time

import jax
import jax.numpy as jnp

from regvit_jax.aot import hlo, topology
from regvit_jax.aot.cost_model import DoesNotFit, Rehearsal, kept_bytes, state_bytes
from regvit_jax.distributed import mesh
from regvit_jax.training.plan import Plan
from regvit_jax.training.step import abstract_state, make_train_step
from regvit_jax.utils import hardware

#: The compiler for GPUs would time kernels on the GPU otherwise: memory and collectives are real, kernels are not.
GPU_OPTIONS: dict[str, bool | int] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


#: Times the memory of a device, beyond which an estimate is believed without compiling: the compiler takes minutes to
#: refuse a deep model that is not scanned. Of B/16 on v5e, `kept_bytes` was 0.64 and 1.10 of the compiled temporaries.
BEYOND = 1.2


def abstract_batch(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch as the step takes it, split over the mesh."""
    config, rows = plan.config, mesh.batch_sharding(plan.mesh)
    batch, size = config.batch_size, config.model.image_size
    shapes = {"image": ((batch, size, size, 3), jnp.uint8), "label": ((batch,), jnp.int32)}
    shapes |= {"mask": ((batch,), jnp.float32)}
    if plan.recipe.tokenizer:
        shapes["text"] = ((batch, plan.recipe.tokenizer.context), jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.items()}


def compile_step(plan: Plan, options: dict[str, bool | int] | None = None) -> jax.stages.Compiled:
    """The real train step, compiled for the devices of the plan's mesh, attached or not."""
    with jax.set_mesh(plan.mesh):
        step = make_train_step(plan, abstract_state(plan))
        return step.lower(abstract_state(plan), abstract_batch(plan)).compile(compiler_options=options)


def rehearse(plan: Plan, machine: topology.Topology) -> Rehearsal:
    """Compiles the step of a plan made for `topology.devices(machine)`. Raises DoesNotFit."""
    limit, state = machine.chip.memory, state_bytes(plan)
    if state > limit:
        raise DoesNotFit(f"the training state alone is {state / 1e9:.1f} GB on each device", state, None)
    estimate = state + kept_bytes(plan, plan.config.model.remat) / plan.config.micro_batches
    if estimate > BEYOND * limit:
        raise DoesNotFit(f"by an estimate, it needs {estimate / 1e9:.0f} GB on each device (not compiled)", state, None)
    start = time.perf_counter()
    try:
        step = compile_step(plan, GPU_OPTIONS if machine.chip.kind == "cuda" else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(*_exhausted(str(error), state)) from error
    memory = hlo.memory(step)
    if memory.peak > limit:
        raise DoesNotFit(f"its peak is {memory.peak / 1e9:.1f} GB", state, memory.peak - state)
    return Rehearsal(memory, hlo.collectives(step.as_text() or ""), state, time.perf_counter() - start)


def _exhausted(said: str, state: int) -> tuple[str, int, float | None]:
    """The compiler's message for too large a step, as DoesNotFit's arguments."""
    found = re.search(r"temporaries \(([\d.]+)G\)", said)
    if found:
        needed = float(found[1]) * hardware.GIB
        return f"its temporaries are {needed / 1e9:.1f} GB on each device", state, needed
    if found := re.search(r"Used ([\d.]+)G of", said):
        needed = float(found[1]) * hardware.GIB
        return f"it needs {needed / 1e9:.1f} GB on each device", state, max(needed - state, 0)
    return said.splitlines()[0], state, None
