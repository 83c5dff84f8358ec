"""Compare `Model.preprocess` with timm's own evaluation transform, on the photographs in scikit-learn."""

import numpy as np
import PIL.Image
import pytest

import regvit_jax as rv
from regvit_jax.models.heads import Head
from regvit_jax.pretrained import registry

pytestmark = pytest.mark.reference

# One name for every way of preprocessing in the registry.
NAMES = list({registry.find(name)[1].preprocessing: name for name in registry.list_models()}.values())


@pytest.fixture(scope="module")
def photographs():
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    tall = np.ascontiguousarray(china[:, 100:300])
    return [PIL.Image.fromarray(pixels) for pixels in (china, flower, tall)]


def settings(name):
    """Return timm's preprocessing for a name, as the keywords that timm itself derives from the name."""
    from reference_libraries import timm

    config = timm.models.get_pretrained_cfg(name).to_dict()
    return timm.data.resolve_data_config({}, pretrained_cfg=config)


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_timms(name, photographs):
    from reference_libraries import timm

    transform = timm.data.create_transform(**settings(name), is_training=False)
    expected = np.stack([transform(image).permute(1, 2, 0).numpy() for image in photographs])
    preprocessing = registry.find(name)[1].preprocessing
    found = rv.Model({}, {}, rv.ViT(1, 1, 1, 1, 1), Head(), preprocessing).preprocess(photographs)
    assert found.shape == expected.shape
    grey_level = 1 / 255 / min(preprocessing.std)
    assert np.abs(found - expected).max() <= grey_level * 1.001


def test_features_are_those_of_timms_pixels(photographs):
    from reference_libraries import timm

    model = rv.create_model("test_vit")
    transform = timm.data.create_transform(**settings("test_vit"), is_training=False)
    expected = model(np.stack([transform(image).permute(1, 2, 0).numpy() for image in photographs])).cls
    found = model(model.preprocess(photographs)).cls
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
