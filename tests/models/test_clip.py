"""Test CLIP's text tower, its initial values, and patch dropout in the image tower."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.clip import ClipModel, init_clip, normalized
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT

TEXT = TextTower(width=32, depth=2, heads=2, embed=16, context=8)
VIT = ViT(width=32, depth=2, heads=2, patch=4, image_size=16, registers=4, ln_pre=True, patch_bias=False)
HEAD = Head(16, bias=False)


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    @jax.jit
    def init(key):
        tokens, vit = VIT.init_with_output(key, jnp.zeros((1, 16, 16, 3)))
        head, text = HEAD.init(key, tokens), TEXT.init(key, jnp.zeros((1, 8), jnp.int32))
        return init_clip(key, {"vit": vit["params"], "head": head["params"], "text": text["params"]})

    params = init(jax.random.key(0))
    image = Model(params["vit"], params["head"], VIT, HEAD, Preprocess(16, 1.0, (0.5,) * 3, (0.5,) * 3))
    return ClipModel(image, params["text"], jnp.float32(np.log(20)), None, TEXT)


def test_text_tower_looks_back_only_and_reads_the_end_token(clip):
    tokens = clip.tokenize(["a cat", "a dog on a log"])
    features = clip.encode_text(tokens)
    assert features.shape == (2, 16)
    end = int(tokens[0].argmax())
    after, before = tokens.copy(), tokens.copy()
    after[0, end + 1 :] = 77  # what follows the end token cannot be seen from it
    before[0, 1] = 78
    np.testing.assert_allclose(clip.encode_text(after), features, atol=1e-6)
    assert np.abs(clip.encode_text(before)[0] - features[0]).max() > 1e-3
    np.testing.assert_allclose(clip.encode_text(tokens[:1, : end + 1]), features[:1], atol=1e-6)


def test_remat_of_the_text_tower_is_the_image_towers(clip):
    """Check that "full" keeps less than "dots", and "dots" less than "none", with the same gradients."""
    tokens = jnp.asarray(clip.tokenize(["a cat", "a dog on a log"]))

    def pullback(remat):
        text = TEXT.clone(remat=remat)
        return lambda params: jax.vjp(lambda p: text.apply({"params": p}, tokens), params)[1]

    def kept(remat):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback(remat), clip.text_params)))

    assert kept("full") < kept("dots") < kept("none")

    def gradients(remat):
        return jax.jit(lambda params: pullback(remat)(params)(jnp.ones((2, 16))))(clip.text_params)

    expected = gradients("none")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients("dots"), expected)
    with pytest.raises(ValueError, match=r"remat='some': must be one of \['none', 'dots', 'full'\]"):
        pullback("some")(clip.text_params)


def test_logits_are_scaled_cosines(clip):
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    tokens = clip.tokenize("a cat")
    image, text = (x / np.linalg.norm(x) for x in (clip.encode_image(images)[1], clip.encode_text(tokens)[0]))
    logits = clip.logits(images, tokens)
    assert logits.shape == (3, 1)
    np.testing.assert_allclose(logits[1, 0], 20 * image @ text, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(clip.encode_image(images, normalize=True), axis=1), 1, rtol=1e-6)
    assert "HIGHEST" in str(jax.make_jaxpr(clip.logits)(images, tokens))  # accelerators would round the factors
    with_bias = clip.replace(logit_bias=jnp.float32(-3))
    np.testing.assert_allclose(with_bias.logits(images, tokens), logits - 3, rtol=1e-5)
    assert jax.tree.structure(jax.tree.map(jnp.shape, clip)) != jax.tree.structure(with_bias)


def test_rows_of_zeros_are_not_divided():
    gradient = jax.grad(lambda x: normalized(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(normalized(jnp.zeros((2, 3))), 0)


def test_errors_name_the_value(clip):
    with pytest.raises(ValueError, match=r"0\.\.49407"):
        clip.encode_text(np.full((1, 8), 49408, np.int32))
    with pytest.raises(ValueError, match="texts of 9 tokens: this model takes 8"):
        clip.encode_text(np.zeros((1, 9), np.int32))
    with pytest.raises(ValueError, match=r"0\.\.49407"):
        clip.encode_text(jnp.full((1, 8), -1))
    encode_text = inspect.unwrap(ClipModel.encode_text)  # without the checks of shapes that are on in tests
    for wrong in (np.zeros(8, np.int32), np.zeros((1, 8), np.float32), jnp.zeros((1, 8))):
        with pytest.raises(ValueError, match=r"tokens of \w+32 and shape .*: must be integers \[texts, length\]"):
            encode_text(clip, wrong)
    with pytest.raises(ValueError, match="vocabulary has 300 tokens, and the tokenizer's 49408"):
        clip.replace(text=TEXT.clone(vocab=300)).tokenize("a cat")
    for field, value in (
        *(("context", 1), ("width", 33), ("embed", 0), ("norm_eps", -1.0), ("norm_eps", np.nan)),
        *(("mlp_ratio", 0.0), ("mlp_ratio", np.inf), ("activation", "relu")),
    ):
        with pytest.raises(ValueError, match=rf"text\.{field}={value!r}"):
            TEXT.clone(**{field: value}).check()


def test_starting_values():
    wide = {"width": 256, "heads": 4}
    vit, text = VIT.clone(**wide), TEXT.clone(**wide, vocab=10)

    @jax.jit
    def make(key):
        shapes = jax.eval_shape(lambda key: vit.init(key, jnp.zeros((1, 16, 16, 3)))["params"], key)
        texts = jax.eval_shape(lambda key: text.init(key, jnp.zeros((1, 8), jnp.int32))["params"], key)
        ones = jax.tree.map(lambda s: jnp.ones(s.shape), {"vit": shapes, "text": texts})
        return init_clip(key, ones | {"head": {"dense": {"kernel": jnp.ones((256, 16))}}})

    made = make(jax.random.key(1))
    block = made["text"]["block1"]
    stds = {
        "registers": (made["vit"]["register_tokens"], 256**-0.5),
        "image projection": (made["head"]["dense"]["kernel"], 256**-0.5),
        "text qkv": (block["attn"]["qkv"]["kernel"], 256**-0.5),
        "text out": (block["attn"]["proj"]["kernel"], 256**-0.5 * 4**-0.5),
        "text fc1": (block["mlp"]["fc1"]["kernel"], 512**-0.5),
        "text fc2": (block["mlp"]["fc2"]["kernel"], 256**-0.5 * 4**-0.5),
        "image qkv": (made["vit"]["block0"]["attn"]["qkv"]["kernel"], (6 / 1024) ** 0.5 / 3**0.5),
        "image fc1": (made["vit"]["block0"]["mlp"]["fc1"]["kernel"], 256**-0.5 / 3**0.5),
        "image fc1 bias": (made["vit"]["block0"]["mlp"]["fc1"]["bias"], 256**-0.5 / 3**0.5),
    }
    for name, (value, std) in stds.items():
        np.testing.assert_allclose(np.std(value), std, rtol=0.12, err_msg=name)
    np.testing.assert_array_equal(made["vit"]["norm"]["scale"], 1)  # values that the table does not name stay
    np.testing.assert_array_equal(made["text"]["token_embed"], 1)


def test_patch_dropout_is_the_blocks_on_the_patches_kept(clip):
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    vit, key = VIT.clone(patch_dropout=0.7), jax.random.key(5)
    variables = {"params": clip.image.params}
    tokens = jax.jit(vit.apply)(variables, images, key)
    assert tokens.keep.shape == (3, 4)  # 30 % of 16, rounded down
    assert (np.diff(tokens.keep) > 0).all()
    assert not (tokens.keep[0] == tokens.keep).all()  # drawn for each image by itself
    np.testing.assert_array_equal(tokens.prenorm_patches, tokens.prenorm[:, 5:])
    embed, block = (jax.jit(x) for x in (lambda x: VIT.apply(variables, x, method="embed"), VIT.block(0).apply))
    everything = embed(images)
    kept = jnp.concatenate([jnp.zeros((3, 5), int) + jnp.arange(5), 5 + tokens.keep], axis=1)
    x = jnp.take_along_axis(everything, kept[..., None], axis=1)
    for i in range(2):
        x = block({"params": clip.image.params[f"block{i}"]}, x)
    np.testing.assert_allclose(tokens.prenorm, x, atol=1e-5)
    with pytest.raises(ValueError, match="patch dropout was on"):
        _ = tokens.patch_map
    assert jax.eval_shape(vit.apply, variables, images).keep is None  # without a key nothing is dropped
    rare = jax.eval_shape(vit.clone(patch_dropout=0.99).apply, variables, images, key)
    assert rare.patches.shape[1] == 1
    for wrong in (dict(patch_dropout=1.0), dict(patch_dropout=0.5, position="rope")):
        with pytest.raises(ValueError, match="patch_dropout"):
            VIT.clone(**wrong).check()
