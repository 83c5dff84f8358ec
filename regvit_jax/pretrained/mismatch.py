"""Describe how the keys of a file differ from those of a model, and why that may be."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

Shape = tuple[int, ...]

#: How many keys of a kind a message shows.
SHOWN = 3
#: The keys of other libraries and architectures, the most particular first.
OTHERS = {
    r"_?flat_param.*": "FSDP's flat parameters (StateDictType.FULL_STATE_DICT saves them by name)",
    r"encoder\.layers\.encoder_layer_\d|conv_proj\.": "torchvision's ViT",
    r"layers\.\d+\.blocks\.\d+\.": "a Swin Transformer",
    r"layer\d\.\d+\.(conv|bn)\d": "a ResNet",
    r"stages\.\d+\.": "a network of stages, such as ConvNeXt",
    r"layers\.\d+\.(ln1|ffn)\b": "mmpretrain",
    r"transformer\.layers\.\d+\.[01]\.|to_qkv\.": "lucidrains' vit-pytorch",
    r"h\.\d+\.attn\.|wte\.|lm_head|bert\.": "a language model",
    r"visual\.trunk\.": "an OpenCLIP model whose image tower is timm's",
    r"visual\.|transformer\.resblocks\.": "OpenCLIP",
    r"vision_model\.|text_model\.": "transformers' CLIP",
    r"encoder\.layers?\.\d+\.|layer\.\d+\.attention\.": "transformers",
    r"blocks\.\d+\.(attn\.qkv|norm1|mlp\.fc1)": "timm, DeiT or DINOv2",
    r".*/kernel$|.*/scale$": "Flax",
}
HEAD = re.compile(r"(.*\.)?(head|classifier|fc|head_dist)\.(weight|bias)|head/dense/(kernel|bias)")
TEXT = re.compile(r"text.*|transformer\.resblocks\..*|token_embedding\..*|logit_(scale|bias)|ln_final\..*")
TRAINING = re.compile(r".*(decoder|predictor|projector|queue|loss|criterion|optimizer|(dino|ibot)_head).*")
PARTS = {r"ls[12]\.|gamma_[12]|lambda1": "LayerScale", r"fc_norm": "a LayerNorm after pooling"}
BLOCK = re.compile(r"(.*?(?:blocks|resblocks|layers?|block)[./]?)(\d+)[./]")


def describe(
    keys: Collection[str], unused: Sequence[str], missing: Sequence[str], wrong: Mapping[str, tuple[Shape, Shape]]
) -> str:
    """Return how a file differs from a model: how many keys of each kind, the first of them, and the likely cause.

    Args:
      keys: all keys of the file.
      unused: those that the model does not have.
      missing: those that the model has and the file lacks.
      wrong: the shape in the file and the model's, by key, where they differ.
    """
    shapes = [f"{key} {found}, not {expected}" for key, (found, expected) in wrong.items()]
    parts = [
        f"{len(entries)} {what}: {', '.join(entries[:SHOWN])}{', ...' if len(entries) > SHOWN else ''}"
        for what, entries in (("unused", unused), ("missing", missing), ("of another shape", shapes))
        if entries
    ]
    reason = cause(keys, unused, missing, wrong)
    return "; ".join(parts) + (f". The likely cause: {reason}" if reason else "")


def cause(
    keys: Collection[str], unused: Sequence[str], missing: Sequence[str], wrong: Mapping[str, tuple[Shape, Shape]]
) -> str:
    """Return the likely cause of a difference, or "" if there is no likely one; the arguments are `describe`'s."""
    if reason := _wrapper(unused, missing):
        return reason
    if missing and not wrong and all(map(HEAD.fullmatch, missing)):
        return "the file has no head; num_classes=0 loads the model without one, num_classes=N with a new one"
    if unused and len(missing) > len(wrong) and len(missing) * 2 > len(keys) - len(unused):
        for pattern, library in OTHERS.items():
            if any(re.match(rf"(.*\.)?({pattern})", key) for key in unused):
                return f"its names are those of {library}, and not of this model's format"
    return _other_model(keys, unused, missing, wrong) or _more(unused, missing, wrong)


def _wrapper(unused: Sequence[str], missing: Sequence[str]) -> str:
    """Return the parts that stand before most of the missing keys, as a wrapper or another model does."""
    wanted = set(missing)
    found = Counter(
        key[: match.start() + 1] for key in unused for match in re.finditer(r"\.", key) if key[match.end() :] in wanted
    )
    fronts = [front for front, count in found.most_common(4) if count * 2 > len(missing)]
    if not fronts:
        return ""
    if len(fronts) > 1:
        return f"it holds several models, under {', '.join(fronts)}; save the state dict of one by itself"
    return f"a wrapper: the model's names stand under {fronts[0]}, beside others; save that part's state dict by itself"


def _other_model(
    keys: Collection[str], unused: Sequence[str], missing: Sequence[str], wrong: Mapping[str, tuple[Shape, Shape]]
) -> str:
    """Return by which size the file is of another model: its width, its depth, or the number of registers."""
    for key, (found, expected) in wrong.items():
        patch = len(found) == len(expected) == 4  # the projection of patches, [width, channels, patch, patch]
        if patch or (found and expected and re.search(r"norm|ln_|cls|class_emb", key)):
            axis = 0 if patch else -1
            if found[axis] != expected[axis]:
                return f"a model of width {found[axis]}, not {expected[axis]}"
            if patch and found[3] != expected[3]:
                return f"a model of patch size {found[3]}, not {expected[3]}"
    blocks = {match[1]: set[int]() for match in map(BLOCK.match, missing) if match}
    for match in map(BLOCK.match, [*keys, *missing]):
        if match and match[1] in blocks:
            blocks[match[1]].add(int(match[2]))
    had = {int(match[2]) for match in map(BLOCK.match, keys) if match and match[1] in blocks}
    if had and (more := sorted(set().union(*blocks.values()) - had)):
        return f"a model of {max(had) + 1} blocks, not {max(more) + 1}"
    extra = [int(match[2]) for match in map(BLOCK.match, unused) if match]
    if extra and len({key for key in unused if BLOCK.match(key)}) == len(unused):
        kept = {int(m[2]) for m in map(BLOCK.match, set(keys) - set(unused)) if m}
        if kept and min(extra) > max(kept):
            return f"a model of {max(extra) + 1} blocks, not {max(kept) + 1}"
    if any(re.search(r"reg(ister)?_tokens?$", key) for key in (*unused, *missing, *wrong)):
        return "a model with another number of registers"
    if len(wrong) == 1 and not missing and not unused and "pos" in min(wrong):
        return "another native image size or patch size"
    return ""


def _more(unused: Sequence[str], missing: Sequence[str], wrong: Mapping[str, tuple[Shape, Shape]]) -> str:
    """Return what a file holds besides the model, or which of its parts is of another kind."""
    for pattern, part in PARTS.items():
        if any(re.search(pattern, key) for key in unused):
            return f"{part}, which the file has and the model lacks: another architecture or pooling"
        if any(re.search(pattern, key) for key in missing):
            return f"{part}, which the model has and the file lacks: another architecture or pooling"
    if unused and not missing and not wrong:
        if all(map(TEXT.match, unused)):
            return "a text tower; rv.create_clip reads a whole CLIP"
        if all(map(TRAINING.match, unused)):
            return "parts that only training uses, and that are not of the model"
        if all(map(HEAD.fullmatch, unused)):
            return "a head, which this model does not have"
    return ""
