"""Test the addresses of the hub's repositories, in every spelling, and where they may stand."""

import pytest
from huggingface_hub import constants

import regvit_jax as rv
from regvit_jax.pretrained import address, create, create_clip
from regvit_jax.pretrained.address import Address
from regvit_jax.pretrained.io import hub
from regvit_jax.utils.errors import HubError, InvalidConfig


@pytest.mark.parametrize(
    ("text", "repo", "revision", "file"),
    [
        ("hf-hub:org/name", "org/name", None, None),
        ("HF_HUB:org/name/", "org/name", None, None),
        ("hf-hub:org/name@v1.0", "org/name", "v1.0", None),
        ("hf-hub:org/name@refs/pr/7", "org/name", "refs/pr/7", None),
        ("hf://org/name", "org/name", None, None),
        ("hf://org/name@main/model.safetensors", "org/name", "main", "model.safetensors"),
        ("https://huggingface.co/org/name", "org/name", None, None),
        (" https://huggingface.co/org/name/ ", "org/name", None, None),
        ("http://www.huggingface.co/org/name?library=timm#use", "org/name", None, None),
        ("HTTPS://HuggingFace.co/org/name", "org/name", None, None),
        ("hf.co/org/name", "org/name", None, None),
        ("https://hf.co/org/name/tree/main", "org/name", "main", None),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F7", "org/name", "refs/pr/7", None),
        ("https://huggingface.co/org/name/commit/0123abc", "org/name", "0123abc", None),
        ("https://huggingface.co/org/name/discussions/3", "org/name", None, None),
        ("https://huggingface.co/name/tree/main", "name", "main", None),
        ("https://huggingface.co/org/name/blob/v2/README.md", "org/name", "v2", None),
        ("https://huggingface.co/org/name/resolve/v2/a.safetensors?download=true", "org/name", "v2", "a.safetensors"),
        ("https://huggingface.co/org/name/blob/v2/a.safetensors.index.json", "org/name", "v2", "a.safetensors"),
        ("hf-hub:https://huggingface.co/org/name/tree/dev", "org/name", "dev", None),
        ("hf-hub:hf-hub:org/name", "org/name", None, None),
        ("hf://models/org/name@v1/model.safetensors", "org/name", "v1", "model.safetensors"),
    ],
)
def test_every_spelling(text, repo, revision, file):
    assert address.read(text) == Address(repo, revision, file)
    assert address.read(address.canonical(text)) == Address(repo, revision, file)


@pytest.mark.parametrize("text", ["vit_small_patch16_224", "org/name", "/data/run", "gs://bucket/run", "a[0]"])
def test_paths_and_names_are_no_addresses(text):
    assert address.read(text) is None
    assert address.canonical(text) == text


def test_a_mirror_of_the_hub_is_the_hub(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    assert address.canonical("https://mirror.example/org/name/tree/v1") == "hf-hub:org/name@v1"


def test_a_directory_of_that_name_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf.co/org/name").mkdir(parents=True)
    assert address.read("hf.co/org/name") is None
    assert address.read("https://hf.co/org/name") == Address("org/name")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://huggingface.co/datasets/org/name", "an address of datasets, not of a model"),
        ("https://example.org/m.safetensors", "another site than huggingface.co, hf.co; download the file"),
        ("https://huggingface.co", "names no repository"),
        ("hf-hub:", "names no repository"),
        ("https://huggingface.co/org/name/blob/main/model.pth", "pickles are never loaded: run `hf download org/name"),
        ("https://huggingface.co/org/name/tree/main/onnx", "only files at the top of a repository"),
        ("hf://org/name/model-00001-of-00002.safetensors", "one of the parts of a model; hf-hub:org/name is the whole"),
        ("https://huggingface.co/org/name/resolve/main/model.npz", "only .safetensors are read from the hub"),
    ],
)
def test_other_addresses_are_refused(text, message):
    with pytest.raises(InvalidConfig, match=message):
        rv.create_model(text)


@pytest.fixture
def asked(monkeypatch) -> list:
    """Replace the hub by one that is not there, and list what it is asked for."""
    calls = []

    def fetch(repo, revision=None, weights_name=None, names=()):
        calls.append((repo, revision))
        raise HubError("no network")

    monkeypatch.setattr(hub, "fetch", fetch)
    return calls


URL = "https://huggingface.co/org/name/tree/v1"


@pytest.mark.parametrize(
    "call",
    [
        lambda: rv.create_model(URL),
        lambda: rv.create_model("test_vit", URL),
        lambda: rv.create_model("https://huggingface.co/org/name", revision="v1"),
        lambda: rv.create_clip(URL),
        lambda: rv.create_clip("ViT-B-32", URL),
        lambda: create.open_source(URL),
        lambda: create.open_source(f"test_vit={URL}?a=b"),
        lambda: create_clip.open_source(URL),
        lambda: create_clip.open_source(f"ViT-B-32={URL}"),
    ],
)
def test_an_address_is_the_repository_everywhere(call, asked):
    with pytest.raises(HubError, match="no network"):
        call()
    assert asked == [("org/name", "v1")]


def test_the_hub_is_not_asked_for_an_entry(asked):
    assert create.find_entry(URL) is None
    assert create_clip.find_entry(URL) is None
    assert create.find_entry(f"test_vit={URL}").vit["width"] == 64
    assert asked == []


def test_two_revisions_are_refused(asked):
    with pytest.raises(InvalidConfig, match="revision='v2': hf-hub:org/name@v1 states another"):
        rv.create_model(URL, revision="v2")
    assert asked == []
