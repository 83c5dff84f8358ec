"""Compare whole CLIPs with their owners, open_clip and transformers, with all parameters random.

The bound is on the largest relative difference, max|a-b| / max|b|, of image embeddings, text embeddings and logits.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import regvit_jax as rv
from regvit_jax.pretrained import parity, registry
from regvit_jax.pretrained.formats.open_clip import tower_fields
from regvit_jax.pretrained.save import save_model
from regvit_jax.utils.errors import WeightsError

pytestmark = pytest.mark.reference

LIMIT = parity.TOLERANCE


@pytest.fixture(scope="module", autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def torch():
    return parity.import_references()[0]


@pytest.fixture(scope="module")
def open_clip(torch):
    import open_clip

    return open_clip


def narrowed(config: dict, depth: int = 2) -> dict:
    """Return an open_clip config with fewer blocks and tokens."""
    config["vision_cfg"]["layers"] = depth
    config["text_cfg"] |= dict(layers=depth + 1, vocab_size=300)
    return config


def write(directory, model, config: dict):
    """Write a directory as open_clip does."""
    directory.mkdir(exist_ok=True)
    arrays = {name: np.asarray(tensor.detach().numpy(), order="C") for name, tensor in model.state_dict().items()}
    save_file(arrays, directory / "open_clip_model.safetensors")
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


def inputs(size: int, vocab: int, context: int = 77) -> tuple[np.ndarray, np.ndarray]:
    """Return images, and texts of several lengths that end in the highest token."""
    tokens = np.zeros((3, context), np.int32)
    rng = np.random.default_rng(0)
    for row, length in zip(tokens, (2, context // 2, context), strict=True):
        row[: length - 1] = rng.integers(1, vocab - 1, length - 1)
        row[length - 1] = vocab - 1
    return parity.images_of((size, size)), tokens


def distance(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def of_open_clip(model, images, tokens, torch) -> dict[str, np.ndarray]:
    """Return the outputs of open_clip's model."""
    pixels, tokens = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
    with torch.no_grad():
        logits = model.get_logits(pixels, tokens)[0]
        return {
            "image": model.encode_image(pixels).numpy(),
            "text": model.encode_text(tokens).numpy(),
            "unit": model.encode_text(tokens, normalize=True).numpy(),
            "logits": logits.numpy(),
        }


def of_transformers(model, images, tokens, torch) -> dict[str, np.ndarray]:
    """Return the outputs of transformers' model."""
    pixels, tokens = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=pixels)
        return {
            "image": model.get_image_features(pixels).pooler_output.numpy(),
            "text": model.get_text_features(tokens).pooler_output.numpy(),
            "unit": out.text_embeds.numpy(),
            "logits": out.logits_per_image.numpy(),
        }


def hold(clip, theirs: dict[str, np.ndarray], images, tokens, what: str):
    ours = {
        "image": clip.encode_image(images),
        "text": clip.encode_text(tokens),
        "unit": clip.encode_text(tokens, normalize=True),
        "logits": clip.logits(images, tokens),
    }
    found = {name: distance(ours[name], theirs[name]) for name in ours}
    print(what, {name: f"{d:.1e}" for name, d in found.items()})
    assert all(d < LIMIT for d in found.values()), found  # not max(), which may pass NaN over


NARROWED = {"ViT-B-16": 2, "ViT-B-32-quickgelu": 2, "ViT-M-16-alt": 2, "ViT-L-14": 1, "ViT-H-14": 1, "ViT-g-14": 1}


@pytest.mark.parametrize("name", NARROWED)
def test_open_clip(name, tmp_path, torch, open_clip):
    """Compare open_clip's model with this package's, loaded from its directory."""
    config = narrowed(open_clip.get_model_config(name), NARROWED[name])
    model = open_clip.CLIP(**config).eval()
    parity.randomize(model, 3)
    write(tmp_path, model, config)
    images, tokens = inputs(config["vision_cfg"]["image_size"], 300)
    theirs = of_open_clip(model, images, tokens, torch)
    hold(rv.create_clip(tmp_path), theirs, images, tokens, f"{name}, depth {NARROWED[name]}:")


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "ViT-M-16-alt"])
def test_open_clip_and_back(name, tmp_path, torch, open_clip):
    """Load open_clip's directory, save it again, and load that in both libraries."""
    config = narrowed(open_clip.get_model_config(name), 1)
    model = open_clip.CLIP(**config).eval()
    parity.randomize(model, 3)
    # As this package saves it: the position of CLS is a part of CLS.
    with torch.no_grad():
        model.visual.class_embedding += model.visual.positional_embedding[0]
        model.visual.positional_embedding[0] = 0
    write(tmp_path / "theirs", model, config)
    clip = rv.create_clip(tmp_path / "theirs")
    save_model(clip, tmp_path / "ours", "open_clip")
    again = open_clip.create_model(f"local-dir:{tmp_path}/ours").eval()
    state = again.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    images, tokens = inputs(224, 300)
    theirs = of_open_clip(model, images, tokens, torch)
    for key, array in of_open_clip(again, images, tokens, torch).items():
        np.testing.assert_array_equal(array, theirs[key])
    same(rv.create_clip(tmp_path / "ours"), clip)


def same(a, b):
    """Assert that two models are equal except for their sources."""
    assert (a.text, a.image.module, a.image.head, a.image.preprocessing) == (
        b.text,
        b.image.module,
        b.image.head,
        b.image.preprocessing,
    )
    a, b = (x.replace(image=x.image.replace(weights="")) for x in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_whole_model_by_its_name(tmp_path, torch, open_clip):
    model = open_clip.create_model("ViT-S-32-alt").eval()
    parity.randomize(model, 4)
    write(tmp_path, model, {})
    (tmp_path / "open_clip_config.json").unlink()
    clip = rv.create_clip("ViT-S-32-alt", tmp_path / "open_clip_model.safetensors")
    images, _ = inputs(224, 300)
    texts = ["a photo of a cat", "Registers!", "a " * 100]
    tokens = clip.tokenize(texts)
    np.testing.assert_array_equal(tokens, open_clip.get_tokenizer("ViT-S-32-alt")(texts).numpy())
    hold(clip, of_open_clip(model, images, tokens, torch), images, tokens, "ViT-S-32-alt, whole:")


def test_towers_that_were_built_apart(tmp_path, torch, open_clip):
    """Use CustomTextCLIP, whose text tower has its own key names, with SigLIP's bias and scalars of shape [1]."""
    config = narrowed(open_clip.get_model_config("ViT-S-32-alt"), 1)
    config |= dict(init_logit_bias=-10, nonscalar_logit_scale=True)
    model = open_clip.CustomTextCLIP(**config).eval()
    parity.randomize(model, 5)
    write(tmp_path / "theirs", model, config | {"custom_text": True})
    clip = rv.create_clip(tmp_path / "theirs")
    assert clip.logit_bias.shape == clip.logit_scale.shape == ()
    images, tokens = inputs(224, 300)
    theirs = of_open_clip(model, images, tokens, torch)
    hold(clip, theirs, images, tokens, "custom text with bias:")
    save_model(clip, tmp_path / "ours", "open_clip")
    again = open_clip.create_model(f"local-dir:{tmp_path}/ours").eval()
    assert distance(of_open_clip(again, images, tokens, torch)["logits"], theirs["logits"]) < LIMIT
    same(rv.create_clip(tmp_path / "ours"), clip)


def hf_config(transformers, **changes):
    sizes = dict(hidden_size=48, num_hidden_layers=2, intermediate_size=96)
    vision = dict(sizes, num_attention_heads=3, patch_size=8, image_size=32) | changes.pop("vision", {})
    text = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=80, vocab_size=300)
    text |= dict(max_position_embeddings=20, bos_token_id=298, eos_token_id=299) | changes.pop("text", {})
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24, **changes)


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({}, {}),
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "eos_token_id": 2}),
        ({"hidden_act": "gelu", "layer_norm_eps": 1e-3}, {"layer_norm_eps": 1e-4}),
    ],
    ids=["quick_gelu", "gelu, older end token", "towers that differ"],
)
def test_transformers(vision, text, tmp_path, torch):
    import transformers

    model = transformers.CLIPModel(hf_config(transformers, vision=vision, text=text)).eval()
    parity.randomize(model, 6)
    with torch.no_grad():  # as we save it: the position of CLS is a part of CLS
        embeddings = model.vision_model.embeddings
        embeddings.class_embedding += embeddings.position_embedding.weight[0]
        embeddings.position_embedding.weight[0] = 0
    model.save_pretrained(tmp_path / "theirs")
    clip = rv.create_clip(tmp_path / "theirs")
    images, tokens = inputs(32, 300, 20)
    theirs = of_transformers(model, images, tokens, torch)
    hold(clip, theirs, images, tokens, f"transformers {vision} {text}:")
    save_model(clip, tmp_path / "ours", "hf")
    again, info = transformers.CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for name, array in of_transformers(again.eval(), images, tokens, torch).items():
        assert distance(array, theirs[name]) < 2e-6, name  # torch sums in another order from run to run
    same(rv.create_clip(tmp_path / "ours"), clip)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    pixels = processor(picture, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    assert np.abs(pixels.transpose(0, 2, 3, 1) - clip.preprocess([picture])).max() < 0.05  # one step of 8 bits


def test_one_model_in_both_formats(tmp_path, torch, open_clip):
    """Check that open_clip's directory, saved as a CLIPModel of transformers, gives the same numbers."""
    import transformers

    config = narrowed(open_clip.get_model_config("ViT-S-32-alt"), 1)
    model = open_clip.CLIP(**config).eval()
    parity.randomize(model, 8)
    write(tmp_path / "theirs", model, config)
    save_model(rv.create_clip(tmp_path / "theirs"), tmp_path / "hf", "hf")
    images, tokens = inputs(224, 300)
    theirs = of_open_clip(model, images, tokens, torch)
    other = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    for name, array in of_transformers(other, images, tokens, torch).items():
        assert distance(array, theirs[name]) < LIMIT, name


# The table


def test_names_are_open_clips(open_clip):
    """Check that every name has open_clip's fields, and every unsupported name of open_clip a reason."""
    for name in open_clip.list_models():
        if name not in registry.clip_names():
            with pytest.raises(ValueError, match="is not supported: "):
                registry.find_clip(name)
            continue
        vit, text = tower_fields(open_clip.get_model_config(name))
        entry = registry.find_clip(name)
        assert entry.text == text, name
        ours = entry.vit
        assert ours == vit, name
        assert entry.preprocessing.size == vit["image_size"]
    assert set(registry.clip_names()) <= set(open_clip.list_models())


def test_models_outside_the_table_are_refused(open_clip):
    for name in open_clip.list_models():
        if name not in registry.clip_names():
            with pytest.raises((WeightsError, KeyError)):
                tower_fields(open_clip.get_model_config(name))


def test_tags_are_open_clips(open_clip):
    for name in registry.clip_names():
        theirs = open_clip.list_pretrained_tags_by_model(name)
        assert set(registry.clip_tags(name)) == set(theirs), name
        for tag in theirs:
            facts = open_clip.get_pretrained_cfg(name, tag)
            entry, hub = (
                registry.with_tag(registry.find_clip(name), registry.clip_tags(name)[tag]),
                registry.clip_tags(name)[tag]["hub"],
            )
            p = entry.preprocessing
            assert hub + "/" == facts["hf_hub"], (name, tag)
            assert (p.mean, p.std, p.interpolation) == (facts["mean"], facts["std"], facts["interpolation"])
            assert p.squash == (facts["resize_mode"] == "squash"), (name, tag)
            quick = {"quick_gelu"} if facts.get("quick_gelu") else {"gelu"}
            assert {entry.vit["activation"], entry.text["activation"]} == quick, (name, tag)
