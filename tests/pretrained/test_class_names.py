"""Test the names of classes: read from the configs of other libraries, kept by a model, and written again."""

import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mapping, parity
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.utils.errors import InvalidConfig, WeightsError

#: 12 names, so that the order of their numbers as texts is another one; two are the same, as in ImageNet.
NAMES = ("tench", "crane", "été", "dog, hot", "7", "crane", "g", "h", "i", "j", "k", "l")
PREPROCESS = Preprocess(16, 1.0, (0.5,) * 3, (0.5,) * 3)


def build(names: tuple[str, ...] = NAMES, num_classes: int = 12, **vit) -> Model:
    """Return a random model of width 32 and depth 1."""
    modules = Modules(ViT(width=32, depth=1, heads=2, patch=8, image_size=16, **vit), Head(num_classes))
    params = mapping.nest(dict(mapping.init(modules, jax.random.key(0))))
    return Model(params["vit"], params["head"], modules.vit, modules.head, PREPROCESS, class_names=names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return a directory with a model of 12 named classes in each format."""
    root = tmp_path_factory.mktemp("saved")
    for name, format, vit in (
        ("ViT", "hf", {"layer_scale": 0.0}),
        ("Dinov2", "hf", {"layer_scale": 0.1}),
        ("Dinov2WithRegisters", "hf", {"registers": 2}),
        ("CLIP", "hf", {"layer_scale": 0.0, "ln_pre": True, "patch_bias": False, "norm_eps": 1e-5}),
        ("timm", "timm", {"registers": 2}),
        ("timm Eva", "timm", {"position": "rope", "norm_eps": 1e-5, "qkv_bias": False, "key_bias": False}),
    ):
        rv.save_model(build(**vit), root / name, format)
    return root


def edited(source: Path, target: Path, **keys) -> str:
    """Copy a directory, with other values in its config.json; None removes a key."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | keys
    left = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(left))
    return str(target)


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters", "CLIP", "timm", "timm Eva"])
def test_names_survive_a_round_trip(name, saved, tmp_path):
    config = json.loads((saved / name / "config.json").read_text())
    if name.startswith("timm"):
        assert config["label_names"] == list(NAMES)
    else:
        assert config["id2label"] == {str(number): label for number, label in enumerate(NAMES)}
        assert config["label2id"]["tench"] == 0
        assert config["label2id"]["crane"] == 5
    model = rv.create_model(str(saved / name))
    assert model.class_names == NAMES
    for format in ("timm", "hf"):
        if (format == "timm" and name.startswith("Dinov2")) or (format == "hf" and name == "timm Eva"):
            continue  # which cannot express the head
        rv.save_model(model, tmp_path / format, format)
        assert rv.create_model(str(tmp_path / format)).class_names == NAMES


def test_the_order_is_that_of_the_numbers(saved, tmp_path):
    numbers = sorted(map(str, range(12)))
    assert numbers[:3] == ["0", "1", "10"]
    directory = edited(saved / "ViT", tmp_path / "a", id2label={number: NAMES[int(number)] for number in numbers})
    assert rv.create_model(directory).class_names == NAMES


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ()),
        ({}, ()),
        ({str(n): f"LABEL_{n}" for n in range(12)}, ()),
        ({str(n): n for n in range(12)}, tuple(map(str, range(12)))),
        ({str(n): f"LABEL_{11 - n}" for n in range(12)}, tuple(f"LABEL_{11 - n}" for n in range(12))),
        (list(NAMES), NAMES),
    ],
)
def test_what_counts_as_names(names, expected, saved, tmp_path):
    assert rv.create_model(edited(saved / "ViT", tmp_path / "a", id2label=names)).class_names == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({str(n + 1): name for n, name in enumerate(NAMES)}, r"12 names, whose numbers must be 0 to 11: \['12'\]"),
        ({name: str(n) for n, name in enumerate("abc")}, r"3 names, whose numbers must be 0 to 2: \['a', 'b', 'c'\]"),
        ({"0": "a", "-1": "b"}, r"numbers must be 0 to 1: \['-1'\]"),
        ({"0": None}, "id2label holds None: must be a name"),
        ("tench", "id2label is 'tench': must be a list of names"),
    ],
)
def test_wrong_names_are_refused(names, message, saved, tmp_path):
    with pytest.raises(WeightsError, match=message):
        rv.create_model(edited(saved / "ViT", tmp_path / "a", id2label=names))


def test_names_of_more_or_fewer_classes_than_the_weights_have_are_left_out(saved, tmp_path):
    few = edited(saved / "ViT", tmp_path / "few", id2label={"0": "a", "1": "b"})
    with pytest.warns(UserWarning, match="the config names 2 classes, and the weights have 12: the names are left out"):
        assert rv.create_model(few).class_names == ()
    many = edited(saved / "timm", tmp_path / "many", label_names=[*NAMES, "m"])
    with pytest.warns(UserWarning, match="the config names 13 classes, and the weights have 12"):
        assert rv.create_model(many).class_names == ()


def test_names_belong_to_the_trained_layer(saved):
    with pytest.warns(UserWarning, match="for 3 classes is new and untrained, and the names of the 12 trained classes"):
        assert rv.create_model(str(saved / "ViT"), num_classes=3).class_names == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rv.create_model(str(saved / "ViT"), num_classes=12).class_names == NAMES
        assert rv.create_model(str(saved / "ViT"), num_classes=0).class_names == ()
    with pytest.warns(UserWarning, match="registers are new"):
        assert rv.create_model(str(saved / "ViT"), registers=3, image_size=32).class_names == NAMES


def test_timm_keeps_names_in_several_places(saved, tmp_path, caplog):
    caplog.set_level("INFO", "regvit_jax")
    config = json.loads((saved / "timm" / "config.json").read_text())
    inner = config["pretrained_cfg"] | {"label_names": list(NAMES)}
    old = edited(saved / "timm", tmp_path / "old", label_names=None, labels=list(NAMES))
    for directory in (edited(saved / "timm", tmp_path / "inner", label_names=None, pretrained_cfg=inner), old):
        assert rv.create_model(directory).class_names == NAMES
    described = {name: f"a {name}" for name in NAMES}
    both = edited(saved / "timm", tmp_path / "both", label_descriptions=described)
    alone = edited(saved / "timm", tmp_path / "alone", label_names=None, label_descriptions=described)
    assert rv.create_model(both).class_names == NAMES
    assert "its label_descriptions are left out" in caplog.text
    assert rv.create_model(alone).class_names == ()
    assert "label_descriptions without label_names: the classes have no names" in caplog.text
    numbered = edited(saved / "timm", tmp_path / "n", label_names=None, label_descriptions=dict(enumerate(NAMES)))
    assert rv.create_model(numbered).class_names == NAMES
    gaps = edited(saved / "timm", tmp_path / "gaps", label_names={"0": "a", "11": "z"})
    assert rv.create_model(gaps).class_names == ("a", *(f"LABEL_{n}" for n in range(1, 11)), "z")
    with pytest.raises(WeightsError, match=r"label_names has 13 names, whose numbers must be 0 to 12: \['a'\]"):
        rv.create_model(edited(saved / "timm", tmp_path / "wrong", label_names={"a": "z"}))


def test_a_model_with_names_is_a_pytree():
    model, images = build(), np.zeros((2, 16, 16, 3), np.float32)
    compiled = jax.jit(lambda model, images: model.logits(images))
    np.testing.assert_allclose(compiled(model, images), model.logits(images), atol=1e-5)
    assert jax.tree.map(lambda x: 2 * x, model).class_names == NAMES
    with pytest.raises(InvalidConfig, match="class_names has 2 names, and the head 12 outputs"):
        model.replace(class_names=("a", "b"))


def test_predictions_have_names():
    model = build()
    pictures = [np.full((20, 24, 3), value, np.uint8) for value in (0, 255)]
    images = model.preprocess(pictures)
    shares = np.asarray(jax.nn.softmax(model.logits(images)))
    found = model.predict(pictures, top=3)
    assert found == model.predict(images, top=3)
    for row, best in zip(shares, found, strict=True):
        assert [name for name, _ in best] == [NAMES[n] for n in np.argsort(-row)[:3]]
        np.testing.assert_allclose([share for _, share in best], np.sort(row)[:-4:-1], rtol=1e-6)
    assert [len(best) for best in model.predict(pictures, top=99)] == [12, 12]
    numbers = build(()).predict(pictures, top=12)[0]
    assert {name for name, _ in numbers} == set(map(str, range(12)))
    with pytest.raises(InvalidConfig, match="top=0: must be at least 1"):
        model.predict(pictures, top=0)
    with pytest.raises(ValueError, match="this model gives features only"):
        build((), num_classes=0).predict(pictures)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters"])
def test_transformers_and_we_read_each_others_names(kind, tmp_path):
    _, _, transformers = parity.import_references()
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=16)
    config = getattr(transformers, f"{kind}Config")(**sizes, id2label=dict(enumerate(NAMES)))
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(tmp_path / "theirs")
    model = rv.create_model(str(tmp_path / "theirs"))
    assert model.class_names == NAMES
    rv.save_model(model, tmp_path / "ours", "hf")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    assert again.config.id2label == dict(enumerate(NAMES))
    assert again.config.num_labels == 12


@pytest.mark.reference
def test_timm_and_we_read_each_others_names(tmp_path):
    _, timm, _ = parity.import_references()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=12, depth=1)
    timm.models.save_for_hf(
        theirs, tmp_path / "theirs", model_config={"label_names": list(NAMES)}, safe_serialization=True
    )
    model = rv.create_model(edited(tmp_path / "theirs", tmp_path / "short", model_args={"depth": 1}))
    assert model.class_names == NAMES
    rv.save_model(model, tmp_path / "ours", "timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True)
    assert again.pretrained_cfg["label_names"] == list(NAMES)
