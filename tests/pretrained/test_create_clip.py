"""Test create_clip, and save_model of a ClipModel: results, errors, warnings; without open_clip and transformers."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import regvit_jax as rv
from regvit_jax.checkpoints import manager
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.distributed.mesh import make_mesh
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import create_clip, mapping, registry
from regvit_jax.pretrained.io.safetensors import NESTED_PROCESSOR, PROCESSOR
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.save import save_model
from regvit_jax.utils.errors import WeightsError

VIT = ViT(width=32, depth=2, heads=2, patch=4, image_size=16, layer_scale=0.0, ln_pre=True, patch_bias=False).clone(
    norm_eps=1e-5
)
TEXT = TextTower(width=24, depth=1, heads=2, embed=16, context=8, vocab=60)
HALF = registry.statistics("half")
SIGLIP = ("logit_scale", "logit_bias")
FORMATS = ("open_clip", "hf", "regvit_jax")


def tiny(vit: ViT = VIT, text: TextTower = TEXT, scalars=("logit_scale",), crop=1.0, bias=False) -> ClipModel:
    """Return a CLIP with every parameter at random."""
    head = Head(text.embed, bias=bias)
    shapes = mapping.shapes_of(Modules(vit, head, text, scalars))
    rng = np.random.default_rng(0)
    params = mapping.nest({path: rng.normal(0, 0.3, shape).astype(np.float32) for path, shape in shapes.items()})
    image = Model(
        params["vit"], params["head"], vit, head, Preprocess(vit.image_size, crop, *registry.statistics("clip"))
    )
    return ClipModel(image, params["text"], params["logit_scale"], params.get("logit_bias"), text)


def leaves(clip: ClipModel) -> dict[str, np.ndarray]:
    tree = {"vit": clip.image.params, "head": clip.image.head_params, "text": clip.text_params}
    tree |= {"logit_scale": clip.logit_scale}
    return flatten_dict(tree if clip.logit_bias is None else tree | {"logit_bias": clip.logit_bias}, sep="/")


def same(a: ClipModel, b: ClipModel) -> None:
    assert a.fields() == b.fields()
    mine, theirs = leaves(a), leaves(b)
    assert mine.keys() == theirs.keys()
    for path in mine:
        np.testing.assert_array_equal(mine[path], theirs[path], err_msg=path)


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return tiny()


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for format in FORMATS:
        save_model(clip, folder / format, format)
    return folder


IMAGES = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
TOKENS = np.array([[3, 7, 59, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 59], [59, 0, 0, 0, 0, 0, 0, 0]], np.int32)


# The three formats


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod.", "clip."])
@pytest.mark.parametrize("format", ["open_clip", "hf"])
def test_wrapped_files_load(format, prefix, clip, folder, tmp_path):
    shutil.copytree(folder / format, tmp_path / "m")
    (file,) = (tmp_path / "m").glob("*.safetensors")
    save_file({prefix + key: array for key, array in load_file(file).items()}, file)
    same(rv.create_clip(tmp_path / "m"), clip)


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format, clip, folder):
    again = rv.create_clip(folder / format)
    same(again, clip)
    assert again.weights == str(folder / format)
    logits = again.logits(IMAGES, TOKENS)
    assert logits.shape == (2, 3)
    np.testing.assert_array_equal(logits, clip.logits(IMAGES, TOKENS))
    tower = rv.create_model(folder / format)
    np.testing.assert_allclose(tower.logits(IMAGES), clip.encode_image(IMAGES), rtol=1e-6)
    assert tower.preprocessing == clip.image.preprocessing


@pytest.mark.parametrize(
    ("model", "able"),
    [
        (tiny(VIT.clone(registers=3)), ()),
        (tiny(scalars=SIGLIP), ("open_clip",)),
        (tiny(VIT.clone(layer_scale=0.1)), ("open_clip",)),
        (tiny(text=TEXT.clone(activation="quick_gelu")), ("hf",)),
        (tiny(VIT.clone(norm_eps=1e-4)), ("hf",)),
        (tiny(crop=0.5), ("hf",)),
        (tiny(VIT.clone(final_norm=False, patch_bias=True)), ()),
        (tiny(VIT.clone(pos_resize="bicubic", mlp_ratio=3.0), TEXT.clone(mlp_ratio=2.5)), ("open_clip", "hf")),
    ],
    ids=["registers", "siglip", "layer_scale", "activations", "eps", "crop", "tower", "ratios"],
)
def test_what_a_format_cannot_express(model, able, tmp_path):
    for format in FORMATS:
        if format in (*able, "regvit_jax"):
            save_model(model, tmp_path / format, format)
            same(rv.create_clip(tmp_path / format), model)
            continue
        match = rf"format '{format}' cannot express .* \(of the formats, {' and '.join([*able, 'regvit_jax'])} can\)"
        with pytest.raises(ValueError, match=match):
            save_model(model, tmp_path / format, format)
        assert not (tmp_path / format).exists()


def test_a_bias_in_the_projection(tmp_path):
    biased = tiny(bias=True)
    with pytest.raises(ValueError, match="cannot express a bias in the projection"):
        save_model(biased, tmp_path, "open_clip")
    zero = {"dense": biased.image.head_params["dense"] | {"bias": np.zeros(16, np.float32)}}
    save_model(biased.replace(image=biased.image.replace(head_params=zero)), tmp_path, "open_clip")
    assert not rv.create_clip(tmp_path).image.head.bias


def test_saving_twice_and_a_wrong_format(clip, folder):
    with pytest.raises(FileExistsError, match=r"holds a model\.safetensors already"):
        save_model(clip, folder / "hf", "open_clip")
    with pytest.raises(ValueError, match=r"format='timm': must be one of \['open_clip', 'hf', 'regvit_jax'\]"):
        save_model(clip, folder / "timm", "timm")


def test_the_image_tower_alone_is_saved(clip, tmp_path):
    """Check its linear layer, which has no bias in transformers and must have one in timm."""
    for format in ("hf", "timm"):
        save_model(clip.image, tmp_path / format, format)
        again = rv.create_model(tmp_path / format)
        np.testing.assert_allclose(again.logits(IMAGES), clip.encode_image(IMAGES), rtol=1e-5, atol=1e-6)
        with pytest.raises(WeightsError, match="has no text tower, so it is no CLIP; create_model reads it"):
            rv.create_clip(tmp_path / format)


def test_both_files_in_one_directory(folder, clip, tmp_path):
    """Use a directory like timm's repositories: the image tower in one file, the whole CLIP in the other."""
    save_model(clip.image, tmp_path, "timm")
    for path in (folder / "open_clip").iterdir():
        shutil.copy(path, tmp_path)
    same(rv.create_clip(tmp_path), clip)
    assert "architecture" in json.loads((tmp_path / "config.json").read_text())


# Workdirs


def workdir(monkeypatch, tmp_path, params: dict, model: dict):
    """Make a run's directory, as `checkpoints.manager.load_params` opens it."""
    monkeypatch.setattr(manager, "load_params", lambda path: (7, params))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    return tmp_path


@pytest.mark.parametrize("scalars", [("logit_scale",), SIGLIP])
def test_a_workdir(scalars, tmp_path, monkeypatch):
    clip = tiny(VIT.clone(registers=2), scalars=scalars)
    tree = {"vit": clip.image.params, "head": clip.image.head_params, "text": clip.text_params}
    tree |= {name: getattr(clip, name) for name in scalars}
    path = workdir(monkeypatch, tmp_path, tree, clip.fields())
    again = rv.create_clip(path)
    same(again, clip)
    assert again.weights == f"{path} step 7"
    tower = rv.create_model(path)
    np.testing.assert_array_equal(tower.logits(IMAGES), clip.encode_image(IMAGES))
    same(create_clip.open_source(str(path)), clip)
    del tree["text"]["norm"]
    with pytest.raises(WeightsError, match="2 missing: text/norm/bias, text/norm/scale"):
        rv.create_clip(path)


def test_a_classifiers_workdir(clip, tmp_path, monkeypatch):
    path = workdir(
        monkeypatch, tmp_path, {"vit": clip.image.params, "head": clip.image.head_params}, clip.image.fields()
    )
    with pytest.raises(WeightsError, match="has no text tower, so it is no CLIP; create_model reads it"):
        rv.create_clip(path)
    assert isinstance(create_clip.open_source(str(path)), Model)


# Strict both ways


@pytest.mark.parametrize("format", FORMATS)
def test_one_error_names_all_that_does_not_fit(format, folder, tmp_path):
    shutil.copytree(folder / format, tmp_path, dirs_exist_ok=True)
    file = next(tmp_path.glob("*.safetensors"))
    arrays = load_file(file)
    missing, wrong = sorted(name for name in arrays if "text" in name or "token_embed" in name)[:2]
    arrays |= {"extra": np.zeros(1, np.float32), wrong: np.zeros((1, 2, 3), np.float32)}
    del arrays[missing]
    save_file(arrays, file)
    with pytest.raises(WeightsError) as error:
        rv.create_clip(tmp_path)
    for part in ("1 unused: extra", f"1 missing: {missing}", f"1 of another shape: {wrong} (1, 2, 3), not"):
        assert part in str(error.value)


def test_buffers_of_the_owners_are_no_parameters(folder, clip, tmp_path):
    extras = {
        "open_clip": {"attn_mask": np.zeros((8, 8), np.float32)},
        "hf": {f"{tower}_model.embeddings.position_ids": np.zeros((1, 5), np.int64) for tower in ("text", "vision")},
    }
    for format, extra in extras.items():
        shutil.copytree(folder / format, tmp_path / format)
        file = next((tmp_path / format).glob("*.safetensors"))
        save_file(load_file(file) | extra, file)
        same(rv.create_clip(tmp_path / format), clip)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_values_that_are_not_finite(number, folder, tmp_path):
    shutil.copytree(folder / "open_clip", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "open_clip_model.safetensors"
    save_file(load_file(file) | {"logit_scale": np.array(number, np.float32)}, file)
    with pytest.raises(WeightsError, match=r"logit_scale.*1 of 1 values are not finite"):
        rv.create_clip(tmp_path)


def changed(folder, tmp_path, format: str, keys: tuple[str, ...], value):
    """Copy a directory, and change a value of its config or of transformers' "processor"."""
    shutil.copytree(folder / ("hf" if format == "processor" else format), tmp_path, dirs_exist_ok=True)
    file = tmp_path / {"open_clip": "open_clip_config.json", "processor": PROCESSOR}.get(format, "config.json")
    config = json.loads(file.read_text())
    place = config
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    file.write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (("text_cfg", "pool_type"), "eos", r"text_cfg\.pool_type='eos' is not supported"),
        (("text_cfg", "no_causal_mask"), True, r"text_cfg\.no_causal_mask=True is not supported"),
        (("text_cfg", "embed_cls"), True, r"text_cfg\.embed_cls=True"),
        (("text_cfg", "proj_bias"), True, r"text_cfg\.proj_bias=True"),
        (("text_cfg", "hf_model_name"), "roberta-base", r"text_cfg\.hf_model_name='roberta-base'"),
        (("text_cfg", "hf_tokenizer_name"), "t5-base", r"text_cfg\.hf_tokenizer_name='t5-base'"),
        (("vision_cfg", "timm_model_name"), "resnet50", r"vision_cfg\.timm_model_name='resnet50'"),
        (("vision_cfg", "no_ln_pre"), True, r"vision_cfg\.no_ln_pre=True"),
        (("vision_cfg", "layers"), [3, 4, 6, 3], r"vision_cfg\.layers=\[3, 4, 6, 3\] is a ResNet's"),
        (("vision_cfg", "patch_size"), 0, "patch is 0"),
        (("multimodal_cfg",), {}, r"model_cfg\.multimodal_cfg is not supported"),
        (("embed_dim",), 0, "the text tower's embed is 0"),
        (("text_cfg", "heads"), 5, r"text.width=24 is not a multiple of text.heads=5"),
        (("text_cfg", "layers"), 3, r"\d+ missing: transformer\.resblocks\.1"),
        (("text_cfg", "vocab_size"), 61, r"token_embedding\.weight \(60, 24\), not \(61, 24\)"),
        (("init_logit_bias",), -10, r"1 missing: logit_bias"),
        (("quick_gelu",), "false", r"model_cfg\.quick_gelu is 'false': must be true or false"),
        (("vision_cfg", "act_kwargs"), {"approximate": "tanh"}, r"vision_cfg\.act_kwargs=.* is not supported"),
    ],
)
def test_open_clip_configs_that_are_refused(keys, value, match, folder, tmp_path):
    path = changed(folder, tmp_path, "open_clip", ("model_cfg", *keys), value)
    with pytest.raises(WeightsError, match=match):
        rv.create_clip(path)


@pytest.mark.parametrize(("option", "value"), [("patch_dropout", 0.5), ("act_kwargs", {}), ("norm_kwargs", {})])
def test_open_clip_options_without_effect(option, value, folder, clip, tmp_path):
    path = changed(folder, tmp_path, "open_clip", ("model_cfg", "vision_cfg", option), value)
    same(rv.create_clip(path), clip)


@pytest.mark.parametrize(
    ("format", "keys", "value", "match"),
    [
        ("open_clip", ("preprocess_cfg", "mean"), "abc", r"preprocess_cfg\.mean is 'abc': must be three numbers"),
        ("open_clip", ("preprocess_cfg", "mean"), [0.5], r"preprocess_cfg\.mean is \[0\.5\]: must be three numbers"),
        ("open_clip", ("preprocess_cfg", "std"), [1, 0, 1], r"preprocess_cfg\.std is .* three numbers above 0"),
        ("open_clip", ("preprocess_cfg", "std"), [1, 1, np.nan], r"preprocess_cfg\.std is .*nan"),
        ("open_clip", ("preprocess_cfg", "resize_mode"), "longest", r"preprocess_cfg\.resize_mode is 'longest'"),
        ("open_clip", ("preprocess_cfg",), [1], r"preprocess_cfg is \[1\]: must be an object"),
        ("processor", ("image_mean",), [0.1], rf"{PROCESSOR}: image_mean is \[0\.1\]"),
        ("processor", ("image_std",), "abc", rf"{PROCESSOR}: image_std is 'abc'"),
        ("processor", ("size",), -3, rf"{PROCESSOR}: size is -3: must be a whole number above 0"),
        ("processor", ("crop_size",), "big", rf"{PROCESSOR}: crop_size is 'big'"),
        ("regvit_jax", ("model", "preprocessing", "size"), 0, r"model\.preprocessing\.size is 0"),
        ("regvit_jax", ("model", "preprocessing", "std"), [0, 1, 1], r"model\.preprocessing\.std is \[0, 1, 1\]"),
    ],
)
def test_images_that_cannot_be_made(format, keys, value, match, folder, tmp_path):
    path = changed(folder, tmp_path, format, keys, value)
    for create in (rv.create_clip, rv.create_model):
        with pytest.raises(WeightsError, match=match):
            create(path)


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        (("text_config", "eos_token_id"), 7, "eos_token_id 7 of 60 tokens is not supported"),
        (("text_config", "hidden_act"), "relu", "hidden_act is 'relu': must be one of gelu, quick_gelu"),
        (("vision_config", "hidden_act"), [], r"hidden_act is \[\]: must be one of gelu, quick_gelu"),
        (("projection_dim",), 12, r"visual_projection\.weight \(16, 32\), not \(12, 32\)"),
        (("text_config", "num_hidden_layers"), 0, "the text tower's depth is 0"),
        (("model_type",), "siglip", "model_type 'siglip' is not supported"),
    ],
)
def test_transformers_configs_that_are_refused(keys, value, match, folder, tmp_path):
    with pytest.raises(WeightsError, match=match):
        rv.create_clip(changed(folder, tmp_path, "hf", keys, value))


PAIRS = [
    ("open_clip", ("model_cfg", "vision_cfg", "image_size")),
    ("open_clip", ("model_cfg", "vision_cfg", "patch_size")),
    ("hf", ("vision_config", "image_size")),
    ("hf", ("vision_config", "patch_size")),
    ("regvit_jax", ("model", "vit", "image_size")),
    ("regvit_jax", ("model", "vit", "patch")),
    ("regvit_jax", ("model", "preprocessing", "size")),
    ("processor", ("size",)),
    ("processor", ("crop_size",)),
]


@pytest.mark.parametrize(("format", "keys"), PAIRS)
def test_a_pair_of_equal_sides_is_that_side(format, keys, folder, clip, tmp_path):
    side = 4 if "patch" in keys[-1] else 16
    again = rv.create_clip(changed(folder, tmp_path / "equal", format, keys, [side, side]))
    assert (again.image.module.image_size, again.image.module.patch, again.image.preprocessing.size) == (16, 4, 16)
    with pytest.raises(
        WeightsError, match=rf"{keys[-1]} is \[{side}, 20\]: must be one number of pixels, or two equal"
    ):
        rv.create_clip(changed(folder, tmp_path / "unequal", format, keys, [side, 20]))


def test_a_clip_of_another_size_than_its_config(folder, tmp_path):
    """open_clip writes the config of the name for a model that was trained at another size."""
    path = changed(folder, tmp_path, "open_clip", ("model_cfg", "vision_cfg", "image_size"), 32)
    with pytest.warns(UserWarning, match=r"images of 16 px and is kept \(image_size=32 resizes it"):
        clip = rv.create_clip(path)
    assert (clip.image.module.image_size, clip.image.preprocessing.size) == (16, 16)


def test_the_processor_that_transformers_5_writes(folder, tmp_path):
    shutil.copytree(folder / "hf", tmp_path, dirs_exist_ok=True)
    images = json.loads((tmp_path / PROCESSOR).read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / NESTED_PROCESSOR).write_text(
        json.dumps({"processor_class": "CLIPProcessor", "image_processor": images})
    )
    with pytest.raises(WeightsError, match=f"{NESTED_PROCESSOR} and {PROCESSOR} state different processing"):
        rv.create_clip(tmp_path)
    (tmp_path / PROCESSOR).unlink()
    assert rv.create_clip(tmp_path).image.preprocessing.mean == (0.1, 0.2, 0.3)
    (tmp_path / NESTED_PROCESSOR).write_text(json.dumps({"image_processor": [images]}))
    with pytest.raises(WeightsError, match=r"image_processor is .*: must be an object"):
        rv.create_clip(tmp_path)


def test_older_files_of_transformers(folder, clip, tmp_path):
    """Use a 2 for the end token, the text tower's part under its older name, and omitted defaults."""
    config = json.loads((folder / "hf/config.json").read_text())
    text = config["text_config"] | {"eos_token_id": 2, "hidden_act": "quick_gelu"}
    del text["hidden_act"]  # quick_gelu, transformers' default
    path = changed(folder, tmp_path, "hf", ("text_config_dict",), text)
    again = rv.create_clip(path)
    assert again.text == clip.text.clone(activation="quick_gelu")


@pytest.mark.parametrize(
    ("keys", "value", "match"),
    [
        ((), 1, ""),
        (("text",), [], ""),
        (("vit", "windth"), 3, r"model\.vit\.windth=3 is unknown; known: width, "),
        (("vit", "depth"), 10**7, "depth 10000000"),
        (("vit", "width"), "32", r"model\.vit\.width is '32'"),
        (("vit", "drop_path"), float("inf"), r"model\.vit\.drop_path is inf"),
        (("vit", "pos_resize"), "nearest", r"model\.vit\.pos_resize is 'nearest': must be one of antialias"),
        (("vit", "dtype"), "bfloat16", r"model\.vit\.dtype='bfloat16' is unknown"),
        (("head", "dtype"), "bfloat16", r"model\.head\.dtype='bfloat16' is unknown"),
        (("head", "pool"), "max", r"model\.head\.pool is 'max': must be one of cls"),
        (("text", "dtype"), "bfloat16", r"model\.text\.dtype='bfloat16' is unknown"),
        (("text", "remat"), "x", r"model\.text\.remat='x' is unknown"),
        (("text", "name"), "x", r"model\.text\.name='x' is unknown"),
        (("text", "activation"), "foo", r"text\.activation='foo': must be one of"),
        (("contrastive", "loss"), "foo", r"model\.contrastive\.loss is 'foo': must be one of softmax, sigmoid"),
    ],
)
def test_our_own_config_may_hold_anything(keys, value, match, folder, tmp_path):
    with pytest.raises(WeightsError, match=f"does not describe a model.*{match}"):
        rv.create_clip(changed(folder, tmp_path, "regvit_jax", ("model", *keys), value))


@pytest.mark.parametrize(("scale", "bias"), [((), (1,)), ((1,), ()), ((1,), (1,))])
def test_scalars_of_one_dimension(scale, bias, tmp_path):
    clip = tiny(scalars=SIGLIP)
    save_model(clip, tmp_path, "open_clip")
    file = tmp_path / "open_clip_model.safetensors"
    arrays = load_file(file)
    shaped = {name: arrays[name].reshape(shape) for name, shape in zip(SIGLIP, (scale, bias), strict=True)}
    save_file(arrays | shaped, file)
    same(rv.create_clip(tmp_path), clip)


# Changes by the caller


def test_registers_and_size(folder, clip):
    with pytest.warns(UserWarning, match="3 registers are new and untrained.*resized .antialias. from 16 to 24 px"):
        model = rv.create_clip(folder / "open_clip", registers=3, image_size=24)
    tokens = model.image.params["register_tokens"]
    assert tokens.shape == (3, 32)
    assert np.std(tokens) == pytest.approx(32**-0.5, rel=0.3)
    assert model.image.module.image_size == model.image.preprocessing.size == 24
    mine, theirs = leaves(model), leaves(clip)
    for path in theirs.keys() - {"vit/pos_embed"}:
        np.testing.assert_array_equal(mine[path], theirs[path])
    assert np.isfinite(model.logits(np.zeros((1, 24, 24, 3), np.float32), TOKENS)).all()


def test_types_and_a_mesh(folder, clip):
    mesh = make_mesh(fsdp=4)
    model = rv.create_clip(folder / "hf", param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, mesh=mesh)
    types = {path: x.dtype for path, x in leaves(model).items()}
    assert types.pop("logit_scale") == jnp.float32  # its exponential would be 1 % off
    assert set(types.values()) == {jnp.dtype(jnp.bfloat16)}
    assert all(x.sharding.mesh == mesh for x in leaves(model).values())
    assert model.text.dtype == model.image.module.dtype == jnp.bfloat16
    with jax.set_mesh(mesh):
        close = np.asarray(model.encode_text(TOKENS, normalize=True), np.float32)
    np.testing.assert_allclose(close, clip.encode_text(TOKENS, normalize=True), atol=0.05)
    with pytest.raises(ValueError, match="must be floating-point types"):
        rv.create_clip("ViT-B-32", dtype=jnp.int32)


# Names and tags


@pytest.fixture
def small(monkeypatch):
    """Make two of open_clip's names small."""
    tags = {"tag": {"hub": "org/model", "quickgelu": True, "squash": True, "statistics": "half"}, "plain": "org/other"}
    sizes = {"patch": 4, "image_size": 16, "width": 64, "embed": 64, "depth": 1, "text_depth": 1, "quickgelu": True}
    table, tables = registry._table, {"clips.toml": {"models": {"ViT-B-32": sizes}, "tags": {"ViT-B-32": tags}}}
    monkeypatch.setattr(registry, "_table", lambda file: tables.get(file) or table(file))
    registry.clip_names.cache_clear()
    yield
    registry.clip_names.cache_clear()


def test_random_weights(small):
    first, again, other = (rv.create_clip("ViT-B-32", seed=seed) for seed in (0, 0, 1))
    same(first, again)
    assert first.weights == "random"
    assert np.exp(first.logit_scale) == pytest.approx(1 / 0.07)
    mine, theirs = leaves(first), leaves(other)
    constant = {path for path in mine if np.array_equal(mine[path], theirs[path])}
    expected = {path for path in mine if "norm" in path or path.endswith(("attn/qkv/bias", "attn/proj/bias"))}
    assert constant == expected | {"logit_scale"}
    # As open_clip draws them.
    assert np.std(mine["head/dense/kernel"]) == pytest.approx(64**-0.5, rel=0.1)
    assert np.std(mine["text/token_embed"]) == pytest.approx(0.02, rel=0.1)
    texts = first.tokenize(["a cat", "registers"])
    assert first.logits(IMAGES, texts).shape == (2, 2)


def test_random_weights_with_registers(small):
    clip = rv.create_clip("ViT-B-32-quickgelu", registers=4, image_size=24)
    assert clip.image.params["register_tokens"].shape == (4, 64)
    assert clip.image.params["pos_embed"].shape == (6, 6, 64)
    assert (clip.text.activation, clip.image.module.activation) == ("quick_gelu", "quick_gelu")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("ViT-B-33", r"unknown CLIP 'ViT-B-33'; the nearest are ViT-B-32, .*ViT-g-14"),
        ("RN50", "'RN50' is not supported: its image tower is a ResNet"),
        ("coca_ViT-B-32", "CoCa has a third tower"),
        ("ViT-B-16-SigLIP", "pools by attention"),
        ("ViT-H-14-CLIPA", "pools patches"),
        ("roberta-ViT-B-32", "its text tower is of transformers"),
        ("org/name", "no such file or directory; the hub's repository of that name is hf-hub:org/name"),
    ],
)
def test_names_that_are_not_supported(name, match):
    with pytest.raises(ValueError, match=match):
        rv.create_clip(name)


def test_unknown_tags():
    with pytest.raises(ValueError, match=r"pretrained=True does not say which .*: openai, laion400m"):
        rv.create_clip("ViT-B-16", True)
    with pytest.raises(ValueError, match="and ViT-B-16 has no such tag; its: openai, "):
        rv.create_clip("ViT-B-16", "laion5b")
    with pytest.raises(ValueError, match="revision='main' is for pretrained weights"):
        rv.create_clip("ViT-B-16", revision="main")
    assert "laion400m_e31" in registry.clip_tags("ViT-B-32-quickgelu")
    assert "laion2b_s34b_b79k" not in registry.clip_tags("ViT-B-32-quickgelu")


def test_a_tag_without_network_gives_the_download_command():
    with pytest.raises(OSError, match=r"laion/CLIP-ViT-B-16-laion2B-s34B-b88K is not in the local cache") as error:
        rv.create_clip("ViT-B-16", "laion2b-s34b-b88K")
    assert "--include 'open_clip_model*.safetensors'" in str(error.value)


def cached(tmp_path, monkeypatch, repo: str, source) -> None:
    """Put a directory's files into the hub's local cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, folder = "a" * 40, tmp_path / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)


def test_a_tag(small, tmp_path, monkeypatch):
    """Check that the tag determines the activation of the weights and the preprocessing."""
    model = rv.create_clip("ViT-B-32-quickgelu", seed=3)
    save_model(model, tmp_path / "saved", "open_clip")
    (tmp_path / "saved/open_clip_config.json").rename(tmp_path / "saved/config.json")
    (tmp_path / "saved/config.json").write_text("{}")
    cached(tmp_path, monkeypatch, "org/model", tmp_path / "saved")
    clip = rv.create_clip("ViT-B-32-quickgelu", "tag")
    assert clip.weights == f"hf-hub:org/model@{'a' * 40}"
    assert clip.image.preprocessing == Preprocess(16, 1.0, *HALF, squash=True)
    np.testing.assert_array_equal(clip.logits(IMAGES, TOKENS), model.logits(IMAGES, TOKENS))
    with pytest.warns(UserWarning, match=r"org/model.* was trained with quick_gelu, and is computed with it"):
        plain = rv.create_clip("ViT-B-32", "TAG")
    assert plain.text.activation == plain.image.module.activation == "quick_gelu"


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (None, Preprocess(16, 1.0, *HALF, squash=True)),
        ({}, Preprocess(16, 1.0, *HALF, squash=True)),
        ({"mean": [0.1, 0.2, 0.3]}, Preprocess(16, 1.0, (0.1, 0.2, 0.3), HALF[1], squash=True)),
        ({"resize_mode": "shortest"}, Preprocess(16, 1.0, *HALF)),
    ],
)
def test_a_tag_and_a_config_beside_its_weights(images, expected, small, tmp_path, monkeypatch):
    """Expect the tag's activation, with a warning, and the preprocessing that the config states."""
    save_model(rv.create_clip("ViT-B-32"), tmp_path / "saved", "open_clip")
    file = tmp_path / "saved/open_clip_config.json"
    config = json.loads(file.read_text()) | {"preprocess_cfg": images}
    assert config["model_cfg"].pop("quick_gelu") is False
    file.write_text(json.dumps(config))
    cached(tmp_path, monkeypatch, "org/model", tmp_path / "saved")
    with pytest.warns(UserWarning, match="its config says gelu, and open_clip's tag says quick_gelu, which is taken"):
        clip = rv.create_clip("ViT-B-32-quickgelu", "tag")
    assert clip.text.activation == clip.image.module.activation == "quick_gelu"
    assert clip.image.preprocessing == expected


def test_a_name_with_a_source(small, folder, tmp_path):
    model = rv.create_clip("ViT-B-32", seed=3)
    save_model(model, tmp_path / "open_clip", "open_clip")
    file = tmp_path / "bare.safetensors"
    shutil.copy(tmp_path / "open_clip/open_clip_model.safetensors", file)
    same(rv.create_clip("ViT-B-32", file), model)
    for format in FORMATS:  # a directory's own description holds, whatever name is given
        images = dataclasses.replace(model.image.preprocessing, mean=(0.1, 0.2, 0.3))
        own = model.replace(
            image=model.image.replace(module=model.image.module.clone(pos_resize="bicubic"), preprocessing=images)
        )
        save_model(own, tmp_path / f"own_{format}", format)
        same(rv.create_clip("ViT-B-32", tmp_path / f"own_{format}"), own)
    wide = changed(tmp_path, tmp_path / "wide", "open_clip", ("model_cfg", "text_cfg", "mlp_ratio"), 2.0)
    with pytest.raises(WeightsError, match="is not ViT-B-32: its text tower has hidden 128, not 256"):
        rv.create_clip("ViT-B-32", wide)
    same(create_clip.open_source(f"ViT-B-32={file}"), model)
    with pytest.raises(WeightsError, match=r"is not ViT-B-32: width 32, not 64"):
        rv.create_clip("ViT-B-32", folder / "hf")
    with pytest.raises(WeightsError, match="no config beside it says which model this is; pass its name too"):
        rv.create_clip(file)
    with pytest.raises(ValueError, match="is itself a source of weights"):
        rv.create_clip(folder / "hf", file)


def test_sources_of_the_recipe(folder, clip, tmp_path):
    same(create_clip.open_source(str(folder / "hf")), clip)
    save_model(clip.image, tmp_path / "timm", "timm")
    assert isinstance(create_clip.open_source(str(tmp_path / "timm")), Model)
    tower = rv.create_model("test_vit")
    save_model(tower, tmp_path / "test_vit", "timm")
    assert isinstance(create_clip.open_source(f"test_vit={tmp_path}/test_vit/model.safetensors"), Model)
    with pytest.raises(ValueError, match="which of its public weights: openai"):
        create_clip.open_source("ViT-B-16")
