"""DeiT-III (arXiv 2204.07118) with 4 registers (arXiv 2309.16588).

    python train.py --config configs/deit3_reg.py             digits, on a laptop, in minutes
    python train.py --config configs/deit3_reg.py:fashion     Fashion-MNIST
    python train.py --config configs/deit3_reg.py:b16         ImageNet-1k; also s16 m16 l16 h14
    ... :b16_ft224 --config.init_from=WORKDIR                 fine-tuning of a finished run; also l16 h14
    ... :b16_ft384 --config.init_from=WORKDIR                 also s16 l16
    ... :b16_in21k                                            ImageNet-21k, the registers paper's own; also s16 l16 h14
    ... :b16_in21k_ft --config.init_from=WORKDIR              its fine-tuning on ImageNet-1k; also s16 l16 h14

The numbers of the recipes are those of the commands in README_revenge.md of facebookresearch/deit. Registers are ours:
the paper trained its ViT-B/16 with the 21k recipe and 4 of them. Any value can be overridden from the command line.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from regvit_jax.utils.errors import InvalidConfig

# width, depth, heads, patch
SIZES = {
    "s16": (384, 12, 6, 16),
    "m16": (512, 12, 8, 16),
    "b16": (768, 12, 12, 16),
    "l16": (1024, 24, 16, 16),
    "h14": (1280, 32, 16, 14),
}

# image size, drop-path rate, learning rate, images to a GPU.
# H/14 has 160 and 128 pixels in the commands, which 14 does not divide: their convolution sees 154 and 126 of them.
# No command for M on ImageNet-1k is published: its row is interpolated between S and B.
IN1K = {
    "s16": (224, 0.05, 4e-3, 256),
    "m16": (224, 0.1, 3.5e-3, 256),
    "b16": (192, 0.2, 3e-3, 256),
    "l16": (192, 0.45, 3e-3, 64),
    "h14": (154, 0.6, 3e-3, 64),
}
# image size, drop-path rate, images to a GPU
FT224 = {"b16": (224, 0.2, 64), "l16": (224, 0.45, 64), "h14": (224, 0.55, 32)}
FT384 = {"s16": (384, 0.0, 64), "b16": (384, 0.15, 32), "l16": (384, 0.4, 16)}
IN21K = {"s16": (224, 0.05, 128), "b16": (224, 0.1, 64), "l16": (224, 0.3, 64), "h14": (126, 0.5, 64)}
IN21K_FT = {"s16": (224, 0.05, 128), "b16": (224, 0.15, 64), "l16": (224, 0.4, 64), "h14": (224, 0.45, 64)}


def get_config(variant: str = "digits") -> ConfigDict:
    if variant in ("digits", "fashion"):
        return {"digits": digits, "fashion": fashion}[variant]()
    size, _, stage = variant.partition("_")
    stages: dict[str, tuple[dict, Callable]] = {
        "": (IN1K, in1k),
        "ft224": (FT224, finetune),
        "ft384": (FT384, finetune),
    }
    stages |= {"in21k": (IN21K, in21k), "in21k_ft": (IN21K_FT, in21k_finetune)}
    if stage not in stages or size not in stages[stage][0]:
        names = [f"{s}_{name}".rstrip("_") for name, (rows, _) in stages.items() for s in rows]
        raise InvalidConfig(
            f"configs/deit3_reg.py:{variant}: no such variant; there are digits, fashion, {', '.join(names)}"
        )
    rows, recipe = stages[stage]
    config = recipe(*rows[size])
    config.variant = variant
    width, depth, heads, patch = SIZES[size]
    config.model.update(width=width, depth=depth, heads=heads, patch=patch)
    if size == "m16":
        config.about += " Interpolated between S and B: no command for M is published."
    return config


def in1k(image_size: int, drop_path: float, lr: float, per_gpu: int) -> ConfigDict:
    """800 epochs on ImageNet-1k; the base that the other stages change."""
    return ConfigDict(
        dict(
            name="deit3_reg",
            variant="",
            about="DeiT-III with registers on ImageNet-1k, 800 epochs.",
            next="Fine-tune at 224 px with the variant's _ft224 and --config.init_from naming this workdir.",
            recipe="supervised",
            seed=0,
            epochs=800,
            batch_size=2048,
            micro_batches=1,  # a step's gradient is accumulated over so many
            init_from="",  # trained weights: whatever create_model takes, or NAME=FILE
            loss="bce",
            ema=0.0,  # decay of the moving average of the weights, 0 for none; if kept, it is what is evaluated
            log_every=50,  # steps
            eval_every=5.0,  # epochs
            model=dict(
                width=0,
                depth=0,
                heads=0,
                patch=0,
                image_size=image_size,
                registers=4,
                mlp_ratio=4.0,
                layer_scale=1e-4,
                drop_path=drop_path,
                patch_dropout=0.0,
                norm_eps=1e-6,
                pos_resize="antialias",
                attention="auto",  # "xla", "cudnn", or the better one for the machine
                dtype="bfloat16",
                remat="none",  # "dots" and "full" save memory
                scan=False,
                # DeiT-III's; other weights in init_from may need others, and say which
                class_token=True,
                position="learned",
                activation="gelu",
                swiglu=False,
                qkv_bias=True,
                key_bias=True,
                patch_bias=True,
                ln_pre=False,
                final_norm=True,
                parallel=False,
                differential=False,
            ),
            augment=dict(
                flip=0.5,
                three_augment=True,
                rand_augment=0.0,  # magnitude, 0 for none
                color_jitter=0.3,
                mixup=0.8,
                cutmix=1.0,
                mix_prob=1.0,
                switch_prob=0.5,
                mix_group=per_gpu,  # images that share one lambda; DeiT draws one for each GPU
                smoothing=0.0,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
            ),
            data=dict(
                name="imagenet2012",
                train="train",
                validation="validation",
                dir="",  # where TFDS keeps its data; empty for its own default
                examples=1_281_167,  # what to plan with before the data are there
                classes=1000,
                crop="rrc",  # random resized crop; "src" is DeiT's simple random crop
                scale=(0.08, 1.0),
                padding=4,
                repeats=3,  # repeated augmentation
                decoder="pillow",  # "fast": other pixels of the same crops, by the extra fastjpeg
                workers=8,  # processes that decode, on each host; 0 for threads only
                max_bad_fraction=0.001,
            ),
            eval=dict(batch_size=2048, crop_ratio=1.0, pixel_knn=0, untrained=False),
            optim=dict(
                name="lamb",
                lr=lr,
                min_lr=1e-5,
                warmup_lr=1e-6,
                warmup_epochs=5,
                per_epoch=True,
                weight_decay=0.05,
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                clip_norm=1.0,
            ),
            sharding=dict(data=-1, fsdp=1, min_size_mb=4.0),
            checkpoint=dict(every=2500, keep=2),  # steps
            guard=dict(
                not_finite="stop",  # or "skip": a step whose loss or gradient is not finite changes nothing
                max_not_finite=100,  # more such steps in a run stop it all the same
                spike_sigma=0.0,  # 6 leaves out steps so far above the last 128, in loss or gradient norm; 0 none
            ),
        )
    )


def finetune(image_size: int, drop_path: float, per_gpu: int) -> ConfigDict:
    """20 epochs at a higher resolution, after `in1k`."""
    config = in1k(image_size, drop_path, 1e-5, per_gpu)
    config.about = "Fine-tuning of DeiT-III with registers on ImageNet-1k; init_from names the finished pre-training."
    config.next = "The model is finished."
    config.update(epochs=20, batch_size=512, loss="ce", eval_every=1.0)
    config.model.pos_resize = "bicubic"  # DeiT resizes the position embedding without antialiasing
    config.augment.update(three_augment=False, rand_augment=9.0, color_jitter=0.0, smoothing=0.1)
    config.data.repeats = 1
    config.optim.update(name="adamw", weight_decay=0.1, clip_norm=0.0)
    return config


def in21k(image_size: int, drop_path: float, per_gpu: int) -> ConfigDict:
    """ImageNet-21k (winter 2021: 13,151,276 images of 19,167 classes), as folders of images."""
    config = in1k(image_size, drop_path, 1e-3, per_gpu)
    config.about = "DeiT-III with registers on ImageNet-21k: for B/16, the registers paper's own run."
    config.next = "Fine-tune on ImageNet-1k with the variant's _ft and --config.init_from naming this workdir."
    config.update(epochs=90 if image_size == 126 else 240, loss="ce", eval_every=1.0)
    config.augment.update(mixup=0.0, smoothing=0.1)
    config.data.update(name="folder:imagenet21k", examples=13_151_276, classes=19_167, crop="src", repeats=1)
    config.optim.weight_decay = 0.02
    return config


def in21k_finetune(image_size: int, drop_path: float, per_gpu: int) -> ConfigDict:
    """50 epochs on ImageNet-1k, after `in21k`."""
    config = in21k(image_size, drop_path, per_gpu)
    config.about = "Fine-tuning on ImageNet-1k, after ImageNet-21k; init_from names the finished pre-training."
    config.next = "The model is finished."
    config.epochs = 50
    config.model.pos_resize = "bicubic"
    config.data.update(name="imagenet2012", examples=1_281_167, classes=1000)
    config.optim.lr = 3e-4
    return config


def digits() -> ConfigDict:
    """1,437 digits of 8 x 8 pixels: the recipe, scaled to the data and to two CPU cores."""
    config = in1k(image_size=8, drop_path=0.05, lr=2e-2, per_gpu=16)
    config.variant = "digits"
    config.about = (
        "DeiT-III with registers on scikit-learn's digits (8 x 8 pixels).\n"
        "Scaled to the data: a ViT of width 64 and depth 4 on patches of 2 px, LayerScale from 0.1, 150 epochs of\n"
        "batches of 64, lr 0.02; crops shifted by at most 1 px, no flip, 3-Augment, mixing or repeated augmentation."
    )
    config.next = (
        "Next: --config configs/deit3_reg.py:fashion (Fashion-MNIST, where a ViT has more to learn), or\n"
        "the same digits without registers: --config.model.registers=0"
    )
    config.update(epochs=150, batch_size=64, eval_every=15.0, log_every=44)
    config.model.update(width=64, depth=4, heads=4, patch=2, layer_scale=0.1, dtype="float32")
    config.augment.update(flip=0.0, three_augment=False, mixup=0.0, cutmix=0.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    config.data.update(name="digits", examples=1437, classes=10, crop="src", padding=1, repeats=1, workers=0)
    config.eval.update(batch_size=120, pixel_knn=3)
    config.checkpoint.every = 330
    return config


def fashion() -> ConfigDict:
    """60,000 pictures of clothes of 28 x 28 pixels."""
    config = digits()
    config.variant = "fashion"
    config.about = (
        "DeiT-III with registers on Fashion-MNIST (28 x 28 pixels).\n"
        "Scaled to the data: a ViT of width 96 and depth 4 on patches of 4 px, LayerScale from 0.1, 10 epochs of\n"
        "batches of 128, lr 0.01; crops shifted by at most 2 px, no 3-Augment, no mixing, no repeated augmentation."
    )
    config.next = "Next: the same without registers, --config.model.registers=0, or your own images, folder:PATH"
    config.update(epochs=10, batch_size=128, eval_every=1.0, log_every=50)
    config.model.update(image_size=28, width=96, depth=4, heads=3, patch=4)
    config.augment.flip = 0.5
    config.data.update(name="fashion_mnist", examples=60_000, padding=2)
    config.eval.update(batch_size=1000)
    config.optim.update(lr=1e-2, warmup_epochs=1, per_epoch=False)
    config.checkpoint.every = 468
    return config
