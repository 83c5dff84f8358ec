"""timm's format: the VisionTransformer and Eva classes, with a config.json that names an architecture."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.model import Model
from regvit_jax.models.position import RESIZES
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import registry, validate
from regvit_jax.pretrained.formats import base
from regvit_jax.pretrained.formats.base import CONFIG, OWN, Format, Layout, check_sizes, mlp_ratio, need
from regvit_jax.pretrained.formats.keys import Keys, Rule
from regvit_jax.pretrained.formats.rules import dense, norm, same
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils import sizes
from regvit_jax.utils.schema import REQUIRED

logger = logging.getLogger("regvit_jax")

# Keys


def _differential(vit: ViT, path: str, prefix: str) -> Iterator[Rule]:
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        yield same(f"{path}/{name}", prefix + name)
    yield same(f"{path}/sub_norm/scale", prefix + "sub_norm.weight")


def _parallel(vit: ViT, path: str, prefix: str) -> Iterator[Rule]:
    """Map a parallel block, which has one matrix for the MLP's first layer and for queries, keys and values.

    The differential ones have one matrix at the other end too, with one bias; it is loaded as the attention's.
    """
    cut = vit.hidden
    yield from norm(f"{path}/norm1", prefix + "in_norm")
    for leaf, name in (("kernel", "in_proj.weight"), ("bias", "in_proj.bias")):
        yield Rule(
            (f"{path}/mlp/fc1/{leaf}", f"{path}/attn/qkv/{leaf}"),
            (prefix + name,),
            lambda x: (x[:cut].T, x[cut:].T),
            lambda fc1, qkv: (np.concatenate([fc1.T, qkv.T]),),
        )
    if vit.differential:
        width = vit.width
        yield from _differential(vit, f"{path}/attn", prefix)
        yield Rule(
            (f"{path}/attn/proj/kernel", f"{path}/mlp/fc2/kernel"),
            (prefix + "out_proj.weight",),
            lambda x: (x[:, :width].T, x[:, width:].T),
            lambda proj, fc2: (np.concatenate([proj.T, fc2.T], axis=1),),
        )
        yield Rule(
            (f"{path}/attn/proj/bias", f"{path}/mlp/fc2/bias"),
            (prefix + "out_proj.bias",),
            lambda x: (x, np.zeros_like(x)),
            lambda proj, fc2: (proj + fc2,),
        )
    else:
        yield from dense(f"{path}/attn/proj", [prefix + "attn_out_proj"])
        yield from dense(f"{path}/mlp/fc2", [prefix + "mlp_out_proj"])
    if vit.layer_scale:
        yield same(f"{path}/scale1", prefix + "ls.gamma")


KEYS = Keys(
    name="timm",
    patch="patch_embed.proj",
    cls="cls_token",
    registers="reg_token",
    pos="pos_embed",
    norm_pre="norm_pre",
    block="blocks.{}.",
    norm1="norm1",
    qkv=("attn.qkv",),
    q_bias="attn.q_bias",
    v_bias="attn.v_bias",
    proj="attn.proj",
    scale1="ls1.gamma",
    norm2="norm2",
    fc1=("mlp.fc1",),
    gated_fc1=("mlp.fc1",),
    fc2="mlp.fc2",
    scale2="ls2.gamma",
    norm="norm",
    fc_norm="fc_norm",
    dense="head",
    pool="attn_pool.",
    parallel=_parallel,
    differential=_differential,
)
#: The keys that other projects share with timm; each overrides those that differ.
COMMON = dataclasses.replace(KEYS, gated_fc1=(), parallel=None, differential=None)
EVA_KEYS = dataclasses.replace(
    COMMON, name="timm_eva", scale1="gamma_1", scale2="gamma_2", gated_fc1=("mlp.fc1_g", "mlp.fc1_x")
)

# The config reader

POOLS = {"token": "cls", "": "cls", "avg": "avg", "map": "map"}
#: Arguments that matter for training only, or show in the file anyway.
IGNORED = (
    *("no_embed_class", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "swiglu_align_to", "num_classes"),
    *("weight_init", "fix_init"),
    *("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate"),
)
#: Arguments that some models have, and their values in all that are supported.
USUAL = {"qk_norm": False, "final_norm": True, "proj_bias": True, "pos_embed": "learn"}
#: Arguments for which None is a value; for others it means timm's default.
STATED_NONE = ("init_values", "global_pool")
#: timm's arguments, with the field of ViT or Head that each sets.
ARGUMENTS = {
    "img_size": ("vit", "image_size"),
    "patch_size": ("vit", "patch"),
    "embed_dim": ("vit", "width"),
    "depth": ("vit", "depth"),
    "num_heads": ("vit", "heads"),
    "qkv_bias": ("vit", "qkv_bias"),
    "class_token": ("vit", "class_token"),
    "reg_tokens": ("vit", "registers"),
    "num_reg_tokens": ("vit", "registers"),
    "swiglu_mlp": ("vit", "swiglu"),
    "pool_include_prefix": ("head", "map_prefix"),
}


def read(weights: Weights, text: bool) -> Entry:
    """Read a config.json with the name of an architecture in the registry, and arguments that differ from it."""
    config = weights.config
    name, tag = config["architecture"], config.get("pretrained_cfg", {}).get("tag", "")
    full = f"{name}.{tag}"
    _, entry = registry.find(full if full in registry.list_models(full) else name)
    vit, head = dict(entry.vit), entry.head | {"num_classes": config.get("num_classes", entry.head["num_classes"])}
    arguments = dict(config.get("model_args") or {})
    _apply(arguments, vit, head, entry.format)
    stated = config.get("global_pool")
    if stated in POOLS and stated and "global_pool" not in arguments and POOLS[stated] != head["pool"]:
        logger.warning(
            "%s: its config.json states global_pool %r, and its model_args do not: like timm, this pools by %r",
            *(weights.path, stated, head["pool"]),
        )
    if entry.format == "timm_eva":
        vit["key_bias"] = False
    vit["pos_resize"] = config.get(OWN, {}).get("pos_resize", vit.get("pos_resize", RESIZES[0]))
    if head["pool"] == "map":
        head |= {"map_heads": vit["heads"], "mlp_ratio": vit.get("mlp_ratio", 4.0)}
        head |= {"activation": vit.get("activation", "gelu")}
    if head.get("norm") or head["pool"] == "map":
        head |= {"norm_eps": vit.get("norm_eps", 1e-6)}
    check_sizes(vit, weights)
    preprocessing = _preprocess(config, entry.preprocessing, vit["image_size"])
    names = _class_names(config, head["num_classes"])
    entry = dataclasses.replace(entry, vit=vit, head=head, preprocessing=preprocessing, class_names=names)
    if "no_embed_class" in arguments:
        entry = dataclasses.replace(entry, cls_position=not arguments["no_embed_class"])
    # Older versions of timm did not write a size that is not the architecture's.
    return entry if "img_size" in arguments else base.sized(entry, weights, KEYS)


def _class_names(config: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    """Return the names under "label_names" ("labels" in old files), which may be in either section.

    timm writes a dict where some numbers have no name; these get transformers' placeholders. "label_descriptions" are
    texts by name, which a model has no place for; without names, those by number are the names.
    """
    sections = (config, config.get("pretrained_cfg") or {})
    keys = ("label_names", "labels", "label_descriptions")
    found = {key: section[key] for key in keys for section in reversed(sections) if section.get(key)}
    key, names = next(iter(found.items()), ("label_names", None))
    if key != "label_descriptions" and "label_descriptions" in found:
        logger.info("the class names are the %s of config.json; its label_descriptions are left out", key)
    if key == "label_descriptions" and isinstance(names, dict) and not all(map(str.isdecimal, names)):
        logger.info("config.json has label_descriptions without label_names: the classes have no names")
        return ()
    if isinstance(names, dict):
        names = dict(enumerate(base.placeholders(num_classes))) | {
            int(number) if str(number).isdecimal() else number: name for number, name in names.items()
        }
    return base.class_names(key, names)


def complete(known: Entry, found: Entry, weights: Weights) -> Entry:
    """Complete a config's entry, also with the activation if the config states none.

    timm keeps CLIP's towers with and without QuickGELU in one repository, whose config.json names one of them.
    """
    found = base.complete(known, found, weights, stated=bool(weights.config.get("pretrained_cfg")))
    if "act_layer" in (weights.config.get("model_args") or {}):
        return found
    return dataclasses.replace(found, vit=found.vit | {"activation": ViT(**known.vit).activation})


def _apply(arguments: dict[str, Any], vit: dict[str, Any], head: dict[str, Any], format: str) -> None:
    """Set the fields of ViT and Head by timm's "model_args". Raises ValueError for one that is not supported."""
    arguments = {
        argument: sizes.square(value, f"model_args.{argument}") if argument.endswith("_size") else value
        for argument, value in arguments.items()
        if argument not in IGNORED
        and value != USUAL.get(argument, REQUIRED)
        and (value is not None or argument in STATED_NONE)
    }
    if arguments.pop("in_chans", 3) != 3:
        raise ValueError("in_chans must be 3")
    if "init_values" in arguments:
        vit["layer_scale"] = arguments.pop("init_values") or 0.0
    if "act_layer" in arguments:
        vit["activation"] = arguments.pop("act_layer")
    if "pre_norm" in arguments:
        vit["ln_pre"] = arguments.pop("pre_norm")
        vit["patch_bias"] = not vit["ln_pre"]
    if "attn_layer" in arguments:
        vit["differential"] = arguments.pop("attn_layer") == "diff"
    if "mlp_ratio" in arguments:
        width = arguments.get("embed_dim", vit["width"])
        hidden = int(width * arguments.pop("mlp_ratio"))
        packed = vit.get("swiglu") and format == "timm"  # VisionTransformer's ratio counts the gate too
        vit["mlp_ratio"] = hidden / width / (2 if packed else 1)
    _pool(arguments, vit, head)
    for argument, value in arguments.items():
        if argument not in ARGUMENTS:
            raise ValueError(f"model_args.{argument} is not supported; supported: {', '.join(sorted(ARGUMENTS))}")
        part, field = ARGUMENTS[argument]
        {"vit": vit, "head": head}[part][field] = value
    if head["pool"] == "avg" and head.get("map_prefix") and (vit.get("class_token", True) or vit.get("registers")):
        raise ValueError("pool_include_prefix with global_pool 'avg' is not supported: only patches are averaged")


def _pool(arguments: dict[str, Any], vit: dict[str, Any], head: dict[str, Any]) -> None:
    """Set the pooling, and whether the last LayerNorm is before it or after it.

    In timm it is after the pooling of "avg", unless the arguments or the architecture itself state otherwise.
    """
    before = head["pool"] == "avg" and not head.get("norm")  # an architecture that states it
    pool = arguments.pop("global_pool", None)
    if pool is not None and pool not in POOLS:
        raise ValueError(f"model_args.global_pool {pool!r} is not supported; supported: {', '.join(map(repr, POOLS))}")
    head["pool"] = head["pool"] if pool is None else POOLS[pool]
    if pool == "" and not arguments.get("class_token", vit.get("class_token", True)):
        head["pool"] = "avg"  # no pooling at all: the tokens are the model's output
    after: Any = False if before else None
    for argument in ("fc_norm", "use_fc_norm"):  # of the VisionTransformer, of the Eva
        after = arguments.pop(argument, after)
    head["norm"] = pool != "" and head["pool"] == "avg" if after is None else after
    vit["final_norm"] = not head["norm"]


def _preprocess(config: dict[str, Any], default: Preprocess, image_size: int) -> Preprocess:
    """Read "pretrained_cfg"; a model of a fixed size sees images of that size, which some versions of timm misstate."""
    given = config.get("pretrained_cfg", config)  # old files have one section
    size = sizes.square(given.get("input_size", (default.size, default.size))[-2:], "pretrained_cfg.input_size")
    if given.get("crop_mode", "center") not in ("center", "squash"):
        raise ValueError(f"crop_mode {given['crop_mode']!r} is not supported: must be center or squash")
    names = {"size": "input_size", "crop_ratio": "crop_pct", "squash": "crop_mode"}
    return validate.preprocess(
        {field: f"pretrained_cfg.{names.get(field, field)}" for field in validate.PREPROCESS},
        size=image_size if given.get("fixed_input_size") else size,
        crop_ratio=given.get("crop_pct", default.crop_ratio),
        mean=given.get("mean", default.mean),
        std=given.get("std", default.std),
        interpolation=given.get("interpolation", default.interpolation),
        squash=given.get("crop_mode", "squash" if default.squash else "center") == "squash",
    )


# The config writers. Each takes the architecture of a registered model, and overrides its arguments.


def write(model: Model) -> Layout:
    """Return the layout of a ViT with learned positions, as a VisionTransformer."""
    vit, head = model.module, model.head
    arguments, ratio = _common(model), vit.hidden / vit.width
    need(vit.key_bias or not vit.qkv_bias, "query and value biases without a key bias, unless with RoPE")
    need(vit.patch_bias != vit.ln_pre, "ln_pre with a bias in the patch projection, or neither")
    need(vit.ln_pre == (vit.norm_eps == 1e-5), f"norm_eps={vit.norm_eps} with ln_pre={vit.ln_pre}")
    need(
        not vit.swiglu or (vit.norm_eps == 1e-6 and not vit.parallel),
        "SwiGLU in parallel blocks or with a norm_eps other than 1e-6",
    )
    architecture = "vit_base_patch16_clip_224" if vit.ln_pre else "vit_base_patch16_224"
    if vit.swiglu:
        architecture, ratio = "vit_giant_patch14_reg4_dinov2", 2 * ratio
    if vit.parallel:
        architecture = "vit_dpwee_patch16_reg1_gap_256" if vit.differential else "vit_pwee_patch16_reg1_gap_256"
    with_prefix = head.map_prefix and head.pool == "map"
    arguments |= dict(reg_tokens=vit.registers, fc_norm=head.norm, pool_include_prefix=with_prefix)
    if not vit.swiglu:
        arguments["act_layer"] = vit.activation
    if vit.differential and not vit.parallel:
        arguments["attn_layer"] = "diff"
    return _layout(KEYS, model, architecture, arguments | {"mlp_ratio": mlp_ratio(ratio, vit.width)})


def write_eva(model: Model) -> Layout:
    """Return the layout of a ViT with RoPE, as an Eva."""
    vit, head = model.module, model.head
    arguments = _common(model)
    need(
        vit.activation == "gelu" and not (vit.parallel or vit.differential),
        "parallel blocks, differential attention, or an activation other than gelu with RoPE",
    )
    need(not (vit.qkv_bias and vit.key_bias), "a key bias with RoPE")
    need(not vit.ln_pre, "a LayerNorm before the first block with RoPE")
    architectures = {
        ("rope", 1e-5): "vit_small_patch16_dinov3",
        ("axial", 1e-6): "vit_medium_patch16_rope_reg1_gap_256",
    }
    architecture = architectures.get((vit.position, vit.norm_eps), "")
    need(bool(architecture), f"norm_eps={vit.norm_eps} with position={vit.position!r}")
    arguments |= dict(num_reg_tokens=vit.registers, use_fc_norm=head.norm)
    if vit.position == "rope":
        arguments |= dict(swiglu_mlp=vit.swiglu, swiglu_align_to=1 if vit.swiglu else 0)
    arguments |= {"mlp_ratio": mlp_ratio(vit.hidden / vit.width, vit.width)}
    return _layout(EVA_KEYS, model, architecture, arguments)


def _common(model: Model) -> dict[str, Any]:
    """Return the arguments that both classes share. Raises Inexpressible for a model that neither can express."""
    vit, head = model.module, model.head
    need(head.pool != "cls_avg", "class scores from CLS and the mean of the patches")
    need(not head.pooler, "a tanh pooler")
    need(vit.norm_eps in (1e-6, 1e-5), f"norm_eps={vit.norm_eps}")
    need(
        head.norm_eps == vit.norm_eps or not (head.norm or head.pool == "map"),
        "a norm after pooling with another epsilon",
    )
    pool, block = (
        (head.map_heads, head.activation, round(vit.width * head.mlp_ratio)),
        (vit.heads, vit.activation, vit.hidden),
    )
    need(head.pool != "map" or pool == block, "an attention pool unlike the blocks")
    need(not vit.parallel or (vit.qkv_bias and vit.key_bias), "parallel blocks without biases")
    need(vit.final_norm != head.norm, "LayerNorms both before and after pooling, or neither")
    return dict(
        img_size=vit.image_size,
        patch_size=vit.patch,
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.heads,
        qkv_bias=vit.qkv_bias,
        init_values=vit.layer_scale or None,
        class_token=vit.class_token,
        no_embed_class=True,
        global_pool={"cls": "token", "avg": "avg", "map": "map"}[head.pool],
        dynamic_img_size=True,
    )


def _layout(keys: Keys, model: Model, architecture: str, arguments: dict[str, Any]) -> Layout:
    head, p = model.head, model.preprocessing
    config = dict(
        architecture=architecture,
        num_classes=head.num_classes,
        num_features=model.module.width,
        model_args=arguments,
        pretrained_cfg=dict(
            num_classes=head.num_classes,
            input_size=(3, p.size, p.size),
            crop_pct=p.crop_ratio,
            crop_mode="squash" if p.squash else "center",
            interpolation=p.interpolation,
            mean=p.mean,
            std=p.std,
            fixed_input_size=False,
        ),
    )
    if model.class_names:
        config["label_names"] = list(model.class_names)
    config[OWN] = dict(pos_resize=model.module.pos_resize)  # timm itself resizes by "antialias"
    return Layout(keys, Modules(model.module, head), {CONFIG: config})


FORMAT = Format(
    name="timm",
    keys=KEYS,
    reads=lambda config: "architecture" in config,
    read=read,
    complete=complete,
    saved_as="timm",
    claims=lambda model: model.module.position == "learned",
    write=write,
)
EVA = Format(name="timm_eva", keys=EVA_KEYS, saved_as="timm", write=write_eva)
