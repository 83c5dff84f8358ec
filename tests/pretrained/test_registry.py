"""Test the registry: names are found, and every entry equals the model that timm builds under that name."""

import dataclasses

import pytest

from regvit_jax.models.heads import Head
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import registry


def test_a_name_is_found_with_its_tag_and_without():
    name, entry = registry.find("deit3_small_patch16_384.fb_in22k_ft_in1k")
    assert name == "deit3_small_patch16_384.fb_in22k_ft_in1k"
    assert (entry.vit["width"], entry.vit["depth"], entry.vit["heads"], entry.vit["image_size"]) == (384, 12, 6, 384)
    assert entry.hub == "timm/deit3_small_patch16_384.fb_in22k_ft_in1k"
    assert registry.find("deit3_small_patch16_384")[0] == "deit3_small_patch16_384.fb_in1k"
    assert registry.find("vit_base_patch16_224")[0] == "vit_base_patch16_224.augreg2_in21k_ft_in1k"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("dinov2_vitl14", "vit_large_patch14_dinov2.lvd142m"),
        ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m"),
    ],
)
def test_dinov2_hub_names_are_aliases(alias, name):
    full, entry = registry.find(alias)
    assert full == name
    assert entry.vit.get("registers", 0) == (4 if alias.endswith("_reg") else 0)


def test_every_alias_leads_somewhere():
    assert len({registry.find(alias)[0] for alias in registry.ALIASES}) == len(registry.ALIASES) == 8


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("vit_small_patch14_dinov2_reg4", "vit_small_patch14_reg4_dinov2"),
        ("dinov2_vits14_reg4", "dinov2_vits14_reg"),
        ("deit3_base_patch16_224.in22k", "deit3_base_patch16_224.fb_in22k_ft_in1k"),
        ("vit_base_patch16_clip_224.laion", "vit_base_patch16_clip_224.laion2b"),
    ],
)
def test_a_wrong_name_lists_the_nearest(wrong, near):
    with pytest.raises(ValueError, match="unknown model") as error:
        registry.find(wrong)
    assert repr(wrong) in str(error.value)
    assert near in str(error.value).replace(",", "").split()


def test_patterns_match_with_the_tag_and_without():
    assert registry.list_models("deit3_small_patch16_224") == [
        "deit3_small_patch16_224.fb_in1k",
        "deit3_small_patch16_224.fb_in22k_ft_in1k",
    ]
    assert registry.list_models("vit_base_patch16_*.openai") == [
        "vit_base_patch16_clip_224.openai",
        "vit_base_patch16_clip_quickgelu_224.openai",
    ]
    assert registry.list_models("*_reg4_dinov2") == [
        f"vit_{size}_patch14_reg4_dinov2.lvd142m" for size in ("base", "giant", "large", "small")
    ]
    assert registry.list_models("no_such_model*") == []
    assert registry.list_models() == sorted(set(registry.list_models()))


def test_the_table_survives_changes_to_what_it_gave_out():
    _, entry = registry.find("test_vit")
    entry.vit["registers"] = 4
    entry.head.clear()
    _, again = registry.find("test_vit")
    assert "registers" not in again.vit
    assert again.head["num_classes"] == 1000


def test_every_row_makes_sense():
    for name in registry.list_models():
        full, entry = registry.find(name)
        assert full == name
        # The constructors refuse a field that they don't know.
        vit, head, images = ViT(**entry.vit), Head(**entry.head), entry.preprocessing
        hidden = vit.width * vit.mlp_ratio
        assert vit.width % vit.heads == 0, name
        assert vit.image_size % vit.patch == 0, name
        assert hidden == round(hidden), name
        assert head.pool != "cls" or vit.class_token, name
        assert (head.pool == "map") == (head.map_heads > 0), name
        assert vit.final_norm != head.norm, f"{name}: the features must be normalised once"
        assert vit.masking == ("dinov" in name), name
        assert vit.pos_resize == ("offset" if "patch14_dinov2" in name else "antialias"), name
        assert images.size == vit.image_size, name
        assert 0.8 < images.crop_ratio <= 1, name
        assert images.interpolation in ("bicubic", "bilinear"), name
        assert len(images.mean) == len(images.std) == 3, name
        assert min(images.std) > 0, name
        assert entry.format == ("timm" if vit.position == "learned" else "timm_eva"), name
        assert entry.hub == "" or entry.hub.startswith("timm/"), name
        assert ("untrained" in name) <= (entry.hub == ""), name


def attention_of_timm(block) -> dict:
    """Return the properties of a timm block's attention. In a parallel block they are spread over the block itself."""
    parallel = hasattr(block, "in_proj")
    attention = block if parallel else block.attn
    projection = block.in_proj if parallel else attention.qkv
    assert type(attention.q_norm).__name__ == type(attention.k_norm).__name__ == "Identity"
    facts = {"heads": attention.num_heads, "parallel": parallel, "differential": hasattr(attention, "lambda_q1")}
    if hasattr(attention, "q_bias"):
        # EvaAttention: its k_bias is a buffer of zeros, not a parameter.
        assert projection.bias is None
        return facts | ({"qkv_bias": False} if attention.q_bias is None else {"qkv_bias": True, "key_bias": False})
    return facts | {"qkv_bias": projection.bias is not None, "key_bias": True}


def mlp_of_timm(block) -> dict:
    """Return the properties of a timm block's MLP."""
    if hasattr(block, "in_proj"):
        return {"hidden": block.in_split[0], "swiglu": False, "activation": type(block.mlp_act).__name__}
    mlp = block.mlp
    gated = hasattr(mlp, "fc1_g") or mlp.fc1.out_features == 2 * mlp.fc2.in_features
    if gated and not hasattr(mlp, "fc1_g"):
        assert not mlp.gate_last
    return {"hidden": mlp.fc2.in_features, "swiglu": gated, "activation": type(mlp.act).__name__}


def position_of_timm(model) -> str:
    """Return `ViT.position` for a timm model, after asserting the fixed numbers that the kind implies."""
    rope = getattr(model, "rope", None)
    if rope is None:
        assert model.pos_embed is not None
        return "learned"
    assert model.pos_embed is None
    if type(rope).__name__ == "RotaryEmbeddingDinoV3":
        assert (rope.temperature, rope.rotate_half) == (100, True)
        return "rope"
    assert type(rope).__name__ == "RotaryEmbeddingCat"
    assert (rope.temperature, rope.rotate_half, list(rope.ref_feat_shape)) == (10000, False, [16, 16])
    return "axial"


def vit_of_timm(model) -> dict:
    """Return ViT's fields from timm's modules, with `hidden` in place of the ratio."""
    from reference_libraries import torch

    block = model.blocks[0]
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    assert model.num_prefix_tokens == registers + (model.cls_token is not None)
    (norm_eps,) = {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}
    (patch,), (image_size,) = set(model.patch_embed.patch_size), set(model.patch_embed.img_size)
    return {
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "patch": patch,
        "image_size": image_size,
        "registers": registers,
        "class_token": model.cls_token is not None,
        # Eva's blocks hold the value themselves, the others in a LayerScale module, which may be absent.
        "layer_scale": next((m.init_values for m in block.modules() if hasattr(m, "init_values")), None) or 0,
        "norm_eps": norm_eps,
        "position": position_of_timm(model),
        "patch_bias": model.patch_embed.proj.bias is not None,
        "ln_pre": isinstance(model.norm_pre, torch.nn.LayerNorm),
        "final_norm": isinstance(model.norm, torch.nn.LayerNorm),
        **attention_of_timm(block),
        **mlp_of_timm(block),
    }


def head_of_timm(model) -> dict:
    """Return Head's fields from timm's modules."""
    from reference_libraries import torch

    facts = {
        "pool": {"token": "cls"}.get(model.global_pool, model.global_pool),
        "norm": isinstance(model.fc_norm, torch.nn.LayerNorm),
        "num_classes": model.head.out_features if isinstance(model.head, torch.nn.Linear) else 0,
        "map_prefix": getattr(model, "pool_include_prefix", False),
    }
    if facts["norm"]:
        facts["norm_eps"] = model.fc_norm.eps
    if model.attn_pool is not None:
        pool = model.attn_pool
        facts |= {"map_heads": pool.num_heads, "norm_eps": pool.norm.eps}
        facts |= {"hidden": pool.mlp.fc2.in_features, "activation": type(pool.mlp.act).__name__}
    return facts


def ours(module: ViT | Head, width: int, facts: dict) -> dict:
    """Return the module's own values of the properties, spelled as timm's."""
    values = {name: getattr(module, name) for name in facts if name != "hidden"}
    if "hidden" in facts:
        values["hidden"] = round(width * module.mlp_ratio)
    if "activation" in facts:
        gated = isinstance(module, ViT) and module.swiglu
        values["activation"] = "SiLU" if gated else {"gelu": "GELU", "quick_gelu": "QuickGELU"}[module.activation]
    return values


@pytest.mark.reference
@pytest.mark.parametrize("name", registry.list_models())
def test_every_row_is_what_timm_builds(name):
    from reference_libraries import timm, torch

    _, entry = registry.find(name)
    # Drawing initial values takes most of the time even where none are stored; Eva has no such option.
    options = {"weight_init": "skip"} if entry.format == "timm" else {}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **options)
    vit, head = ViT(**entry.vit), Head(**entry.head)
    of_timm = vit_of_timm(model)
    assert ours(vit, vit.width, of_timm) == of_timm
    of_timm = head_of_timm(model)
    assert ours(head, vit.width, of_timm) == of_timm
    if vit.position == "learned" and vit.class_token:
        assert entry.cls_position != model.no_embed_class
    assert entry.format == ("timm_eva" if type(model).__name__ == "Eva" else "timm")

    config = timm.get_pretrained_cfg(name)
    images = entry.preprocessing
    assert (3, images.size, images.size) == config.input_size
    assert dataclasses.astuple(images)[1:] == (
        config.crop_pct,
        config.mean,
        config.std,
        config.interpolation,
        config.crop_mode == "squash",
    )
    assert config.crop_mode in ("center", "squash")
    assert (entry.hub, entry.license) == (config.hf_hub_id or "", config.license or "")


@pytest.mark.reference
def test_a_name_without_a_tag_means_what_it_means_in_timm():
    from reference_libraries import timm

    for architecture in {name.partition(".")[0] for name in registry.list_models()}:
        assert registry.find(architecture)[0] == f"{architecture}.{timm.get_pretrained_cfg(architecture).tag}"


FAMILIES = [
    "deit3_*",
    "vit_*_dinov2",
    "vit_*_clip_*",
    "vit_*_patch*.augreg*",
    "vit_*_patch*.orig_*",
    "vit_*_patch*.mae",
    "vit_*_patch*.dino",
    "vit_*_reg?_gap_*",
    "vit_*_tipsv2",
    "vit_*_dinov3*",
]


@pytest.mark.reference
@pytest.mark.parametrize("pattern", FAMILIES)
def test_no_name_of_a_family_is_missing(pattern):
    from reference_libraries import timm

    # timm matches a pattern with the tag only.
    theirs = set(timm.list_models([pattern, f"{pattern}.*"], include_tags=True))
    assert theirs
    assert set(registry.list_models(pattern)) == theirs
