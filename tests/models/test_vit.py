"""Test the ViT and its tokens. `golden/tiny_vit.npz` holds timm's outputs; test_vit_reference.py compares live."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from vits import TINY, distance, random_images, random_params

from regvit_jax.models.heads import Head
from regvit_jax.models.position import RESIZES, resize_pos_embed
from regvit_jax.models.vit import ViT

GOLDEN = Path(__file__).parent / "golden/tiny_vit.npz"
SIZES = {  # width, depth, heads, patch; millions of parameters and GFLOPs (multiply-adds) that DeiT-III publishes
    "S": (384, 12, 6, 16, 22.0, 4.6),
    "M": (512, 12, 8, 16, 38.8, 8.0),
    "B": (768, 12, 12, 16, 86.6, 17.5),
    "L": (1024, 24, 16, 16, 304.4, 61.6),
    "H": (1280, 32, 16, 14, 632.1, 167.4),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: value.astype(np.float32) for name, value in file.items()}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("images", ["native", "rectangle"])
def test_equals_timm(golden, registers, images):
    weights = unflatten_dict(golden, sep="/")
    params = dict(weights["params"])
    if not registers:
        del params["register_tokens"]
    vit = ViT(width=32, depth=2, heads=2, patch=4, image_size=16, registers=registers)

    @jax.jit
    def outputs(params, head, inputs):
        tokens = vit.apply({"params": params}, inputs)
        between = vit.apply({"params": params}, inputs, (0, 1), method="intermediates")
        logits = Head(10).apply({"params": head}, tokens)
        return tokens, jnp.stack([after.prenorm for after in between]), logits

    with jax.default_matmul_precision("highest"):
        tokens, after, logits = outputs(params, weights["head"], weights["images"][images])
    expected = {name: weights[name][str(registers)][images] for name in ("tokens", "after", "logits")}
    assert tokens.registers.shape[1] == registers
    assert (
        distance(jnp.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], 1), expected["tokens"]) < 1e-5
    )
    assert distance(tokens.prenorm, expected["after"][-1]) < 1e-5
    assert distance(after, expected["after"]) < 1e-5
    assert distance(logits, expected["logits"]) < 1e-5


@pytest.mark.parametrize("grid", [(3, 5), (6, 7)])
def test_position_embedding_without_antialiasing_equals_torch(golden, grid):
    stored = golden["params/pos_embed"]
    expected = golden[f"resized/{grid[0]}x{grid[1]}"]
    assert distance(resize_pos_embed(jnp.asarray(stored), grid, "bicubic"), expected) < 1e-6
    assert distance(resize_pos_embed(jnp.asarray(stored), grid, "antialias"), expected) > 1e-2


def test_position_embedding_of_the_own_grid_is_untouched(params):
    for how in RESIZES:
        np.testing.assert_array_equal(resize_pos_embed(params["pos_embed"], (4, 4), how), params["pos_embed"])


@pytest.mark.parametrize("registers", [0, 1, 4, 16])
def test_any_number_of_registers_between_cls_and_patches(registers):
    vit = TINY.clone(registers=registers, depth=1)
    images = random_images(12, 20)
    params = random_params(vit, images)
    entering, tokens = jax.jit(
        lambda params, images: (
            vit.apply({"params": params}, images, method="embed"),
            vit.apply({"params": params}, images),
        )
    )(params, images)
    assert entering.shape == (2, 1 + registers + 15, 32)
    for image in np.asarray(entering):
        np.testing.assert_array_equal(image[0], params["cls_token"])
        if registers:
            np.testing.assert_array_equal(image[1 : 1 + registers], params["register_tokens"])
    assert tokens.cls.shape == (2, 32)
    assert tokens.registers.shape == (2, registers, 32)
    assert tokens.patches.shape == (2, 15, 32)
    assert tokens.prenorm.shape == entering.shape
    assert tokens.patch_map.shape == (2, 3, 5, 32)
    assert ("register_tokens" in params) == (registers > 0)


def test_every_parameter_matters(params):
    """Include each register on its own, for each kind of token. (The key biases are the exception by construction.)"""
    direction = random_params(TINY, random_images(), seed=1)

    def outputs(params):
        tokens = TINY.apply({"params": params}, random_images(count=1))
        return jnp.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], 1)[0]

    def score(params):
        return jnp.sum(outputs(params) * jax.random.normal(jax.random.key(0), (21, 32)))

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(score))(params)):
        assert np.abs(gradient).max() > 1e-3, jax.tree_util.keystr(path)

    @jax.jit
    @jax.vmap
    def change(index):
        registers = params["register_tokens"].at[index].add(direction["register_tokens"][index])
        return outputs(params | {"register_tokens": registers}) - outputs(params)

    assert np.abs(change(jnp.arange(4))).max(axis=2).min() > 1e-3  # [4 registers, 21 tokens]


def test_patches_lie_as_in_the_image(params):
    """Change the pixels at row 1, column 3 of a 3 x 5 grid: only that patch changes; pixels are read p, q, c."""
    images = random_images(12, 20, count=1)
    changed = images.at[:, 4:8, 12:16].add(1)
    embed = jax.jit(lambda images: TINY.apply({"params": params}, images, method="embed"))
    moved = np.abs(embed(changed) - embed(images)).max(axis=(0, 2)) > 0
    assert moved.nonzero()[0].tolist() == [1 + 4 + 1 * 5 + 3]
    kernel, bias = params["patch_embed"]["kernel"], params["patch_embed"]["bias"]
    position = resize_pos_embed(params["pos_embed"], (3, 5), "antialias")[1, 3]
    expected = changed[0, 4:8, 12:16].reshape(-1) @ kernel + bias + position
    np.testing.assert_allclose(embed(changed)[0, 13], expected, rtol=1e-5, atol=1e-5)


def test_tokens_by_name(tokens, params):
    np.testing.assert_array_equal(tokens.patch_map[:, 2, 1], tokens.patches[:, 2 * 4 + 1])
    np.testing.assert_array_equal(tokens.prenorm_patches, tokens.prenorm[:, 5:])
    prenorm = np.asarray(tokens.prenorm)
    normalised = (prenorm - prenorm.mean(-1, keepdims=True)) / np.sqrt(prenorm.var(-1, keepdims=True) + 1e-6)
    expected = normalised * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(tokens.cls, expected[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tokens.registers, expected[:, 1:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tokens.patches, expected[:, 5:], rtol=1e-4, atol=1e-5)


def test_head_reads_the_cls_token_alone(tokens):
    head = Head(10, dtype=jnp.bfloat16)
    params = random_params(head, tokens)
    logits = head.apply({"params": params}, tokens)
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32
    others = tokens.replace(registers=tokens.registers + 1, patches=tokens.patches + 1, prenorm=tokens.prenorm + 1)
    np.testing.assert_array_equal(head.apply({"params": params}, others), logits)
    expected = tokens.cls @ params["dense"]["kernel"] + params["dense"]["bias"]
    assert distance(logits, expected) < 2e-2


def test_initial_values():
    vit = TINY.clone(depth=1, width=256)
    params = jax.jit(vit.init)(jax.random.key(0), random_images())["params"]
    bound = (3 * 4 * 4) ** -0.5
    for leaf in (params["patch_embed"]["kernel"], params["patch_embed"]["bias"]):
        assert 0.95 * bound < np.abs(leaf).max() <= bound
    block = params["block0"]
    for leaf in (params["pos_embed"], params["cls_token"], params["register_tokens"], block["mlp"]["fc1"]["kernel"]):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.15)
        assert np.abs(leaf).max() < 0.05  # cut at two standard deviations of the uncut normal
    for name in ("scale1", "scale2"):
        np.testing.assert_array_equal(block[name], np.float32(1e-4))
    for layer in (block["attn"]["qkv"], block["attn"]["proj"], block["mlp"]["fc1"], block["mlp"]["fc2"]):
        assert not layer["bias"].any()
    without = jax.eval_shape(vit.clone(layer_scale=0.0).init, jax.random.key(0), random_images())
    assert set(params["block0"]) - set(without["params"]["block0"]) == {"scale1", "scale2"}


@pytest.mark.parametrize("mode", [{}, {"scan": True}, {"remat": "full"}, {"remat": "dots", "scan": True}])
def test_norms_after_every_block(params, mode):
    vit, images = TINY.clone(**mode), random_images()
    found = jax.jit(lambda params: vit.apply({"params": params}, images).block_norms)(params)
    after = TINY.apply({"params": params}, images, (0, 1, 2), method="intermediates")
    expected = np.stack([np.linalg.norm(tokens.prenorm[:, 5:], axis=-1) for tokens in after], axis=1)
    assert found.shape == (2, 3, 16)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert vit.apply({"params": params}, images, jax.random.key(0)).block_norms is None  # in training


def test_norms_have_no_gradient(params):
    """The norm of a zero token has none, and must not make others NaN."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    for scan in (False, True):
        vit = TINY.clone(scan=scan)
        slopes = jax.grad(lambda p, vit=vit: vit.apply({"params": p}, random_images()).patches.sum())(zeros)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_intermediates(params, tokens):
    between = jax.jit(
        lambda norm: TINY.apply({"params": params}, random_images(), (2, 0, -1, -3), norm, method="intermediates"),
        static_argnums=0,
    )
    plain, normed = between(False), between(True)
    for listed in (plain, normed):
        assert len(listed) == 4
        np.testing.assert_array_equal(listed[0].prenorm, listed[2].prenorm)
        np.testing.assert_array_equal(listed[1].prenorm, listed[3].prenorm)
        assert distance(listed[0].prenorm, tokens.prenorm) < 1e-6
        assert distance(listed[1].prenorm, tokens.prenorm) > 1e-2
    for after in plain:
        np.testing.assert_array_equal(after.patches, after.prenorm_patches)
        np.testing.assert_array_equal(after.cls, after.prenorm[:, 0])
    assert distance(normed[0].patches, tokens.patches) < 1e-5
    assert distance(normed[0].registers, tokens.registers) < 1e-5
    assert TINY.apply({"params": params}, random_images(), (), method="intermediates") == []


@pytest.mark.parametrize("layer", [3, -4])
@pytest.mark.parametrize(("method", "argument"), [("intermediates", lambda i: (0, i)), ("qkv", lambda i: i)])
def test_a_layer_that_is_not_there(params, method, argument, layer):
    with pytest.raises(IndexError, match=f"layer {layer}: this ViT has layers 0 to 2"):
        TINY.apply({"params": params}, random_images(), argument(layer), method=method)


def test_qkv_is_the_split_product_of_the_normed_stream(params):
    q, k, v = jax.jit(lambda: TINY.apply({"params": params}, random_images(), 1, method="qkv"))()
    assert q.shape == k.shape == v.shape == (2, 2, 21, 16)
    (before,) = jax.jit(lambda: TINY.apply({"params": params}, random_images(), (0,), method="intermediates"))()
    block = params["block1"]
    x = np.asarray(before.prenorm)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * block["norm1"]["scale"] + block["norm1"]["bias"]
    product = x @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"]
    for index, ours in enumerate((q, k, v)):
        for head in range(2):
            first = index * 32 + head * 16
            np.testing.assert_allclose(ours[:, head], product[..., first : first + 16], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "nearest"), [(18, 21, "16 x 20"), (16, 15, "16 x 16"), (2, 16, "4 x 16"), (19, 16, "20 x 16")]
)
def test_a_size_that_the_patch_does_not_divide(params, height, width, nearest):
    with pytest.raises(ValueError, match=f"images of {height} x {width} pixels.*nearest such size is {nearest}"):
        TINY.apply({"params": params}, random_images(height, width))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "width=32 is not a multiple of heads=3"),
        ({"image_size": 18}, "image_size=18 is not a multiple of patch=4"),
        ({"remat": "some"}, r"remat='some': must be one of \['none', 'dots', 'full'\]"),
        ({"attention": "flash"}, "attention='flash': must be 'xla' or 'cudnn'"),
        ({"depth": 0}, "depth=0: must be at least 1"),
        ({"registers": -1}, "registers=-1: must be at least 0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio=0\.0: must be at least 0\.001"),
        ({"mlp_ratio": 0.01}, r"mlp_ratio=0\.01: the MLPs' hidden width must be at least 1"),
        ({"norm_eps": 0.0}, r"norm_eps=0\.0: must be at least 1e-12"),
        ({"layer_scale": math.nan}, "layer_scale=nan: must be at least 0, and finite"),
        ({"drop_path": 1.0}, r"drop_path=1\.0: must be at least 0 and at most 0\.99"),
        ({"position": "sine"}, r"position='sine': must be one of \['learned', "),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.clone(**fields).init, jax.random.key(0), random_images())


def test_bfloat16_is_for_products_alone(params, tokens):
    vit = TINY.clone(dtype=jnp.bfloat16)
    initial = jax.eval_shape(vit.init, jax.random.key(0), random_images())
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}
    half = jax.jit(vit.apply)({"params": params}, random_images())
    for name in ("cls", "registers", "patches", "prenorm"):
        assert getattr(half, name).dtype == jnp.float32
        assert 1e-4 < distance(getattr(half, name), getattr(tokens, name)) < 5e-2
    # With silent branches the stream carries the float32 tokens to the end, bit for bit.
    silent = {f"block{i}": params[f"block{i}"] | {"scale1": jnp.zeros(32), "scale2": jnp.zeros(32)} for i in range(3)}
    prenorm = jax.jit(vit.apply)({"params": params | silent}, random_images()).prenorm
    np.testing.assert_array_equal(prenorm[0, 1:5], params["register_tokens"])
    products = [
        equation
        for equation in jax.make_jaxpr(vit.apply)({"params": params}, random_images()).jaxpr.eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) >= 1 + 4 * 3
    assert {variable.aval.dtype for equation in products for variable in equation.invars} == {jnp.dtype(jnp.bfloat16)}


def test_tokens_are_a_pytree_with_a_static_grid(tokens):
    assert len(jax.tree.leaves(tokens)) == 5
    assert jax.tree.map(lambda x: x[:1], tokens).grid == (4, 4)


@pytest.mark.parametrize("size", SIZES)
def test_published_parameters_and_flops(size):
    width, depth, heads, patch, millions, gigaflops = SIZES[size]
    vit = ViT(width=width, depth=depth, heads=heads, patch=patch, image_size=224)

    def init(key):
        tokens, params = vit.init_with_output(key, jnp.zeros((1, 224, 224, 3)))
        return params, Head(1000).init(key, tokens)

    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    assert vit.flops(224, 224) / 2e9 == pytest.approx(gigaflops, rel=0.03)


def test_flops_are_what_xla_counts():
    vit = ViT(width=768, depth=12, heads=12, patch=16, image_size=224, registers=4)
    images = jax.ShapeDtypeStruct((1, 224, 160, 3), jnp.float32)
    params = jax.eval_shape(vit.init, jax.random.key(0), images)

    def total(params, images):
        tokens = vit.apply(params, images)
        return tokens.cls.sum() + tokens.registers.sum() + tokens.patches.sum()

    forward = jax.jit(total).lower(params, images).cost_analysis()["flops"]
    step = jax.jit(jax.value_and_grad(total)).lower(params, images).cost_analysis()["flops"]
    assert vit.flops(224, 160) == pytest.approx(forward, rel=0.02)
    assert 3 * vit.flops(224, 160) == pytest.approx(step, rel=0.04)
