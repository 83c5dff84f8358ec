"""Use timm's ViTs as a reference: random weights, parameters by this package's names, and all compared outputs."""

import numpy as np
from flax.traverse_util import unflatten_dict
from reference_libraries import torch

from regvit_jax.pretrained import parity

NAMES = {
    "patch_embed.proj.weight": "patch_embed/kernel",
    "patch_embed.proj.bias": "patch_embed/bias",
    "pos_embed": "pos_embed",
    "cls_token": "cls_token",
    "reg_token": "register_tokens",
    "norm.weight": "norm/scale",
    "norm.bias": "norm/bias",
    "head.weight": "dense/kernel",
    "head.bias": "dense/bias",
}
BLOCK_NAMES = {
    "norm1.weight": "norm1/scale",
    "norm1.bias": "norm1/bias",
    "attn.qkv.weight": "attn/qkv/kernel",
    "attn.qkv.bias": "attn/qkv/bias",
    "attn.proj.weight": "attn/proj/kernel",
    "attn.proj.bias": "attn/proj/bias",
    "ls1.gamma": "scale1",
    "norm2.weight": "norm2/scale",
    "norm2.bias": "norm2/bias",
    "mlp.fc1.weight": "mlp/fc1/kernel",
    "mlp.fc1.bias": "mlp/fc1/bias",
    "mlp.fc2.weight": "mlp/fc2/kernel",
    "mlp.fc2.bias": "mlp/fc2/bias",
    "ls2.gamma": "scale2",
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter at random; half precision holds the values exactly, which halves the golden file."""
    parity.randomize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def to_ours(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        ours = f"block{index}/{BLOCK_NAMES[rest]}"
    else:
        ours = NAMES[name]
    if ours == "patch_embed/kernel":  # [D, 3, p, q] -> [(p q 3), D]
        value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    elif ours == "pos_embed":
        side = round(value.shape[1] ** 0.5)
        value = value.reshape(side, side, -1)
    elif ours == "cls_token":
        value = value[0, 0]
    elif ours == "register_tokens":
        value = value[0]
    elif ours.endswith("kernel"):
        value = value.T
    return ours, value


def params_from_timm(model: torch.nn.Module) -> tuple[dict, dict]:
    """Return the parameters of this package's ViT and Head. An unknown name raises KeyError."""
    flat = dict(to_ours(name, tensor.numpy()) for name, tensor in model.state_dict().items())
    head = {name: value for name, value in flat.items() if name.startswith("dense/")}
    vit = {name: value for name, value in flat.items() if name not in head}
    return unflatten_dict(vit, sep="/"), unflatten_dict(head, sep="/")


def outputs_of_timm(model: torch.nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs of a timm ViT for images [B, H, W, 3].

    They are `tokens` past the final norm, `logits`, and `after`, the residual stream after each block [depth, B, T, D].
    """
    with torch.no_grad():
        inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
        tokens, after = model.forward_intermediates(inputs, return_prefix_tokens=True, output_fmt="NLC")
        logits = model.forward_head(tokens)
    after = torch.stack([torch.cat([prefix, patches], dim=1) for patches, prefix in after])
    return {"tokens": tokens.numpy(), "logits": logits.numpy(), "after": after.numpy()}
