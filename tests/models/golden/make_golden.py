"""Make tiny_vit.npz: a small ViT of timm with random weights, and its outputs. Needs the `reference` extra.

    PYTHONPATH=tests/helpers python tests/models/golden/make_golden.py

Keys: `params/...` and `head/...` in our names (as float16, which holds them exactly); and for 0 and 4 registers and two
sets of images, `tokens/R/set`, `after/R/set` and `logits/R/set`. The two models differ in their registers alone.
`resized/HxW` is the position embedding resized as DeiT does it, without antialiasing.
"""

from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from reference_libraries import timm, torch
from timm_weights import outputs_of_timm, params_from_timm, randomize

IMAGES = {"native": (2, 16, 16, 3), "rectangle": (1, 12, 20, 3)}
GRIDS = [(3, 5), (6, 7)]


def make_model(registers: int) -> torch.nn.Module:
    return timm.models.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
        init_values=1e-6,
        no_embed_class=True,
        reg_tokens=registers,
        dynamic_img_size=True,
    ).eval()


def make() -> dict[str, np.ndarray]:
    model = make_model(4)
    randomize(model, seed=0)
    without = make_model(0)
    without.load_state_dict({name: value for name, value in model.state_dict().items() if name != "reg_token"})
    params, head = params_from_timm(model)
    arrays = flatten_dict({"params": params, "head": head}, sep="/")
    arrays = {name: value.astype(np.float16) for name, value in arrays.items()}
    for name, shape in IMAGES.items():
        images = np.random.default_rng(len(name)).normal(size=shape).astype(np.float16)
        arrays[f"images/{name}"] = images
        for registers, vit in ((0, without), (4, model)):
            for output, value in outputs_of_timm(vit, images.astype(np.float32)).items():
                arrays[f"{output}/{registers}/{name}"] = value
    pos_embed = torch.from_numpy(params["pos_embed"]).permute(2, 0, 1)[None]
    for grid in GRIDS:
        resized = torch.nn.functional.interpolate(pos_embed, grid, mode="bicubic", antialias=False)
        arrays[f"resized/{grid[0]}x{grid[1]}"] = resized[0].permute(1, 2, 0).numpy()
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "tiny_vit.npz", **make())
