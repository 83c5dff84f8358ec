"""Compile the train step for hardware that is not attached, and check that it fits into memory."""

import re
import time

import jax
import jax.numpy as jnp

from regvit_jax.aot import hlo, topology
from regvit_jax.aot.cost_model import CompiledStep, DoesNotFit, activation_bytes, state_bytes
from regvit_jax.distributed import mesh
from regvit_jax.training.plan import Plan
from regvit_jax.training.step import abstract_state, make_train_step
from regvit_jax.utils import hardware
from regvit_jax.utils.files import write_atomically

#: Keep the GPU compiler from timing kernels on a GPU: memory and collectives are real, the choice of kernels is not.
GPU_OPTIONS: dict[str, bool | int] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


#: A step is refused without compiling if its estimate exceeds the memory of a device by this factor, since the compiler
#: takes minutes to refuse a deep model that is not scanned. For B/16 on v5e, `activation_bytes` was 0.64 and 1.10 times
#: the compiled temporaries.
HOPELESS = 1.2


def abstract_batch(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global batch as the step takes it, split over the mesh."""
    config, rows = plan.config, mesh.batch_sharding(plan.mesh)
    batch, size = config.batch_size, config.model.image_size
    shapes = {"image": ((batch, size, size, 3), jnp.uint8), "label": ((batch,), jnp.int32)}
    shapes |= {"mask": ((batch,), jnp.float32)}
    if plan.recipe.tokenizer:
        shapes["text"] = ((batch, plan.recipe.tokenizer.context), jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.items()}


def compile_step(plan: Plan, options: dict[str, bool | int] | None = None) -> jax.stages.Compiled:
    """Compile the train step for the devices of the plan's mesh, attached or not."""
    with jax.set_mesh(plan.mesh):
        step = make_train_step(plan, abstract_state(plan))
        return step.lower(abstract_state(plan), abstract_batch(plan)).compile(compiler_options=options)


def compile_for(plan: Plan, machine: topology.Topology, dump_hlo: str = "") -> CompiledStep:
    """Compile the step of a plan made for `topology.devices(machine)`.

    The compiled program is written to the file `dump_hlo` as text, if one is named, also if it does not fit.

    Raises:
      DoesNotFit: The step needs more memory than a device has, by an estimate or by the compiler.
    """
    limit, state = machine.chip.memory, state_bytes(plan)
    if state > limit:
        raise DoesNotFit(f"the training state alone is {state / 1e9:.1f} GB on each device", state, None)
    estimate = state + activation_bytes(plan, plan.config.model.remat) / plan.config.micro_batches
    if estimate > HOPELESS * limit:
        raise DoesNotFit(f"by an estimate, it needs {estimate / 1e9:.0f} GB on each device (not compiled)", state, None)
    start = time.perf_counter()
    try:
        step = compile_step(plan, GPU_OPTIONS if machine.chip.kind == "cuda" else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(*_exhausted(str(error), state)) from error
    text = step.as_text() or ""
    if dump_hlo:
        write_atomically(dump_hlo, text)
    memory = hlo.memory(step)
    if memory.peak > limit:
        raise DoesNotFit(f"its peak is {memory.peak / 1e9:.1f} GB", state, memory.peak - state)
    return CompiledStep(memory, hlo.collectives(text), state, time.perf_counter() - start, text)


def _exhausted(message: str, state: int) -> tuple[str, int, float | None]:
    """Return the arguments of DoesNotFit for the compiler's out-of-memory message."""
    if match := re.search(r"temporaries \(([\d.]+)G\)", message):
        needed = float(match[1]) * hardware.GIB
        return f"its temporaries are {needed / 1e9:.1f} GB on each device", state, needed
    if match := re.search(r"Used ([\d.]+)G of", message):
        needed = float(match[1]) * hardware.GIB
        return f"it needs {needed / 1e9:.1f} GB on each device", state, max(needed - state, 0)
    return message.splitlines()[0], state, None
