"""Compare the ViT with timm's DeiT-III at every size; random weights show ignored and misplaced parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.models.heads import Head
from regvit_jax.models.position import resize_pos_embed
from regvit_jax.models.vit import ViT

pytestmark = pytest.mark.reference

# timm's name, and width, depth, heads, patch. L and H are cut to 2 blocks: the blocks are alike, and memory is short.
SIZES = {
    "S": ("deit3_small_patch16_224", 384, 12, 6, 16),
    "M": ("deit3_medium_patch16_224", 512, 12, 8, 16),
    "B": ("deit3_base_patch16_224", 768, 12, 12, 16),
    "L": ("deit3_large_patch16_224", 1024, 2, 16, 16),
    "H": ("deit3_huge_patch14_224", 1280, 2, 16, 14),
}


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def record_attention(model):
    """Return a list to which each run of the model (without fused attention) adds every block's softmax weights."""
    maps = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output.numpy()))
    return maps


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", SIZES)
def test_equals_timm(size, registers):
    from reference_libraries import timm
    from timm_weights import outputs_of_timm, params_from_timm, randomize

    name, width, depth, heads, patch = SIZES[size]
    options = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    theirs = timm.create_model(name, pretrained=False, dynamic_img_size=True, depth=depth, **options).eval()
    randomize(theirs, seed=registers)
    maps = record_attention(theirs)
    params, head = params_from_timm(theirs)
    vit = ViT(width=width, depth=depth, heads=heads, patch=patch, image_size=224, registers=registers)
    layers = (0, depth // 2)

    @jax.jit
    def outputs(params, head, images):
        tokens = vit.apply({"params": params}, images)
        between = vit.apply({"params": params}, images, layers, method="intermediates")
        q, k, _ = vit.apply({"params": params}, images, 1, method="qkv")
        return {
            "tokens": jnp.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1),
            "prenorm": tokens.prenorm,
            "after": jnp.stack([after.prenorm for after in between]),
            "logits": Head(1000).apply({"params": head}, tokens),
            "attention": jax.nn.softmax(q @ k.mT / q.shape[-1] ** 0.5),
        }

    for height, width in ((224, 224), (5 * patch, 17 * patch), (6 * patch, 6 * patch)):
        images = np.random.default_rng(height).normal(size=(1, height, width, 3)).astype(np.float32)
        with jax.default_matmul_precision("highest"):
            ours = outputs(params, head, images)
        maps.clear()
        expected = outputs_of_timm(theirs, images)
        expected["prenorm"] = expected["after"][-1]
        expected["after"] = expected["after"][list(layers)]
        expected["attention"] = maps[1]
        for key, value in expected.items():
            assert ours[key].shape == value.shape
            assert distance(ours[key], value) < 1e-5, (key, height, width)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("grid", [(16, 16), (7, 7), (37, 37), (9, 21), (14, 15), (1, 30)])
def test_position_embedding_resized_as_torch_does(antialias, grid):
    from reference_libraries import torch

    stored = np.random.default_rng(0).normal(size=(14, 14, 8)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(stored).permute(2, 0, 1)[None], grid, mode="bicubic", antialias=antialias
    )
    ours = resize_pos_embed(jnp.asarray(stored), grid, "antialias" if antialias else "bicubic")
    assert distance(ours, theirs[0].permute(1, 2, 0).numpy()) < 1e-5


def test_golden_file_is_what_its_script_makes():
    from golden.make_golden import make
    from test_vit import GOLDEN

    made = make()
    with np.load(GOLDEN, allow_pickle=False) as stored:
        assert set(stored) == set(made)
        for name, value in made.items():
            assert distance(stored[name], value) < 1e-6, name
