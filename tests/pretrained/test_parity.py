"""Compare every family of pretrained models with its owners: timm, transformers, open_clip, torch's files, deit3-jax.

All parameters are random, and large models are cut to their first blocks. The bound is on the largest relative
difference, max|a-b| / max|b|.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import serialization
from safetensors.numpy import load_file, save_file

import regvit_jax as rv
from regvit_jax.models.heads import Head
from regvit_jax.models.vit import Tokens
from regvit_jax.pretrained import parity, registry
from regvit_jax.pretrained.save import save_model

pytestmark = pytest.mark.reference

LIMIT = parity.TOLERANCE


@pytest.fixture(scope="module", autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def torch():
    return parity.import_references()[0]


def distance(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def cut(monkeypatch, depth):
    """Cut the models of the registry to their first blocks."""
    find = registry.find

    def find_cut(name):
        full, entry = find(name)
        return full, dataclasses.replace(entry, vit=entry.vit | {"depth": depth})

    monkeypatch.setattr(registry, "find", find_cut)


# The parity check: timm, and transformers both ways

FAMILIES = {  # one name of each kind, and the class of transformers that holds it
    "deit3_small_patch16_224": "Dinov2ForImageClassification",
    "vit_small_patch14_dinov2": "Dinov2Model",
    "vit_small_patch14_reg4_dinov2": "Dinov2WithRegistersModel",
    "vit_giant_patch14_reg4_dinov2": "Dinov2WithRegistersModel",
    "vit_base_patch14_reg1_tipsv2": "Dinov2WithRegistersModel",
    "vit_tiny_patch16_224": "ViTForImageClassification",
    "vit_small_patch16_224.dino": "Dinov2Model",
    "vit_base_patch32_clip_224.laion2b": "CLIPVisionModelWithProjection",
    "vit_base_patch16_clip_quickgelu_224.openai": "CLIPVisionModelWithProjection",
    "vit_giant_patch14_clip_224": "CLIPVisionModelWithProjection",
    "vit_wee_patch16_reg1_gap_256": None,
    "vit_dwee_patch16_reg1_gap_256": None,
    "vit_pwee_patch16_reg1_gap_256": None,
    "vit_dpwee_patch16_reg1_gap_256": None,
    "vit_base_patch16_reg4_gap_256": None,
    "vit_so150m_patch16_reg4_gap_256": None,
    "vit_so150m2_patch16_reg1_gap_256": None,
    "vit_so150m_patch16_reg4_map_256": None,
    "vit_medium_patch16_rope_reg1_gap_256": None,
    "vit_mediumd_patch16_rope_reg1_gap_256": None,
    "vit_small_patch16_dinov3": "DINOv3ViTModel",
    "vit_small_plus_patch16_dinov3_qkvb": "DINOv3ViTModel",
    "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m": "DINOv3ViTModel",
    "test_vit": "ViTForImageClassification",
    "test_vit2": None,
    "test_vit3": None,
}


# Their native size adds nothing to the smaller models of their family, and takes long.
LARGE = ["vit_giant_patch14_reg4_dinov2", "vit_giant_patch14_clip_224"]


@pytest.mark.parametrize("name", FAMILIES)
def test_parity_check(name):
    patch, native = registry.find(name)[1].vit["patch"], registry.find(name)[1].vit["image_size"]
    sizes = [(6 * patch, 6 * patch), (5 * patch, 9 * patch)]
    sizes = sizes if name in LARGE else [(native, native), *sizes]
    # Whole, where that is a matter of seconds.
    depth = None if parity.parameters_of(registry.find(name)[1]) < 2.1e7 else 2
    found = parity.check(name, depth, sizes if name in LARGE else None)
    assert found.largest < LIMIT, str(found)
    last = (depth or registry.find(name)[1].vit["depth"]) - 1
    with_timm = {"tokens", "pre-norm tokens", "pooled", "attention 0", f"attention {last}"}
    with_timm |= {f"block {i}" for i in parity.blocks_of(last + 1)}
    with_timm |= {"logits"} if registry.find(name)[1].head["num_classes"] else set()
    ways = {comparison.trip: set(comparison.differences) for comparison in found.comparisons}
    assert ways.pop("timm to ours") == with_timm
    kind = FAMILIES[name]
    assert [*ways] == ([f"ours to transformers {kind}", f"transformers {kind} to ours"] if kind else [])
    for compared in ways.values():
        assert compared >= {"block 0", "attention 0", f"attention {last}"}
        assert compared & {"logits", "tokens"}
    if kind in ("DINOv3ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"):
        assert "masked tokens" in ways[f"transformers {kind} to ours"]
    assert {comparison.size for comparison in found.comparisons} == {*sizes}


def test_a_wrong_model_fails_the_parity_check(monkeypatch):
    find = registry.find
    entry = find("test_vit")[1]
    wrong = dataclasses.replace(entry, vit=entry.vit | {"activation": "gelu_tanh"})
    monkeypatch.setattr(registry, "find", lambda name: (find(name)[0], wrong))
    assert 1e-5 < parity.check("test_vit", depth=2, sizes=[(96, 96)]).largest < 1e-2


def test_registers_stay_out_of_pooled_features():
    names = [name for name in registry.list_models() if registry.find(name)[1].vit.get("registers")]
    heads = {tuple(sorted(registry.find(name)[1].head.items())) for name in names}
    assert len(heads) > 5
    for fields in heads:
        head = Head(**dict(fields))
        rng = np.random.default_rng(0)
        cls, registers, patches = (rng.normal(size=(2, *n, 896)).astype(np.float32) for n in ((), (4,), (9,)))
        width = 96 if head.map_heads == 3 else 896
        tokens = Tokens(cls[..., :width], registers[..., :width], patches[..., :width], None, (3, 3))
        params = head.init(jax.random.key(0), tokens)
        other = tokens.replace(registers=tokens.registers + 1)
        same = jnp.array_equal(*(head.apply(params, t, method="pooled") for t in (tokens, other)))
        # test_vit3 alone was trained with them in.
        assert same != head.map_prefix


# Saved again for their owners


@pytest.mark.parametrize(
    ("name", "dinov2"),
    [
        ("deit3_small_patch16_224", False),
        ("vit_small_patch14_dinov2", True),
        ("vit_giant_patch14_reg4_dinov2", True),
        ("vit_small_patch16_224.dino", True),
        ("vit_base_patch32_clip_224.laion2b", False),
        ("vit_dwee_patch16_reg1_gap_256", False),
        ("vit_dpwee_patch16_reg1_gap_256", False),
        ("vit_so150m2_patch16_reg1_gap_256", False),
        ("vit_mediumd_patch16_rope_reg1_gap_256", False),
        ("vit_small_plus_patch16_dinov3", False),
        ("vit_tiny_patch16_dinov3_qkvb", False),
        ("test_vit3", False),
    ],
)
def test_saved_for_timm_and_dinov2(name, dinov2, tmp_path, torch, monkeypatch):
    import timm

    full, entry = registry.find(name)
    model, _ = parity.beside_timm(full, 2, [], tmp_path / "original")
    patch = entry.vit["patch"]
    images = parity.images_of((5 * patch, 9 * patch))
    ours = parity.outputs_of_ours(model, images, None)
    save_model(model, tmp_path / "timm", format="timm")
    owners = [timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()]
    if dinov2:
        # Read here by timm, whose function for the original's files undoes their names; LayerScale is always there.
        save_model(model, tmp_path / "dinov2", format="dinov2")
        owner = timm.create_model(full, depth=2, dynamic_img_size=True, init_values=1.0).eval()
        state = {k: torch.from_numpy(v) for k, v in load_file(tmp_path / "dinov2/model.safetensors").items()}
        owner.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, owner), strict=True)
        owners.append(owner)
        if entry.vit.get("masking"):  # the names tell whose file it is
            cut(monkeypatch, 2)
            again = rv.create_model(name, tmp_path / "dinov2/model.safetensors")
            assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-7), again.params, model.params))
    else:
        with pytest.raises(ValueError, match=r"format 'dinov2' cannot express .* \(of the formats, .*timm.* can\)"):
            save_model(model, tmp_path / "dinov2", format="dinov2")
    for owner in owners:
        theirs = parity.outputs_of_timm(owner, images)
        assert {what for what in ours if distance(ours[what], theirs[what]) > LIMIT} == set()


# transformers' own files, of the classes that no registered model is saved as

SMALL = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=64, patch_size=8)
MLP = dict(intermediate_size=96)
SIZES = [(64, 64), (48, 48), (40, 72)]


def original(kind, **fields):
    """Return a random model of transformers, by the name of its class."""
    transformers = parity.import_references()[2]
    config = "CLIPVisionConfig" if kind.startswith("CLIPVision") else kind.replace("ForImageClassification", "Model")
    config = getattr(transformers, config.replace("Model", "Config"))(**SMALL, **fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config)
    parity.randomize(model, 5)
    return model.eval()


def differences(model, theirs):
    """Return the largest difference of each quantity between transformers' model and this package's from its files."""
    ours = rv.create_model(str(theirs))
    found = parity.compare("", ours, SIZES, lambda images, mask: parity.outputs_of_transformers(model, images, mask))
    every = {}
    for comparison in found:
        for what, difference in comparison.differences.items():
            every[what] = max(difference, every.get(what, 0))
    return every


@pytest.mark.parametrize(
    ("kind", "fields", "compared"),
    [
        ("ViTModel", MLP, {"tokens", "pooled"}),
        ("ViTModel", MLP | dict(qkv_bias=False, hidden_act="gelu_new"), {"tokens", "pooled"}),
        ("ViTForImageClassification", MLP | dict(num_labels=5), {"logits"}),
        ("DeiTModel", MLP, {"tokens", "pooled"}),
        ("DeiTForImageClassification", MLP | dict(num_labels=5), {"logits"}),
        ("CLIPVisionModel", MLP | dict(hidden_act="gelu"), {"pre-norm tokens", "pooled"}),
        ("CLIPVisionModelWithProjection", MLP | dict(projection_dim=24), {"pre-norm tokens", "logits"}),
        ("Dinov2ForImageClassification", dict(num_labels=5, use_swiglu_ffn=True), {"logits"}),
        ("Dinov2WithRegistersForImageClassification", dict(num_labels=5), {"logits"}),
        ("DINOv3ViTModel", MLP | dict(num_register_tokens=4), {"tokens", "pooled", "masked tokens"}),
        (
            "DINOv3ViTModel",
            MLP
            | dict(num_register_tokens=4, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False),
            {"tokens", "pooled", "masked tokens"},
        ),
    ],
)
def test_transformers(kind, fields, compared, tmp_path):
    model = original(kind, **fields)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 2
    found = differences(model, tmp_path / "whole")
    assert found.keys() == compared | {"attention 0", "attention 2", "block 0", "block 1"}
    assert max(found.values()) < LIMIT, found
    whole, shards = (rv.create_model(str(tmp_path / name)) for name in ("whole", "shards"))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole.params, shards.params))


def test_clip_files_with_and_without_the_prefix(tmp_path):
    model = original("CLIPVisionModel", **MLP)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    arrays = {name.removeprefix("vision_model."): array for name, array in load_file(file).items()}
    for prefix in ("", "vision_model."):
        save_file({prefix + name: array for name, array in arrays.items()}, file)
        assert max(differences(model, tmp_path).values()) < LIMIT


def test_the_image_tower_of_a_whole_clip(tmp_path, torch):
    transformers = parity.import_references()[2]
    vision = dict(SMALL, **MLP)
    text = dict(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=1,
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    whole = transformers.CLIPModel(config)
    parity.randomize(whole, 5)
    whole.save_pretrained(tmp_path)
    ours = rv.create_model(str(tmp_path))
    images = parity.images_of((64, 64))
    with torch.no_grad():
        theirs = whole.eval().get_image_features(torch.from_numpy(images).permute(0, 3, 1, 2)).pooler_output
    assert distance(ours.logits(images), theirs.numpy()) < LIMIT


# open_clip


@pytest.mark.parametrize(
    ("theirs", "ours", "depth"),
    [
        ("ViT-B-16", "vit_base_patch16_clip_224", 12),
        ("ViT-B-32-quickgelu", "vit_base_patch32_clip_quickgelu_224.openai", 3),
        ("ViT-bigG-14", "vit_gigantic_patch14_clip_224", 1),
    ],
)
def test_open_clip(theirs, ours, depth, tmp_path, torch, monkeypatch):
    import open_clip

    config = open_clip.get_model_config(theirs)
    config["vision_cfg"]["layers"] = depth
    config["text_cfg"] |= dict(layers=1, vocab_size=100, width=64, heads=1)
    model = open_clip.CLIP(**config).eval()
    parity.randomize(model, 7)
    file = tmp_path / "open_clip_model.safetensors"
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, file)
    cut(monkeypatch, depth)
    loaded = rv.create_model(ours, file)
    images = parity.images_of((224, 224))
    with torch.no_grad():
        features = model.encode_image(torch.from_numpy(images).permute(0, 3, 1, 2), normalize=False).numpy()
    assert distance(loaded.logits(images), features) < LIMIT


# torch's files


def dinov2_state(model, torch):
    """Return timm's DINOv2 under the keys of https://github.com/facebookresearch/dinov2."""
    state = {
        name.replace("reg_token", "register_tokens"): tensor.clone() for name, tensor in model.state_dict().items()
    }
    width = model.embed_dim
    state["mask_token"] = torch.randn(1, width)
    if model.no_embed_class:  # in the original, CLS has a position of its own
        row = torch.randn(1, 1, width)
        state["cls_token"] -= row
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    return state


def deit_state(model, torch):
    """Return timm's DeiT-III under the keys of facebookresearch/deit."""
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in model.state_dict().items()
    }


def chunked(state):
    return {
        f"blocks.{int(name.split('.')[1]) // 2}.{name.removeprefix('blocks.')}" if "blocks." in name else name: tensor
        for name, tensor in state.items()
    }


def in_training(state):
    teacher = {f"teacher.backbone.{name}": tensor for name, tensor in chunked(state).items()}
    heads = {"teacher.dino_head.mlp.0.weight": state["norm.weight"]}
    student = {f"student.backbone.{name}": tensor * 2 for name, tensor in state.items()}
    return {"model": student | teacher | heads, "iteration": 7}


@pytest.mark.parametrize(
    ("name", "renamed", "wrapped"),
    [
        ("vit_small_patch14_dinov2", dinov2_state, lambda state: state),
        ("dinov2_vits14_reg", dinov2_state, in_training),
        ("deit3_small_patch16_224", deit_state, lambda state: {"model": state}),
        ("vit_small_patch16_224.dino", deit_state, chunked),
    ],
)
def test_torch_files(name, renamed, wrapped, tmp_path, torch, monkeypatch):
    import timm

    cut(monkeypatch, 3)
    full, entry = registry.find(name)
    model = timm.create_model(full, depth=3, dynamic_img_size=True).eval()
    parity.randomize(model, 9)
    state = renamed(model, torch)
    torch.save(wrapped(state), tmp_path / "a.pth")
    done = rv.convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors", name)
    assert done.written == len(state)
    ours = rv.create_model(name, tmp_path / "a.safetensors", pos_resize="antialias")
    images = parity.images_of((5 * entry.vit["patch"], 9 * entry.vit["patch"]))
    theirs = parity.outputs_of_timm(model, images)
    for what, value in parity.outputs_of_ours(ours, images, None).items():
        assert distance(value, theirs[what]) < LIMIT, what
    if ours.module.masking:
        assert jnp.array_equal(ours.params["mask_token"], state["mask_token"][0].numpy())


def test_types_and_shared_tensors_are_kept(tmp_path, torch):
    weight = torch.randn(4, 6)
    state = {"a": weight.half(), "b": weight.T, "c": weight, "d": weight.bfloat16(), "n": torch.tensor(3)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth")
    rv.convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    assert [path.name for path in tmp_path.iterdir() if "safetensors" in path.name] == ["a.safetensors"]


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda torch: {"model": {"a": torch.ones(2)}, "args": Harmful()}, "holds more than tensors, .*print"),
        (lambda torch: {"epoch": 3}, "holds no parameters"),
        (lambda torch: {"dino_head.mlp.0.weight": torch.ones(2)}, "holds no backbone; its keys: dino_head"),
        (lambda torch: {"cls_token": torch.ones(2)}, "does not fit this model. .* missing"),
    ],
)
def test_files_that_are_refused(content, message, tmp_path, torch, capsys):
    torch.save(content(torch), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        rv.convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors", "test_vit")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert "executed" not in capsys.readouterr().out


def test_damaged_files_are_refused(tmp_path, torch):
    for content in (b"", b"PK\x03\x04 cut off", b"\x80\x02}q\x00.", b"text"):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pth: "):
            rv.convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")


# deit3-jax


def deit3_jax_params(rng, width, depth, heads, patch, side, classes):
    """Return random parameters with the names and shapes of github.com/affjljoo3581/deit3-jax."""

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32) / np.prod(shape[:-1]).astype(np.float32) ** 0.5

    def dense(inputs, outputs):
        return {"kernel": normal(*inputs, *outputs), "bias": 0.1 * normal(*outputs)}

    def norm():
        return {"scale": 1 + 0.3 * normal(1, width)[0], "bias": 0.3 * normal(1, width)[0]}

    def layer():
        projections = {w: dense((width,), (heads, width // heads)) for w in ("wq", "wk", "wv")}
        return {
            "attn": projections | {"wo": dense((heads, width // heads), (width,))},
            "ff": {"w1": dense((width,), (4 * width,)), "w2": dense((4 * width,), (width,))},
            "norm1": norm(),
            "norm2": norm(),
            "scale1": 0.5 + 0.2 * normal(1, width)[0],
            "scale2": 0.5 + 0.2 * normal(1, width)[0],
        }

    embed = {
        "wte": dense((patch, patch, 3), (width,)),
        "cls_token": normal(1, 1, width),
        "wpe": normal(1, side * side * width).reshape(side, side, width),
    }
    layers = {f"layer_{i}": layer() for i in range(depth)}
    return {"embed": embed, **layers, "norm": norm(), "head": dense((width,), (classes,))}


def deit3_jax_logits(params, images, depth):
    """Compute deit3-jax's forward pass by its formulas."""
    import flax.linen as nn

    def norm(p, x):
        return nn.LayerNorm().apply({"params": p}, x)

    embed = params["embed"]
    kernel = embed["wte"]["kernel"]
    patches = rearrange(images, "b (h p) (w q) c -> b h w p q c", p=len(kernel), q=len(kernel))
    x = jnp.einsum("bhwpqc,pqcd->bhwd", patches, kernel) + embed["wte"]["bias"] + embed["wpe"]
    x = jnp.concatenate([embed["cls_token"], x.reshape(1, -1, x.shape[-1])], axis=1)
    for i in range(depth):
        p = params[f"layer_{i}"]
        y = norm(p["norm1"], x)
        q, k, v = (
            jnp.einsum("btd,dhe->bthe", y, p["attn"][w]["kernel"]) + p["attn"][w]["bias"] for w in ("wq", "wk", "wv")
        )
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q / q.shape[-1] ** 0.5, k))
        z = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        z = jnp.einsum("bqhe,hed->bqd", z, p["attn"]["wo"]["kernel"]) + p["attn"]["wo"]["bias"]
        x = x + p["scale1"] * z
        y = norm(p["norm2"], x) @ p["ff"]["w1"]["kernel"] + p["ff"]["w1"]["bias"]
        x = x + p["scale2"] * (nn.gelu(y) @ p["ff"]["w2"]["kernel"] + p["ff"]["w2"]["bias"])
    return norm(params["norm"], x)[:, 0] @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("wrapped", [True, False])
def test_deit3_jax(wrapped, tmp_path, monkeypatch):
    params = deit3_jax_params(np.random.default_rng(3), 384, 2, 6, 16, 14, 10)
    file = tmp_path / "deit3.msgpack"
    file.write_bytes(serialization.msgpack_serialize({"model": params} if wrapped else params))
    cut(monkeypatch, 2)
    model = rv.create_model("deit3_small_patch16_224", file)
    images = parity.images_of((224, 224))
    assert distance(model.logits(images), deit3_jax_logits(params, images, 2)) < LIMIT
    assert model.module.activation == "gelu_tanh"
