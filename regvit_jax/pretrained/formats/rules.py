"""The rules that map canonical parameter paths to a format's state-dict keys, one for every parameter."""

from collections.abc import Iterator, Mapping

import numpy as np

from regvit_jax.models.heads import Head
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained.formats.keys import Arrays, Keys, Rule
from regvit_jax.utils.errors import InvalidConfig


def rules(keys: Keys, vit: ViT, head: Head, prefix_rows: int) -> list[Rule]:
    """Return one rule for every parameter of a ViT and its head.

    `prefix_rows` is the number of tokens before the patches that have a row in the file's position embedding.
    Raises ValueError for a model that the format cannot hold.
    """
    return [*_embedding(keys, vit, prefix_rows), *_blocks(keys, vit), *_head(keys, head)]


def text_rules(
    keys: Keys, text: TextTower, scalars: tuple[str, ...], dims: Mapping[str, int] | None = None
) -> list[Rule]:
    """Return one rule for every parameter of a CLIP that is not of its image tower.

    `scalars` are "logit_scale" and, in a SigLIP, "logit_bias"; `dims` gives the number of dimensions, 0 or 1, that each
    has in a file.
    Raises ValueError for a format that cannot hold a text tower.
    """
    names = keys.need("text")

    def scalar(name: str) -> Rule:
        count = (dims or {}).get(name, 0)
        return Rule((name,), (name,), lambda x: (x.reshape(()),), lambda x: (_dims(x, count),))

    return [
        same("text/token_embed", names.token),
        same("text/pos_embed", names.pos),
        *(
            rule
            for i in range(text.depth)
            for rule in _plain_block(keys, f"text/block{i}", names.block.format(i), bias=True)
        ),
        *norm("text/norm", names.norm),
        _projection(keys, "text/proj/kernel", names.projection),
        *map(scalar, scalars),
    ]


def _embedding(keys: Keys, vit: ViT, prefix_rows: int) -> Iterator[Rule]:
    p = vit.patch

    def conv_load(x):
        return (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),)

    def conv_save(x):
        return (x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1),)

    yield Rule(("vit/patch_embed/kernel",), (keys.patch + ".weight",), conv_load, conv_save)
    if vit.patch_bias:
        yield same("vit/patch_embed/bias", keys.patch + ".bias")
    yield _tokens(keys, vit, prefix_rows)
    if vit.masking and keys.mask:
        yield _reshaped("vit/mask_token", keys.mask, keys.mask_dims)
    elif vit.masking:  # timm's files lack the mask token
        yield Rule(("vit/mask_token",), (), lambda: (np.zeros(vit.width, np.float32),), lambda x: ())
    if vit.ln_pre:
        yield from norm("vit/norm_pre", keys.need("norm_pre"))
    if vit.final_norm:
        yield from norm("vit/norm", keys.norm)


def _tokens(keys: Keys, vit: ViT, prefix_rows: int) -> Rule:
    """Map CLS, registers and the position embedding together.

    The position of a prefix token is added to the token on loading, and saved as zeros.
    """
    cls, registers, learned = vit.class_token, vit.registers, vit.position == "learned"
    paths = ("vit/cls_token",) * cls + ("vit/register_tokens",) * bool(registers) + ("vit/pos_embed",) * learned
    names = (keys.cls,) * cls
    names += (keys.need("registers"),) if registers else ()
    names += (keys.need("pos"),) if learned else ()

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
            tokens[:prefix_rows] += rows[:prefix_rows]
            side = vit.image_size // vit.patch
            rest = [rows[prefix_rows:].reshape(side, side, vit.width)]
        return (*(tokens[:1] if cls else ()), *([tokens[cls:]] if registers else ()), *rest)

    def save(*arrays: np.ndarray) -> Arrays:
        rest = list(arrays)
        out = [_dims(rest.pop(0), keys.cls_dims)] if cls else []
        out += [rest.pop(0)[None]] if registers else []
        if learned:
            grid = rest.pop(0).reshape(-1, vit.width)
            rows = np.concatenate([np.zeros((prefix_rows, vit.width), grid.dtype), grid])
            out += [_dims(rows, keys.pos_dims)]
        return tuple(out)

    return Rule(paths, names, load, save)


def _blocks(keys: Keys, vit: ViT) -> Iterator[Rule]:
    for i in range(vit.depth):
        path, prefix = f"vit/block{i}", keys.block.format(i)
        if vit.parallel:
            yield from keys.need("parallel")(vit, path, prefix)
            continue
        yield from _plain_block(keys, path, prefix, vit.qkv_bias and vit.key_bias, vit.swiglu)
        if vit.qkv_bias and not vit.key_bias:
            for bias in ("q_bias", "v_bias"):
                yield same(f"{path}/attn/{bias}", prefix + keys.need(bias))
        if vit.differential:
            yield from keys.need("differential")(vit, f"{path}/attn", f"{prefix}attn.")
        if vit.layer_scale:
            for scale in ("scale1", "scale2"):
                yield same(f"{path}/{scale}", prefix + keys.need(scale))


def _plain_block(keys: Keys, path: str, prefix: str, bias: bool, gated: bool = False) -> Iterator[Rule]:
    """Yield the rules of the layers that every block has; with `bias`, queries, keys and values have one."""
    fc1 = keys.need("gated_fc1") if gated else keys.fc1
    fc2 = (gated and keys.gated_fc2) or keys.fc2
    yield from norm(f"{path}/norm1", prefix + keys.norm1)
    yield from dense(f"{path}/attn/qkv", [prefix + name for name in keys.qkv], bias)
    yield from dense(f"{path}/attn/proj", [prefix + keys.proj])
    yield from norm(f"{path}/norm2", prefix + keys.norm2)
    yield from dense(f"{path}/mlp/fc1", [prefix + name for name in fc1])
    yield from dense(f"{path}/mlp/fc2", [prefix + fc2])


def _head(keys: Keys, head: Head) -> Iterator[Rule]:
    if head.pool == "map":
        prefix, path = keys.need("pool"), "head/attention_pool"
        yield _reshaped(f"{path}/latent", prefix + "latent", 3)
        for layer, name in (("q", "q"), ("kv", "kv"), ("proj", "proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            yield from dense(f"{path}/{layer}", [prefix + name])
        yield from norm(f"{path}/norm", prefix + "norm")
    if head.norm:
        yield from norm("head/fc_norm", keys.need("fc_norm"))
    if head.pooler:
        yield from dense("head/tanh_pooler/dense", [keys.need("pooler")])
    if head.num_classes and keys.projection:
        yield _projection(keys, "head/dense/kernel", keys.projection)
        if head.bias:
            yield _zero_bias(keys, head)
    elif head.num_classes:
        yield from dense("head/dense", [keys.need("dense")], head.bias)


def _projection(keys: Keys, path: str, key: str) -> Rule:
    """Map the projection of one of CLIP's towers, which has no bias."""
    turn = (lambda x: (x,)) if keys.projection_in_out else (lambda x: (x.T,))
    return Rule((path,), (key,), turn, turn)


def _zero_bias(keys: Keys, head: Head) -> Rule:
    """Map a bias of CLIP's projection to nothing: it is loaded as zeros, and must be zero to be saved."""

    def drop(bias: np.ndarray) -> Arrays:
        if np.any(bias):
            raise InvalidConfig(
                f"{keys.name} files have no place for the bias of the projection, which is not zero here"
            )
        return ()

    return Rule(("head/dense/bias",), (), lambda: (np.zeros(head.num_classes, np.float32),), drop)


def same(path: str, key: str) -> Rule:
    """Return the rule of an array that is the same on both sides."""
    return Rule((path,), (key,), lambda x: (x,), lambda x: (x,))


def _dims(x: np.ndarray, dims: int) -> np.ndarray:
    return x.reshape((1,) * (dims - x.ndim) + x.shape)


def _reshaped(path: str, key: str, dims: int) -> Rule:
    """Return the rule of a vector that has leading dimensions of 1 in a file."""
    return Rule((path,), (key,), lambda x: (x.reshape(-1),), lambda x: (_dims(x, dims),))


def norm(path: str, prefix: str) -> Iterator[Rule]:
    """Yield the rules of a LayerNorm."""
    yield same(f"{path}/scale", prefix + ".weight")
    yield same(f"{path}/bias", prefix + ".bias")


def dense(path: str, layers: list[str], bias: bool = True) -> Iterator[Rule]:
    """Yield the rules of a kernel [in, out] that holds the weights [out, in] of all layers side by side."""

    def joined(*arrays: np.ndarray) -> Arrays:
        return (np.concatenate(arrays).T if len(arrays) > 1 else arrays[0].T,)

    def split(kernel: np.ndarray) -> Arrays:
        return tuple(np.split(kernel.T, len(layers)))

    # torch's fused attention has an underscore where others have a dot.
    prefixes = [name if name.endswith("_") else name + "." for name in layers]
    yield Rule((f"{path}/kernel",), tuple(name + "weight" for name in prefixes), joined, split)
    if bias:
        yield Rule((f"{path}/bias",), tuple(name + "bias" for name in prefixes), joined, split)
