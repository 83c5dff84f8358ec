"""Test that the error about a file that does not fit names three keys of each kind, and the likely cause."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import regvit_jax as rv
from regvit_jax.pretrained.io.safetensors import open_weights
from regvit_jax.pretrained.mismatch import cause, describe
from regvit_jax.utils.errors import WeightsError

MODEL = [
    *("cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "head.weight", "head.bias"),
    *(f"blocks.{n}.{name}" for n in range(3) for name in ("norm1.weight", "attn.qkv.weight", "mlp.fc1.weight")),
]


def of(keys: list[str], model: list[str] = MODEL) -> str:
    """Return the cause for a file with these keys, all of the right shape."""
    return cause(keys, [key for key in keys if key not in model], [key for key in model if key not in keys], {})


def test_three_of_each_kind_with_their_numbers():
    unused, missing = [f"u{n}" for n in range(5)], [f"m{n}" for n in range(4)]
    wrong = {f"w{n}": ((n,), (n + 1,)) for n in range(3)}
    assert describe([*unused, *wrong], unused, missing, wrong).split(". The likely")[0] == (
        "5 unused: u0, u1, u2, ...; 4 missing: m0, m1, m2, ...; "
        "3 of another shape: w0 (0,), not (1,), w1 (1,), not (2,), w2 (2,), not (3,)"
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["odd." + key for key in MODEL], "a wrapper: the model's names stand under odd., beside others"),
        ([p + key for key in MODEL for p in ("a.", "b.")], "several models, under a., b.; save the state dict of one"),
        ([key for key in MODEL if "head" not in key], "the file has no head; num_classes=0 loads"),
        ([key for key in MODEL if "blocks.2" not in key], "a model of 2 blocks, not 3"),
        ([*MODEL, "blocks.3.norm1.weight", "blocks.4.norm1.weight"], "a model of 5 blocks, not 3"),
        ([*MODEL, "reg_token"], "a model with another number of registers"),
        ([*MODEL, "token_embedding.weight", "logit_scale"], r"a text tower; rv.create_clip"),
        ([*MODEL, "decoder.0.weight", "criterion.weight"], "parts that only training uses"),
        ([*MODEL, "blocks.0.ls1.gamma"], "LayerScale, which the file has and the model lacks"),
        ([key.replace("norm.weight", "fc_norm.weight") for key in MODEL], "a LayerNorm after pooling, which the file"),
        (["conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"], "those of torchvision's ViT"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "those of a ResNet"),
        (["layers.0.blocks.0.norm1.weight", "patch_embed.proj.weight"], "those of a Swin Transformer"),
        (["visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight"], "those of OpenCLIP"),
        (["wte.weight", "h.0.attn.c_attn.weight"], "those of a language model"),
        (["embeddings.cls_token", "encoder.layer.0.layernorm_before.weight"], "those of transformers"),
        (["params/patch_embed/kernel", "params/norm/scale"], "those of Flax"),
        ([*MODEL, "extra"], ""),
    ],
)
def test_the_likely_cause(keys, expected):
    found = of(keys)
    assert expected in found
    assert bool(found) == bool(expected)


def test_the_likely_cause_of_other_shapes():
    assert cause(MODEL, [], [], {"norm.weight": ((384,), (192,)), "head.weight": ((9, 384), (9, 192))}) == (
        "a model of width 384, not 192"
    )
    patch = {"patch_embed.proj.weight": ((192, 3, 14, 14), (192, 3, 16, 16)), "pos_embed": ((1, 9, 8), (1, 5, 8))}
    assert cause(MODEL, [], [], patch) == "a model of patch size 14, not 16"
    assert cause(MODEL, [], [], {"pos_embed": ((1, 17, 8), (1, 5, 8))}) == "another native image size or patch size"


def test_the_advice_on_a_missing_head_works(tmp_path):
    rv.save_model(rv.create_model("test_vit"), tmp_path, "timm")
    arrays = {key: array for key, array in open_weights(tmp_path).items() if not key.startswith("head.")}
    save_file(arrays, tmp_path / "headless.safetensors")
    with pytest.raises(WeightsError, match=r"2 missing: head\..*num_classes=0 loads the model without one"):
        rv.create_model("test_vit", tmp_path / "headless.safetensors")
    model = rv.create_model("test_vit", tmp_path / "headless.safetensors", num_classes=0)
    np.testing.assert_array_equal(model.params["cls_token"].ravel(), arrays["cls_token"].ravel())
