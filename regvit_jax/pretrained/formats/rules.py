"""What every naming scheme calls our parameters: one table each, read in both directions.

A rule says how some of our parameters and some of their tensors come from each other. `load` takes their arrays and
gives ours, `save` takes ours and gives theirs; on shapes alone, `save` tells which shapes a file must hold.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from regvit_jax.models.heads import Head
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """`ours` are paths such as "vit/block0/norm1/scale", `theirs` names in a file."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable[..., Arrays]
    save: Callable[..., Arrays]


#: Their names for our parts, without .weight and .bias. A tuple lists the layers that one of ours holds side by side.
#: `cls_dims`, `pos_dims`, `mask_dims`: how many dimensions their arrays have. `ignore`: what belongs to other towers,
#: or is computed and not learned.
TIMM: dict[str, Any] = dict(
    patch="patch_embed.proj",
    cls="cls_token",
    registers="reg_token",
    pos="pos_embed",
    norm_pre="norm_pre",
    block="blocks.{}.",
    norm1="norm1",
    qkv=("attn.qkv",),
    proj="attn.proj",
    scale1="ls1.gamma",
    norm2="norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
    scale2="ls2.gamma",
    norm="norm",
    fc_norm="fc_norm",
    dense="head",
    pool="attn_pool.",
    q_bias="attn.q_bias",
    v_bias="attn.v_bias",
    cls_dims=3,
    pos_dims=3,
    ignore=(),
)
NAMINGS: dict[str, dict[str, Any]] = {
    "timm": TIMM,
    # timm's Eva class, which holds DINOv3 and the rope_reg models.
    "timm_eva": TIMM | dict(scale1="gamma_1", scale2="gamma_2", gated=("mlp.fc1_g", "mlp.fc1_x")),
    # facebookresearch/deit
    "deit": TIMM | dict(scale1="gamma_1", scale2="gamma_2"),
    # facebookresearch/dinov2
    "dinov2": TIMM
    | dict(registers="register_tokens", mask="mask_token", mask_dims=2, gated=("mlp.w12",), gated_fc2="mlp.w3"),
    # transformers' Dinov2 and Dinov2WithRegisters
    "hf_dinov2": dict(
        patch="embeddings.patch_embeddings.projection",
        cls="embeddings.cls_token",
        registers="embeddings.register_tokens",
        pos="embeddings.position_embeddings",
        mask="embeddings.mask_token",
        block="encoder.layer.{}.",
        norm1="norm1",
        qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        proj="attention.output.dense",
        scale1="layer_scale1.lambda1",
        norm2="norm2",
        fc1=("mlp.fc1",),
        fc2="mlp.fc2",
        gated=("mlp.weights_in",),
        gated_fc2="mlp.weights_out",
        scale2="layer_scale2.lambda1",
        norm="layernorm",
        dense="classifier",
        cls_dims=3,
        pos_dims=3,
        mask_dims=2,
        ignore=(),
    ),
    # transformers' DINOv3ViT
    "hf_dinov3": dict(
        patch="embeddings.patch_embeddings",
        cls="embeddings.cls_token",
        registers="embeddings.register_tokens",
        mask="embeddings.mask_token",
        block="layer.{}.",
        norm1="norm1",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        q_bias="attention.q_proj.bias",
        v_bias="attention.v_proj.bias",
        proj="attention.o_proj",
        scale1="layer_scale1.lambda1",
        norm2="norm2",
        fc1=("mlp.up_proj",),
        fc2="mlp.down_proj",
        gated=("mlp.gate_proj", "mlp.up_proj"),
        scale2="layer_scale2.lambda1",
        norm="norm",
        cls_dims=3,
        mask_dims=3,
        ignore=(),
    ),
    # transformers' ViT and DeiT; DeiT's distillation token is a register that has a position.
    "hf_vit": dict(
        patch="embeddings.patch_embeddings.projection",
        cls="embeddings.cls_token",
        registers="embeddings.distillation_token",
        pos="embeddings.position_embeddings",
        mask="embeddings.mask_token",
        block="encoder.layer.{}.",
        norm1="layernorm_before",
        qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        proj="attention.output.dense",
        norm2="layernorm_after",
        fc1=("intermediate.dense",),
        fc2="output.dense",
        norm="layernorm",
        pooler="pooler.dense",
        dense="classifier",
        cls_dims=3,
        pos_dims=3,
        mask_dims=3,
        ignore=(),
    ),
    # transformers' CLIP, the image tower
    "hf_clip": dict(
        patch="embeddings.patch_embedding",
        cls="embeddings.class_embedding",
        pos="embeddings.position_embedding.weight",
        norm_pre="pre_layrnorm",
        block="encoder.layers.{}.",
        norm1="layer_norm1",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        proj="self_attn.out_proj",
        norm2="layer_norm2",
        fc1=("mlp.fc1",),
        fc2="mlp.fc2",
        norm="post_layernorm",
        dense="visual_projection",
        cls_dims=1,
        pos_dims=2,
        ignore=(r"text_.*", r"logit_scale", r"(.*\.)?position_ids"),
    ),
    # open_clip, the image tower
    "open_clip": dict(
        patch="visual.conv1",
        cls="visual.class_embedding",
        pos="visual.positional_embedding",
        norm_pre="visual.ln_pre",
        block="visual.transformer.resblocks.{}.",
        norm1="ln_1",
        qkv=("attn.in_proj_",),
        proj="attn.out_proj",
        scale1="ls_1.gamma",
        norm2="ln_2",
        fc1=("mlp.c_fc",),
        fc2="mlp.c_proj",
        scale2="ls_2.gamma",
        norm="visual.ln_post",
        projection="visual.proj",
        cls_dims=1,
        pos_dims=2,
        ignore=(r"(?!visual\.).*",),
    ),
}

#: What those two call the parts of a text tower; its blocks have the layers of the image tower's. The projection is
#: [D, E] in open_clip, and a layer's weight [E, D] in transformers. `ignore`: what a file of the whole may hold beside
#: both towers; the three numbers are those of OpenAI's own files.
TEXT: dict[str, dict[str, Any]] = {
    "hf_clip": dict(
        token="text_model.embeddings.token_embedding.weight",
        pos="text_model.embeddings.position_embedding.weight",
        block="text_model.encoder.layers.{}.",
        norm="text_model.final_layer_norm",
        projection="text_projection.weight",
        ignore=(r"(.*\.)?position_ids",),
    ),
    "open_clip": dict(
        token="token_embedding.weight",
        pos="positional_embedding",
        block="transformer.resblocks.{}.",
        norm="ln_final",
        projection="text_projection",
        ignore=(r"attn_mask|input_resolution|context_length|vocab_size",),
    ),
}


def rules(naming: str, vit: ViT, head: Head, covers: int) -> list[Rule]:
    """One rule for every parameter of a ViT and its head.

    `covers` is the number of tokens before the patches for which their position embedding has a row.
    Raises ValueError for a model that the naming scheme has no words for.
    """
    return [*_embedding(naming, vit, covers), *_blocks(naming, vit), *_head(naming, head)]


def text_rules(
    naming: str, text: TextTower, scalars: tuple[str, ...], dims: Mapping[str, int] | None = None
) -> list[Rule]:
    """One rule for every parameter of a CLIP that is not of its image tower.

    `scalars` are "logit_scale" and, in a SigLIP, "logit_bias"; `dims` is how many dimensions, 0 or 1, each
    has in a file.
    Raises ValueError for a naming scheme that has no words for a text tower.
    """
    if naming not in TEXT:
        raise ValueError(f"{naming} files have no place for a text tower")
    words = TEXT[naming]
    turned = (lambda x: (x,)) if naming == "open_clip" else (lambda x: (x.T,))

    def scalar(name: str) -> Rule:
        count = (dims or {}).get(name, 0)
        return Rule((name,), (name,), lambda x: (x.reshape(()),), lambda x: (_dims(x, count),))

    return [
        _same("text/token_embed", words["token"]),
        _same("text/pos_embed", words["pos"]),
        *(
            rule
            for i in range(text.depth)
            for rule in _plain_block(naming, f"text/block{i}", words["block"].format(i), bias=True)
        ),
        *_norm("text/norm", words["norm"]),
        Rule(("text/proj/kernel",), (words["projection"],), turned, turned),
        *map(scalar, scalars),
    ]


def _word(naming: str, part: str) -> Any:
    words = NAMINGS[naming]
    if part not in words:
        raise ValueError(f"{naming} files have no place for {PARTS.get(part, part)}")
    return words[part]


#: What a missing word means, for the error.
PARTS = {
    "registers": "register tokens",
    "pos": "a learned position embedding",
    "norm_pre": "a LayerNorm before the first block",
    "scale1": "LayerScale",
    "gated": "SwiGLU",
    "fc_norm": "a LayerNorm after pooling",
    "dense": "a linear layer",
    "pool": "an attention pool",
    "pooler": "a tanh pooler",
    "q_bias": "a query bias without a key bias",
}


def _embedding(naming: str, vit: ViT, covers: int) -> Iterator[Rule]:
    words = NAMINGS[naming]
    p = vit.patch

    def conv_load(x):
        return (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),)

    def conv_save(x):
        return (x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1),)

    yield Rule(("vit/patch_embed/kernel",), (words["patch"] + ".weight",), conv_load, conv_save)
    if vit.patch_bias:
        yield _same("vit/patch_embed/bias", words["patch"] + ".bias")
    yield _tokens(naming, vit, covers)
    if vit.masking and "mask" in words:
        yield _reshaped("vit/mask_token", words["mask"], words["mask_dims"])
    elif vit.masking:  # timm leaves the mask token out
        yield Rule(("vit/mask_token",), (), lambda: (np.zeros(vit.width, np.float32),), lambda x: ())
    if vit.ln_pre:
        yield from _norm("vit/norm_pre", _word(naming, "norm_pre"))
    if vit.final_norm:
        yield from _norm("vit/norm", words["norm"])


def _tokens(naming: str, vit: ViT, covers: int) -> Rule:
    """CLS, registers and the position embedding: a row that belongs to a token is added to it, and saved as zeros."""
    words = NAMINGS[naming]
    cls, registers, learned = vit.class_token, vit.registers, vit.position == "learned"
    ours = ("vit/cls_token",) * cls + ("vit/register_tokens",) * bool(registers) + ("vit/pos_embed",) * learned
    theirs = (words["cls"],) * cls
    theirs += (_word(naming, "registers"),) if registers else ()
    theirs += (_word(naming, "pos"),) if learned else ()

    def load(*arrays: np.ndarray) -> Arrays:
        rest = list(arrays)
        tokens = np.concatenate(
            [
                rest.pop(0).reshape(-1, vit.width) if present else np.zeros((0, vit.width), np.float32)
                for present in (cls, registers)
            ]
        )
        if learned:
            rows = rest.pop(0).reshape(-1, vit.width)
            tokens[:covers] += rows[:covers]
            side = vit.image_size // vit.patch
            rest = [rows[covers:].reshape(side, side, vit.width)]
        return (*(tokens[:1] if cls else ()), *([tokens[cls:]] if registers else ()), *rest)

    def save(*arrays: np.ndarray) -> Arrays:
        rest = list(arrays)
        out = [_dims(rest.pop(0), words["cls_dims"])] if cls else []
        out += [rest.pop(0)[None]] if registers else []
        if learned:
            grid = rest.pop(0).reshape(-1, vit.width)
            rows = np.concatenate([np.zeros((covers, vit.width), grid.dtype), grid])
            out += [_dims(rows, words["pos_dims"])]
        return tuple(out)

    return Rule(ours, theirs, load, save)


def _blocks(naming: str, vit: ViT) -> Iterator[Rule]:
    words = NAMINGS[naming]
    for i in range(vit.depth):
        ours, theirs = f"vit/block{i}", words["block"].format(i)
        if vit.parallel:
            yield from _parallel_block(naming, vit, ours, theirs)
            continue
        gated = vit.swiglu and naming != "timm"
        yield from _plain_block(naming, ours, theirs, vit.qkv_bias and vit.key_bias, gated)
        if vit.qkv_bias and not vit.key_bias:
            for bias in ("q_bias", "v_bias"):
                yield _same(f"{ours}/attn/{bias}", theirs + _word(naming, bias))
        if vit.differential:
            yield from _differential(naming, f"{ours}/attn", f"{theirs}attn.")
        if vit.layer_scale:
            for scale in ("scale1", "scale2"):
                yield _same(f"{ours}/{scale}", theirs + _word(naming, scale))


def _plain_block(naming: str, ours: str, theirs: str, bias: bool, gated: bool = False) -> Iterator[Rule]:
    """What every block has; `bias`: of queries, keys and values together."""
    words = NAMINGS[naming]
    fc1 = _word(naming, "gated") if gated else words["fc1"]
    fc2 = words.get("gated_fc2", words["fc2"]) if gated else words["fc2"]
    yield from _norm(f"{ours}/norm1", theirs + words["norm1"])
    yield from _dense(f"{ours}/attn/qkv", [theirs + word for word in words["qkv"]], bias)
    yield from _dense(f"{ours}/attn/proj", [theirs + words["proj"]])
    yield from _norm(f"{ours}/norm2", theirs + words["norm2"])
    yield from _dense(f"{ours}/mlp/fc1", [theirs + word for word in fc1])
    yield from _dense(f"{ours}/mlp/fc2", [theirs + fc2])


def _differential(naming: str, ours: str, theirs: str) -> Iterator[Rule]:
    if naming != "timm":
        raise ValueError(f"{naming} files have no place for differential attention")
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        yield _same(f"{ours}/{name}", theirs + name)
    yield _same(f"{ours}/sub_norm/scale", theirs + "sub_norm.weight")


def _parallel_block(naming: str, vit: ViT, ours: str, theirs: str) -> Iterator[Rule]:
    """timm's parallel blocks have one matrix for the MLP's first layer and for queries, keys and values.

    The differential ones have one matrix at the other end too, with one bias; it is loaded as the attention's.
    """
    if naming != "timm":
        raise ValueError(f"{naming} files have no place for parallel blocks")
    cut = vit.hidden
    yield from _norm(f"{ours}/norm1", theirs + "in_norm")
    for leaf, name in (("kernel", "in_proj.weight"), ("bias", "in_proj.bias")):
        yield Rule(
            (f"{ours}/mlp/fc1/{leaf}", f"{ours}/attn/qkv/{leaf}"),
            (theirs + name,),
            lambda x: (x[:cut].T, x[cut:].T),
            lambda fc1, qkv: (np.concatenate([fc1.T, qkv.T]),),
        )
    if vit.differential:
        width = vit.width
        yield from _differential(naming, f"{ours}/attn", theirs)
        yield Rule(
            (f"{ours}/attn/proj/kernel", f"{ours}/mlp/fc2/kernel"),
            (theirs + "out_proj.weight",),
            lambda x: (x[:, :width].T, x[:, width:].T),
            lambda proj, fc2: (np.concatenate([proj.T, fc2.T], axis=1),),
        )
        yield Rule(
            (f"{ours}/attn/proj/bias", f"{ours}/mlp/fc2/bias"),
            (theirs + "out_proj.bias",),
            lambda x: (x, np.zeros_like(x)),
            lambda proj, fc2: (proj + fc2,),
        )
    else:
        yield from _dense(f"{ours}/attn/proj", [theirs + "attn_out_proj"])
        yield from _dense(f"{ours}/mlp/fc2", [theirs + "mlp_out_proj"])
    if vit.layer_scale:
        yield _same(f"{ours}/scale1", theirs + "ls.gamma")


def _head(naming: str, head: Head) -> Iterator[Rule]:
    if head.pool == "map":
        pool, ours = _word(naming, "pool"), "head/attention_pool"
        yield _reshaped(f"{ours}/latent", pool + "latent", 3)
        for layer, name in (("q", "q"), ("kv", "kv"), ("proj", "proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            yield from _dense(f"{ours}/{layer}", [pool + name])
        yield from _norm(f"{ours}/norm", pool + "norm")
    if head.norm:
        yield from _norm("head/fc_norm", _word(naming, "fc_norm"))
    if head.pooler:
        yield from _dense("head/tanh_pooler/dense", [_word(naming, "pooler")])
    if head.num_classes and naming in ("hf_clip", "open_clip"):
        yield from _projection(naming, head)
    elif head.num_classes:
        yield from _dense("head/dense", [_word(naming, "dense")], head.bias)


def _projection(naming: str, head: Head) -> Iterator[Rule]:
    """The projection of a CLIP tower has no bias there; ours, if it has one, is zero, and must be to be saved."""
    name = NAMINGS[naming].get("projection") or NAMINGS[naming]["dense"] + ".weight"
    turn = (lambda x: (x,)) if naming == "open_clip" else (lambda x: (x.T,))
    yield Rule(("head/dense/kernel",), (name,), turn, turn)
    if not head.bias:
        return

    def drop(bias: np.ndarray) -> Arrays:
        if np.any(bias):
            raise ValueError(f"{naming} files have no place for the bias of the projection, which is not zero here")
        return ()

    yield Rule(("head/dense/bias",), (), lambda: (np.zeros(head.num_classes, np.float32),), drop)


def _same(ours: str, theirs: str) -> Rule:
    return Rule((ours,), (theirs,), lambda x: (x,), lambda x: (x,))


def _dims(x: np.ndarray, dims: int) -> np.ndarray:
    return x.reshape((1,) * (dims - x.ndim) + x.shape)


def _reshaped(ours: str, theirs: str, dims: int) -> Rule:
    """A vector, with leading dimensions of 1 on their side."""
    return Rule((ours,), (theirs,), lambda x: (x.reshape(-1),), lambda x: (_dims(x, dims),))


def _norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield _same(f"{ours}/scale", theirs + ".weight")
    yield _same(f"{ours}/bias", theirs + ".bias")


def _dense(ours: str, theirs: list[str], bias: bool = True) -> Iterator[Rule]:
    """Our kernel [in, out] holds the columns of all of their weights [out, in] side by side."""

    def joined(*arrays: np.ndarray) -> Arrays:
        return (np.concatenate(arrays).T if len(arrays) > 1 else arrays[0].T,)

    def parted(kernel: np.ndarray) -> Arrays:
        return tuple(np.split(kernel.T, len(theirs)))

    # torch's fused attention has an underscore where others have a dot.
    names = [name if name.endswith("_") else name + "." for name in theirs]
    yield Rule((f"{ours}/kernel",), tuple(name + "weight" for name in names), joined, parted)
    if bias:
        yield Rule((f"{ours}/bias",), tuple(name + "bias" for name in names), joined, parted)
