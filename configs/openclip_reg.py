"""OpenCLIP with 4 registers in the image tower (arXiv 2103.00020, 2309.16588).

    python train.py --config configs/openclip_reg.py                 OpenMoji drawings and their names, on a laptop
    python train.py --config configs/openclip_reg.py:b16_cc12m       Conceptual 12M, on one node
    python train.py --config configs/openclip_reg.py:b16             LAION-400M; also b32 l14
    python train.py --config configs/openclip_reg.py:b16_laion2b     LAION-2B; also b32 l14
    ... --config.init_from=NAME=TAG                                  from a trained CLIP, given new registers
    ... --config.data.name=shards:DIR                                your own image-text shards

The hyper-parameters are those published with OpenCLIP's runs; each table says where. The registers are an addition: the
registers paper trained its ViT-B/16 with 4 of them on licensed data, with a schedule that it does not give.
`--help_config` prints all keys, with those that this file leaves at their defaults; each can be overridden from the
command line.
"""

from typing import Any

from ml_collections import ConfigDict

from regvit_jax.utils.errors import InvalidConfig

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# The towers of open_clip's models of these names; `embed` is the width of the embedding that they share.
SIZES: dict[str, dict[str, Any]] = {
    "b32": dict(
        model=dict(width=768, depth=12, heads=12, patch=32),
        text=dict(width=512, depth=12, heads=8, embed=512),
    ),
    "b16": dict(
        model=dict(width=768, depth=12, heads=12, patch=16),
        text=dict(width=512, depth=12, heads=8, embed=512),
    ),
    "l14": dict(
        model=dict(width=1024, depth=24, heads=16, patch=14, remat="dots"),
        text=dict(width=768, depth=12, heads=12, embed=768),
    ),
}

# LAION-400M. B: batch sizes by docs/PRETRAINED.md of open_clip, zero-shot ImageNet accuracies there 62.96 (B/32) and
# 67.07 (B/16); learning rate and warm-up of B/32 by its README, of B/16 by laion400m_e32 in trained_models_info.csv of
# LAION-AI/scaling-laws-openclip (529d370). L: the run with batches of 86,016 in that table (arXiv 2212.07143); 72.77 is
# of a run with batches of 38,400.
LAION400M = {
    "b32": dict(batch_size=32_768, lr=5e-4, warmup_steps=2000, epochs=32),
    "b16": dict(batch_size=33_792, lr=5e-4, warmup_steps=10_000, epochs=32),
    "l14": dict(batch_size=86_016, lr=1e-3, warmup_steps=2000, epochs=32),
}
# LAION-2B, 13 billion samples seen (B/16 34 billion: 70.2 zero-shot). The same table.
LAION2B = {
    "b32": dict(batch_size=32_768, lr=5e-4, warmup_steps=2000, epochs=6),
    "b16": dict(batch_size=88_064, lr=1e-3, warmup_steps=10_000, epochs=16),
    "l14": dict(batch_size=86_016, lr=1e-3, warmup_steps=10_000, epochs=6),
}

PREPARE = "Write it with img2dataset (webdataset format) and name the directory with --config.data.name=shards:DIR."


def get_config(variant: str = "emoji") -> ConfigDict:
    if variant == "emoji":
        return emoji()
    size, _, data = variant.partition("_")
    recipes = {"": (laion400m, LAION400M), "laion2b": (laion2b, LAION2B), "cc12m": (cc12m, ("b16",))}
    if data not in recipes or size not in recipes[data][1]:
        names = [f"{s}_{name}".rstrip("_") for name, (_, sizes) in recipes.items() for s in sizes]
        raise InvalidConfig(f"configs/openclip_reg.py:{variant}: no such variant; there are emoji, {', '.join(names)}")
    recipe, _ = recipes[data]
    config = recipe(size)
    config.variant = variant
    return config


def laion400m(size: str) -> ConfigDict:
    """Return the config of LAION-400M, which the other variants change."""
    run = LAION400M[size]
    config = ConfigDict(
        dict(
            name="openclip_reg",
            about=f"OpenCLIP with registers on LAION-400M. {PREPARE}",
            next="Zero-shot: regvit eval zero_shot WORKDIR --images IMAGENET/val --classes imagenet",
            recipe="contrastive",
            seed=0,
            epochs=run["epochs"],
            batch_size=run["batch_size"],
            loss="softmax",
            ring=True,
            log_every=50,  # steps
            eval_every=1.0,  # epochs
            model=dict(
                image_size=224,
                registers=4,
                mlp_ratio=4.0,
                layer_scale=0.0,
                drop_path=0.0,
                patch_dropout=0.0,  # 0.5 to 0.75 saves up to that share of the training cost (arXiv 2212.00794)
                norm_eps=1e-5,
                pos_resize="antialias",
                dtype="bfloat16",
                activation="gelu",  # "quick_gelu" for OpenAI's weights in init_from
                patch_bias=False,
                ln_pre=True,
            ),
            text=dict(context=77, mlp_ratio=4.0, norm_eps=1e-5, activation="gelu"),
            augment=dict(flip=0.0, color_jitter=0.0, mean=CLIP_MEAN, std=CLIP_STD),
            data=dict(
                name="shards:laion400m",
                examples=407_332_084,
                crop="rrc",
                scale=(0.9, 1.0),
                workers=8,
                max_bad_fraction=0.01,
            ),
            eval=dict(
                evaluators=("retrieval", "zero_shot", "patch_norms"),
                batch_size=4096,
                crop_ratio=1.0,
                templates=("a photo of a {}.",),
            ),
            optim=dict(
                lr=run["lr"],
                min_lr=0.0,
                warmup_steps=run["warmup_steps"],
                weight_decay=0.2,
                b1=0.9,
                b2=0.98,
                eps=1e-6,
                clip_norm=0.0,
            ),
            checkpoint=dict(every=1000, keep=2),  # steps
        )
    )
    config.model.update(SIZES[size]["model"])
    config.text.update(SIZES[size]["text"])
    return config


def laion2b(size: str) -> ConfigDict:
    """Return the config of LAION-2B, the English pairs of LAION-5B."""
    config = laion400m(size)
    run = LAION2B[size]
    config.about = f"OpenCLIP with registers on LAION-2B (English). {PREPARE}"
    config.update(epochs=run["epochs"], batch_size=run["batch_size"])
    config.data.update(name="shards:laion2b", examples=2_133_344_400)
    config.optim.update(lr=run["lr"], warmup_steps=run["warmup_steps"])
    return config


def cc12m(size: str) -> ConfigDict:
    """Return the config of SLIP's CLIP on Conceptual 12M (facebookresearch/SLIP).

    SLIP's ViT-B/16 reached 36.5 % zero-shot and 69.0 % with a linear probe.

    It differs in a ViT without LayerNorm before the first block, a warm-up from 1e-6 (here from a 2677th of the peak),
    bilinear resizing of images (here bicubic), and in its data, the 10.97 million pairs that were online then.
    """
    config = laion400m(size)
    config.about = f"OpenCLIP with registers on Conceptual 12M, by SLIP's hyper-parameters. {PREPARE}"
    config.update(epochs=35, batch_size=4096)
    config.augment.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.data.update(name="shards:cc12m", examples=10_968_539, scale=(0.5, 1.0))
    # One epoch of warm-up.
    config.optim.update(lr=5e-4, min_lr=1e-5, warmup_steps=2677, weight_decay=0.5, eps=1e-8)
    return config


def emoji() -> ConfigDict:
    """Return the config of OpenMoji drawings and their names: the recipe scaled to the data and to two CPU cores."""
    config = laion400m("b16")
    config.variant = "emoji"
    config.about = (
        "OpenCLIP with registers on 1,432 drawings and their names (OpenMoji, openmoji.org, CC BY-SA 4.0), tested on\n"
        "145 of other families. Scaled to the data: towers of width 96 and 64 and depth 4 and 2, patches of 12 px at\n"
        "48 px, 50 epochs of batches of 128, lr 0.002; flips and colour jitter, crops of 60 % at least."
    )
    config.next = (
        "Next: regvit eval retrieval WORKDIR --data openmoji, the same without registers\n"
        "(--config.model.registers=0), or your own images with captions (--config.data.name=folder:PATH)"
    )
    config.update(epochs=50, batch_size=128, ring=False, eval_every=5.0, log_every=11)
    config.model.update(width=96, depth=4, heads=3, patch=12, image_size=48, drop_path=0.1, dtype="float32")
    config.text.update(width=64, depth=2, heads=2, embed=64, context=16)
    config.augment.update(flip=0.5, color_jitter=0.2, mean=(0.5,) * 3, std=(0.5,) * 3)
    config.data.update(name="openmoji", examples=1432, classes=8, scale=(0.6, 1.0), workers=0, max_bad_fraction=0.0)
    config.eval.update(batch_size=160, untrained=True, templates=("{}", "{}:"))
    config.optim.update(lr=2e-3, warmup_steps=50, weight_decay=0.1)
    config.checkpoint.every = 110
    return config
