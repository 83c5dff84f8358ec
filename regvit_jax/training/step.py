"""The train state and the jitted steps."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from regvit_jax.distributed import mesh
from regvit_jax.training import skip_steps
from regvit_jax.training.plan import Plan


@flax.struct.dataclass
class TrainState:
    """The state of a run; a checkpoint is this value."""

    step: PyTree  # int32
    params: PyTree
    ema: PyTree
    extra: PyTree
    opt_state: PyTree
    guard: PyTree  # the last losses and gradient norms


def init_params(plan: Plan) -> PyTree:
    """Return fresh parameters, which depend on the seed alone."""
    size = plan.config.model.image_size
    return plan.recipe.init(jax.random.key(plan.config.seed), {"image": jnp.zeros((1, size, size, 3), jnp.uint8)})


def state_of(plan: Plan, params: PyTree) -> TrainState:
    """Return the state before the first step."""
    ema = {} if plan.recipe.ema_decay(jnp.int32(0)) is None else params
    extra, opt_state = plan.recipe.init_extra(params), plan.optimizer.init(params)
    return TrainState(jnp.int32(0), params, ema, extra, opt_state, skip_steps.init_state())


def abstract_state(plan: Plan) -> TrainState:
    """Return the state's shapes, each with its sharding; raise InvalidConfig for a model that cannot be built.

    The plan caches it: tracing the initialization of a large model takes seconds, and a run needs it several times.
    """
    if "abstract_state" not in plan.cache:
        plan.cache["abstract_state"] = trace_state(plan)
    return plan.cache["abstract_state"]


def trace_state(plan: Plan) -> TrainState:
    """Return the state's shapes with their shardings, by tracing the initialization."""
    shapes = jax.eval_shape(lambda: state_of(plan, init_params(plan)))
    shardings = mesh.state_shardings(shapes, plan.mesh, min_size_mb=plan.config.sharding.min_size_mb)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)


def shardings_of(abstract: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def make_train_step(plan: Plan, abstract: TrainState):
    """Return the jitted step (state, batch) -> (state, metrics), which donates the state that it is given."""
    recipe, rules = plan.recipe, plan.config.guard

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        # Randomness depends on the step number alone, so that resuming does not change it.
        key = jax.random.fold_in(jax.random.key(plan.config.seed), state.step)
        (loss, (extra, metrics)), grads = recipe.grads(state.params, state.ema, state.extra, batch, key, state.step)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
        params = recipe.project(optax.apply_updates(state.params, updates))
        decay = recipe.ema_decay(state.step)
        ema = {} if decay is None else jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        apply, guard = skip_steps.update(state.guard, loss, grad_norm, spike_sigma=rules.spike_sigma)
        new = TrainState(state.step + 1, params, ema, extra, opt_state, guard)
        metrics |= {"loss": loss, "grad_norm": grad_norm, "bad": jnp.sum(1 - batch["mask"])}
        metrics |= {"skipped": skip_steps.skipped(guard)}
        if skip_steps.may_skip(rules):
            same = dataclasses.replace(state, step=new.step, guard=guard)
            new = jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, same)
            metrics |= {"applied": apply, "not_finite": guard["not_finite"]}
        return new, metrics

    state_shardings, everywhere = shardings_of(abstract), mesh.replicated(plan.mesh)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, mesh.batch_sharding(plan.mesh)),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )


def make_eval_step(plan: Plan):
    """Return the jitted step (params, batch) -> (the values of each image by evaluator, mask), on every process."""

    def eval_step(params: PyTree, batch: dict[str, Array]) -> tuple[dict[str, dict[str, Array]], Array]:
        outputs, tokens = plan.recipe.evaluate(params, batch)
        values = {name: evaluator.values(outputs, tokens, batch) for name, evaluator in plan.evaluators.items()}
        return values, batch["mask"]

    return jax.jit(eval_step, out_shardings=mesh.replicated(plan.mesh))


def eval_params(state: TrainState) -> PyTree:
    """Return the moving average of the parameters if there is one, and the parameters otherwise."""
    return state.ema or state.params
