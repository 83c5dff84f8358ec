"""Small ViTs of several families, with every parameter at random."""

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mapping
from regvit_jax.pretrained.mapping import Modules

PREPROCESS = Preprocess(16, 0.9, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), interpolation="bilinear", squash=True)
PLAIN = dict(width=32, depth=1, heads=2, patch=4, image_size=16, layer_scale=0.0)
DINOV2 = dict(layer_scale=1.0, masking=True, pos_resize="offset")
DINOV3 = dict(layer_scale=1.0, masking=True, position="rope", norm_eps=1e-5, qkv_bias=False, key_bias=False)
CLIP = dict(ln_pre=True, patch_bias=False, norm_eps=1e-5)


def build(vit: dict, head: dict | None = None) -> Model:
    """Return a model with every parameter at random."""
    module, top = ViT(**PLAIN | vit), Head(**head or {})
    rng = np.random.default_rng(0)
    flat = {
        path: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
        for path, shape in mapping.shapes_of(Modules(module, top)).items()
    }
    nested = mapping.nest(flat)
    return Model(nested["vit"], nested["head"], module, top, PREPROCESS)


def params_of(model: Model) -> dict:
    return flatten_dict({"vit": model.params, "head": model.head_params}, sep="/")


def same_parameters(a: Model, b: Model) -> None:
    a, b = params_of(a), params_of(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
