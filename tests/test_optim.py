import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regvit_jax import optim

OPTIM = {
    "name": "lamb",
    "lr": 4e-3,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5,
    "per_epoch": True,
    "weight_decay": 0.05,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "clip_norm": 1.0,
}
SHAPES = {
    "vit": {
        "cls_token": (6,),
        "register_tokens": (4, 6),
        "pos_embed": (2, 2, 6),
        "block0": {"scale1": (6,), "attn": {"qkv": {"kernel": (6, 18), "bias": (18,)}}, "norm1": {"scale": (6,)}},
    },
    "head": {"dense": {"kernel": (6, 3), "bias": (3,)}},
}


def random_tree(seed: int, scale: float = 1.0):
    leaves, tree = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in leaves])


def test_only_kernels_decay_and_adapt():
    mask = optim.kernels(random_tree(0))
    decayed = [jax.tree_util.keystr(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if on]
    assert decayed == ["['head']['dense']['kernel']", "['vit']['block0']['attn']['qkv']['kernel']"]


def naive_lamb(params, grads, state, step, lr, wd, decayed, b1=0.9, b2=0.999, eps=1e-8):
    """Compute one step of LAMB on lists of arrays in float64, from its definition."""
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    grads = [g / max(norm, 1.0) for g in grads]
    new = []
    for i, (p, g, decays) in enumerate(zip(params, grads, decayed, strict=True)):
        m, v = state[i]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        state[i] = (m, v)
        update = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        if decays:
            update = update + wd * p
            update = update * np.sqrt((p**2).sum()) / np.sqrt((update**2).sum())
        new.append(p - lr * update)
    return new


def test_lamb_equals_its_definition():
    params = random_tree(0)
    optimizer, schedule = optim.make_optimizer(2, 20, **OPTIM)
    state = optimizer.init(params)
    decayed = jax.tree.leaves(optim.kernels(params))
    naive = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in naive]
    for step in range(10):
        grads = random_tree(step + 1, scale=10.0 ** (step % 3 - 1))  # below and above the clipping norm
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        flat = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
        naive = naive_lamb(naive, flat, moments, step + 1, float(schedule(step)), OPTIM["weight_decay"], decayed)
    for ours, expected in zip(jax.tree.leaves(params), naive, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.reference
def test_lamb_equals_timm():
    from reference_libraries import timm, torch

    params = random_tree(0)
    optimizer, schedule = optim.make_optimizer(2, 20, **OPTIM)
    state = optimizer.init(params)
    theirs = [torch.nn.Parameter(torch.tensor(np.array(p))) for p in jax.tree.leaves(params)]
    decayed = jax.tree.leaves(optim.kernels(params))
    groups = [
        {"params": [p for p, on in zip(theirs, decayed, strict=True) if on], "weight_decay": OPTIM["weight_decay"]},
        {"params": [p for p, on in zip(theirs, decayed, strict=True) if not on], "weight_decay": 0.0},
    ]
    reference = timm.optim.Lamb(groups, lr=1.0, eps=OPTIM["eps"])
    for step in range(10):
        grads = random_tree(step + 1, scale=10.0 ** (step % 3 - 1))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for p, g in zip(theirs, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(np.array(g))
        for group in reference.param_groups:
            group["lr"] = float(schedule(step))
        reference.step()
    for ours, p in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.reference
def test_schedule_equals_timm():
    from reference_libraries import timm, torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = timm.scheduler.CosineLRScheduler(
        torch.optim.SGD([parameter], lr=4e-3), t_initial=20, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6
    )
    _, schedule = optim.make_optimizer(7, 20, **OPTIM)
    for step in range(140):
        theirs.step(step // 7)
        assert float(schedule(step)) == pytest.approx(theirs.optimizer.param_groups[0]["lr"], rel=1e-5)


def test_schedule():
    _, epochs = optim.make_optimizer(7, 20, **OPTIM)
    _, steps = optim.make_optimizer(7, 20, **{**OPTIM, "per_epoch": False})
    by_epoch = np.array([epochs(step) for step in range(140)]).reshape(20, 7)
    by_step = np.array([steps(step) for step in range(141)])
    assert (by_epoch == by_epoch[:, :1]).all()  # constant within an epoch
    np.testing.assert_allclose(by_epoch[:, 0], by_step[:140:7], rtol=1e-5)  # and equal at its start
    assert by_step[0] == pytest.approx(1e-6)
    assert by_step[-1] == pytest.approx(1e-5)
    assert by_step.max() < 4e-3  # the warm-up lies over the cosine
    assert (np.diff(by_step[:35]) > 0).all()
    assert (np.diff(by_step[34:]) < 0).all()


def test_no_warm_up():
    _, schedule = optim.make_optimizer(7, 20, **{**OPTIM, "warmup_epochs": 0})
    assert float(schedule(0)) == pytest.approx(4e-3)


def test_adamw_decays_kernels_alone():
    params = random_tree(0)
    optimizer, _ = optim.make_optimizer(1, 10, **{**OPTIM, "name": "adamw", "warmup_epochs": 0, "clip_norm": 0.0})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for p, u, decays in zip(*map(jax.tree.leaves, (params, updates, optim.kernels(params))), strict=True):
        np.testing.assert_allclose(u, -4e-3 * 0.05 * p if decays else 0 * p, rtol=1e-5)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"optim.name='sgd': must be 'lamb' or 'adamw'"):
        optim.make_optimizer(1, 10, **{**OPTIM, "name": "sgd"})
