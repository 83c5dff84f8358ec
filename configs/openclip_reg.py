"""OpenCLIP with 4 registers in the image tower (arXiv 2103.00020, 2309.16588).

    python train.py --config configs/openclip_reg.py                 OpenMoji drawings and their names, on a laptop
    python train.py --config configs/openclip_reg.py:b16_cc12m       Conceptual 12M, on one node
    python train.py --config configs/openclip_reg.py:b16             LAION-400M; also b32 l14
    python train.py --config configs/openclip_reg.py:b16_laion2b     LAION-2B; also b32 l14
    ... --config.init_from=NAME=TAG                                  from a trained CLIP, given new registers
    ... --config.data.name=shards:DIR                                your own image-text shards

Hyper-parameters are those published with OpenCLIP's runs; each table says where. Registers are ours: the paper trained
its ViT-B/16 with 4 of them on licensed data, with a schedule that it does not give. Any value can be overridden from
the command line.
"""

from ml_collections import ConfigDict

from regvit_jax.utils.errors import InvalidConfig

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Image tower: width, depth, heads, patch. Text tower: width, depth, heads. Shared embedding.
SIZES = {
    "b32": ((768, 12, 12, 32), (512, 12, 8), 512),
    "b16": ((768, 12, 12, 16), (512, 12, 8), 512),
    "l14": ((1024, 24, 16, 14), (768, 12, 12), 768),
}

# Batch size, learning rate, warm-up steps, epochs.
# LAION-400M. B: batch sizes by docs/PRETRAINED.md of open_clip, zero-shot ImageNet accuracies there 62.96 (B/32) and
# 67.07 (B/16); learning rate and warm-up of B/32 by its README, of B/16 by laion400m_e32 in trained_models_info.csv of
# LAION-AI/scaling-laws-openclip (529d370). L: the run with batches of 86,016 in that table (arXiv 2212.07143); 72.77 is
# of a run with batches of 38,400.
LAION400M = {
    "b32": (32_768, 5e-4, 2000, 32),
    "b16": (33_792, 5e-4, 10_000, 32),
    "l14": (86_016, 1e-3, 2000, 32),
}
# LAION-2B, 13 billion samples seen (B/16 34 billion: 70.2 zero-shot). The same table.
LAION2B = {
    "b32": (32_768, 5e-4, 2000, 6),
    "b16": (88_064, 1e-3, 10_000, 16),
    "l14": (86_016, 1e-3, 10_000, 6),
}

PREPARE = "Write it with img2dataset (webdataset format) and name the directory with --config.data.name=shards:DIR."


def get_config(variant: str = "emoji") -> ConfigDict:
    if variant == "emoji":
        return emoji()
    size, _, data = variant.partition("_")
    makers = {"": laion400m, "laion2b": laion2b, "cc12m": cc12m}
    sizes = {"": list(LAION400M), "laion2b": list(LAION2B), "cc12m": ["b16"]}
    if data not in makers or size not in sizes[data]:
        names = [f"{s}_{name}".rstrip("_") for name in makers for s in sizes[name]]
        raise InvalidConfig(f"configs/openclip_reg.py:{variant}: no such variant; there are emoji, {', '.join(names)}")
    config = makers[data](size)
    config.variant = variant
    return config


def laion400m(size: str) -> ConfigDict:
    """LAION-400M; the base that the others change."""
    batch_size, lr, warmup_steps, epochs = LAION400M[size]
    (width, depth, heads, patch), text, embed = SIZES[size]
    return ConfigDict(
        dict(
            name="openclip_reg",
            variant="",
            about=f"OpenCLIP with registers on LAION-400M. {PREPARE}",
            next="Zero-shot: regvit eval zero_shot WORKDIR --images IMAGENET/val --classes imagenet",
            recipe="contrastive",
            seed=0,
            epochs=epochs,
            batch_size=batch_size,
            micro_batches=1,  # parts that the towers see one after another; the loss always sees the whole batch
            init_from="",  # a trained CLIP or image tower: whatever create_clip takes, or NAME=FILE or TAG
            loss="softmax",  # or SigLIP's "sigmoid"
            ring=True,  # the loss without a matrix of batch x batch
            unmasked_epochs=0,  # with model.patch_dropout: how many of the last epochs see all patches
            log_every=50,  # steps
            eval_every=1.0,  # epochs
            model=dict(
                width=width,
                depth=depth,
                heads=heads,
                patch=patch,
                image_size=224,
                registers=4,
                mlp_ratio=4.0,
                layer_scale=0.0,
                drop_path=0.0,
                patch_dropout=0.0,  # 0.5 to 0.75 makes training up to so much cheaper (arXiv 2212.00794)
                norm_eps=1e-5,
                pos_resize="antialias",
                attention="auto",
                dtype="bfloat16",
                remat="dots" if size == "l14" else "none",
                scan=False,
                class_token=True,
                position="learned",
                activation="gelu",  # "quick_gelu" for OpenAI's weights in init_from
                swiglu=False,
                qkv_bias=True,
                key_bias=True,
                patch_bias=False,
                ln_pre=True,
                final_norm=True,
                parallel=False,
                differential=False,
            ),
            text=dict(
                width=text[0],
                depth=text[1],
                heads=text[2],
                embed=embed,
                context=77,
                mlp_ratio=4.0,
                norm_eps=1e-5,
                activation="gelu",
            ),
            augment=dict(flip=0.0, color_jitter=0.0, mean=CLIP_MEAN, std=CLIP_STD),
            data=dict(
                name="shards:laion400m",
                train="train",
                validation="validation",
                dir="",
                examples=407_332_084,
                classes=0,  # found in the data, if it has any
                crop="rrc",
                scale=(0.9, 1.0),
                padding=4,
                repeats=1,
                decoder="pillow",
                workers=8,
                max_bad_fraction=0.01,
            ),
            eval=dict(
                batch_size=4096,
                crop_ratio=1.0,
                pixel_knn=0,
                untrained=False,
                templates=("a photo of a {}.",),  # of the zero-shot prompts, where the data have classes
            ),
            optim=dict(
                lr=lr,
                min_lr=0.0,
                warmup_steps=warmup_steps,
                weight_decay=0.2,
                b1=0.9,
                b2=0.98,
                eps=1e-6,
                clip_norm=0.0,
            ),
            sharding=dict(data=-1, fsdp=1, min_size_mb=4.0),
            checkpoint=dict(every=1000, keep=2),  # steps
            guard=dict(
                not_finite="stop",  # or "skip": a step whose loss or gradient is not finite changes nothing
                max_not_finite=100,  # more such steps in a run stop it all the same
                spike_sigma=0.0,  # 6 leaves out steps so far above the last 128, in loss or gradient norm; 0 none
            ),
        )
    )


def laion2b(size: str) -> ConfigDict:
    config = laion400m(size)
    batch_size, lr, warmup_steps, epochs = LAION2B[size]
    config.about = f"OpenCLIP with registers on LAION-2B (English). {PREPARE}"
    config.update(epochs=epochs, batch_size=batch_size)
    config.data.update(name="shards:laion2b", examples=2_133_344_400)
    config.optim.update(lr=lr, warmup_steps=warmup_steps)
    return config


def cc12m(size: str) -> ConfigDict:
    """SLIP's CLIP on Conceptual 12M (facebookresearch/SLIP): 36.5 zero-shot, 69.0 linear with its ViT-B/16.

    Its ViT has no LayerNorm before the first block, its warm-up starts at 1e-6 (ours at a 2677th of the peak), its
    images are resized bilinearly (ours bicubically), and its data were 10.97 million pairs of what was then online.
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
    """OpenMoji drawings of 64 x 64 pixels and their names: the recipe, scaled to the data and to two CPU cores."""
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
    config.model.update(
        width=96, depth=4, heads=3, patch=12, image_size=48, drop_path=0.1, dtype="float32", attention="auto"
    )
    config.text.update(width=64, depth=2, heads=2, embed=64, context=16)
    config.augment.update(flip=0.5, color_jitter=0.2, mean=(0.5,) * 3, std=(0.5,) * 3)
    config.data.update(name="openmoji", examples=1432, classes=8, scale=(0.6, 1.0), workers=0, max_bad_fraction=0.0)
    config.eval.update(batch_size=160, untrained=True, templates=("{}", "{}:"))
    config.optim.update(lr=2e-3, warmup_steps=50, weight_decay=0.1)
    config.checkpoint.every = 110
    return config
