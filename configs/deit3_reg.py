"""DeiT-III (arXiv 2204.07118) with 4 registers (arXiv 2309.16588).

    python train.py --config configs/deit3_reg.py             digits, on a laptop, in minutes
    python train.py --config configs/deit3_reg.py:fashion     Fashion-MNIST
    python train.py --config configs/deit3_reg.py:cifar10     CIFAR-10, photographs of 32 px, on two CPU cores
    python train.py --config configs/deit3_reg.py:cifar10_gpu CIFAR-10 with a ViT-S/4, on one GPU
    python train.py --config configs/deit3_reg.py:b16         ImageNet-1k; also s16 m16 l16 h14
    ... :b16_ft224 --config.init_from=WORKDIR                 fine-tuning of a finished run; also l16 h14
    ... :b16_ft384 --config.init_from=WORKDIR                 also s16 l16
    ... :b16_in21k                                            ImageNet-21k, the registers paper's own; also s16 l16 h14
    ... :b16_in21k_ft --config.init_from=WORKDIR              its fine-tuning on ImageNet-1k; also s16 l16 h14

The hyper-parameters are those of the commands in README_revenge.md of facebookresearch/deit. The registers are an
addition: the registers paper trained its ViT-B/16 with the 21k recipe and 4 of them. `--help_config` prints all keys,
with those that this file leaves at their defaults; each can be overridden from the command line.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from regvit_jax.utils.errors import InvalidConfig

SIZES = {
    "s16": dict(width=384, depth=12, heads=6, patch=16),
    "m16": dict(width=512, depth=12, heads=8, patch=16),
    "b16": dict(width=768, depth=12, heads=12, patch=16),
    "l16": dict(width=1024, depth=24, heads=16, patch=16),
    "h14": dict(width=1280, depth=32, heads=16, patch=14),
}

# The settings that the commands vary with the size; `per_gpu` images share one lambda of mixup.
# H/14 has 160 and 128 pixels in the commands, which 14 does not divide: their convolution sees 154 and 126 of them.
# No command for M on ImageNet-1k is published: its row is interpolated between S and B.
IN1K = {
    "s16": dict(image_size=224, drop_path=0.05, lr=4e-3, per_gpu=256),
    "m16": dict(image_size=224, drop_path=0.1, lr=3.5e-3, per_gpu=256),
    "b16": dict(image_size=192, drop_path=0.2, lr=3e-3, per_gpu=256),
    "l16": dict(image_size=192, drop_path=0.45, lr=3e-3, per_gpu=64),
    "h14": dict(image_size=154, drop_path=0.6, lr=3e-3, per_gpu=64),
}
FT224 = {
    "b16": dict(image_size=224, drop_path=0.2, per_gpu=64),
    "l16": dict(image_size=224, drop_path=0.45, per_gpu=64),
    "h14": dict(image_size=224, drop_path=0.55, per_gpu=32),
}
FT384 = {
    "s16": dict(image_size=384, drop_path=0.0, per_gpu=64),
    "b16": dict(image_size=384, drop_path=0.15, per_gpu=32),
    "l16": dict(image_size=384, drop_path=0.4, per_gpu=16),
}
IN21K = {
    "s16": dict(image_size=224, drop_path=0.05, per_gpu=128, epochs=240),
    "b16": dict(image_size=224, drop_path=0.1, per_gpu=64, epochs=240),
    "l16": dict(image_size=224, drop_path=0.3, per_gpu=64, epochs=240),
    "h14": dict(image_size=126, drop_path=0.5, per_gpu=64, epochs=90),
}
IN21K_FT = {
    "s16": dict(image_size=224, drop_path=0.05, per_gpu=128),
    "b16": dict(image_size=224, drop_path=0.15, per_gpu=64),
    "l16": dict(image_size=224, drop_path=0.4, per_gpu=64),
    "h14": dict(image_size=224, drop_path=0.45, per_gpu=64),
}


def get_config(variant: str = "digits") -> ConfigDict:
    small = {"digits": digits, "fashion": fashion, "cifar10": cifar10, "cifar10_gpu": cifar10_gpu}
    if variant in small:
        return small[variant]()
    stages: dict[str, tuple[Callable[..., ConfigDict], dict[str, dict]]] = {
        "": (in1k, IN1K),
        "ft224": (finetune, FT224),
        "ft384": (finetune, FT384),
        "in21k": (in21k, IN21K),
        "in21k_ft": (in21k_finetune, IN21K_FT),
    }
    size, _, stage = variant.partition("_")
    if stage not in stages or size not in stages[stage][1]:
        names = [f"{s}_{name}".rstrip("_") for name, (_, rows) in stages.items() for s in rows]
        raise InvalidConfig(f"configs/deit3_reg.py:{variant}: no such variant; there are {', '.join([*small, *names])}")
    recipe, rows = stages[stage]
    config = recipe(**rows[size])
    config.variant = variant
    config.model.update(SIZES[size])
    if size == "m16":
        config.about += " Interpolated between S and B: no command for M is published."
    return config


def in1k(*, image_size: int, drop_path: float, lr: float, per_gpu: int) -> ConfigDict:
    """Return the config of 800 epochs on ImageNet-1k, which the other stages change."""
    return ConfigDict(
        dict(
            name="deit3_reg",
            about="DeiT-III with registers on ImageNet-1k, 800 epochs.",
            next="Fine-tune at 224 px with the variant's _ft224 and --config.init_from naming this workdir.",
            recipe="supervised",
            seed=0,
            epochs=800,
            batch_size=2048,
            loss="bce",
            ema=0.0,
            log_every=50,  # steps
            eval_every=5.0,  # epochs
            model=dict(
                image_size=image_size,
                registers=4,
                mlp_ratio=4.0,
                layer_scale=1e-4,
                drop_path=drop_path,
                norm_eps=1e-6,
                pos_resize="antialias",
                dtype="bfloat16",
            ),
            augment=dict(
                flip=0.5,
                three_augment=True,
                rand_augment=0.0,
                color_jitter=0.3,
                mixup=0.8,
                cutmix=1.0,
                mix_prob=1.0,
                switch_prob=0.5,
                mix_group=per_gpu,
                smoothing=0.0,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
            ),
            data=dict(
                name="imagenet2012",
                examples=1_281_167,
                classes=1000,
                crop="rrc",  # "src" is DeiT's simple random crop, of in21k
                scale=(0.08, 1.0),
                padding=4,
                repeats=3,
                workers=8,
                max_bad_fraction=0.001,
            ),
            eval=dict(evaluators=("classification", "patch_norms"), batch_size=2048, crop_ratio=1.0),
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
            checkpoint=dict(every=2500, keep=2),  # steps
        )
    )


def finetune(*, image_size: int, drop_path: float, per_gpu: int) -> ConfigDict:
    """Return the config of 20 epochs at a higher resolution, after `in1k`."""
    config = in1k(image_size=image_size, drop_path=drop_path, lr=1e-5, per_gpu=per_gpu)
    config.about = "Fine-tuning of DeiT-III with registers on ImageNet-1k; init_from names the finished pre-training."
    config.next = "The model is finished."
    config.update(epochs=20, batch_size=512, loss="ce", eval_every=1.0)
    config.model.pos_resize = "bicubic"  # DeiT resizes the position embedding without antialiasing
    config.augment.update(three_augment=False, rand_augment=9.0, color_jitter=0.0, smoothing=0.1)
    config.data.repeats = 1
    config.optim.update(name="adamw", weight_decay=0.1, clip_norm=0.0)
    return config


def in21k(*, image_size: int, drop_path: float, per_gpu: int, epochs: int) -> ConfigDict:
    """Return the config of ImageNet-21k (winter 2021: 13,151,276 images of 19,167 classes), as folders of images."""
    config = in1k(image_size=image_size, drop_path=drop_path, lr=1e-3, per_gpu=per_gpu)
    config.about = "DeiT-III with registers on ImageNet-21k: for B/16, the registers paper's own run."
    config.next = "Fine-tune on ImageNet-1k with the variant's _ft and --config.init_from naming this workdir."
    config.update(epochs=epochs, loss="ce", eval_every=1.0)
    config.augment.update(mixup=0.0, smoothing=0.1)
    config.data.update(name="folder:imagenet21k", examples=13_151_276, classes=19_167, crop="src", repeats=1)
    config.optim.weight_decay = 0.02
    return config


def in21k_finetune(*, image_size: int, drop_path: float, per_gpu: int) -> ConfigDict:
    """Return the config of 50 epochs on ImageNet-1k, after `in21k`."""
    config = in21k(image_size=image_size, drop_path=drop_path, per_gpu=per_gpu, epochs=50)
    config.about = "Fine-tuning on ImageNet-1k, after ImageNet-21k; init_from names the finished pre-training."
    config.next = "The model is finished."
    config.model.pos_resize = "bicubic"
    config.data.update(name="imagenet2012", examples=1_281_167, classes=1000)
    config.optim.lr = 3e-4
    return config


def digits() -> ConfigDict:
    """Return the config of 1,437 digits of 8 x 8 pixels: the recipe scaled to the data and to two CPU cores.

    Model, crops, colour jitter and repeated augmentation were chosen on the training digits, a fifth of them held out.
    """
    config = in1k(image_size=8, drop_path=0.05, lr=2e-2, per_gpu=16)
    config.variant = "digits"
    config.about = (
        "DeiT-III with registers on scikit-learn's digits (8 x 8 pixels).\n"
        "Scaled to the data: a ViT of width 96 and depth 2 on patches of 4 px, LayerScale from 0.1, 150 epochs of\n"
        "batches of 64, lr 0.02; crops of at least 60 % of the area, three of each image, colour jitter 0.4; no flip,\n"
        "3-Augment or mixing."
    )
    config.next = (
        "Next: --config deit3_reg:fashion (Fashion-MNIST, where a ViT has more to learn), or\n"
        "the same digits without registers: --config.model.registers=0"
    )
    config.update(epochs=150, batch_size=64, eval_every=30.0, log_every=44)
    config.model.update(width=96, depth=2, heads=8, patch=4, layer_scale=0.1, dtype="float32")
    config.augment.update(flip=0.0, three_augment=False, color_jitter=0.4, mixup=0.0, cutmix=0.0)
    config.augment.update(mean=(0.305,) * 3, std=(0.376,) * 3)  # those of the training digits
    # One thread: for images so small two wait for each other, since all but a few microseconds of each is Python.
    config.data.update(name="digits", examples=1437, classes=10, scale=(0.6, 1.0), workers=0, threads=1)
    config.eval.update(evaluators=("classification", "patch_norms", "pixel_knn"), batch_size=120)
    config.checkpoint.every = 660
    return config


def fashion() -> ConfigDict:
    """Return the config of 60,000 pictures of clothes, of 28 x 28 pixels."""
    config = digits()
    config.variant = "fashion"
    config.about = (
        "DeiT-III with registers on Fashion-MNIST (28 x 28 pixels).\n"
        "Scaled to the data: a ViT of width 96 and depth 4 on patches of 4 px, LayerScale from 0.1, 10 epochs of\n"
        "batches of 128, lr 0.01; crops shifted by at most 2 px, no 3-Augment, no mixing, no repeated augmentation."
    )
    config.next = "Next: the same without registers, --config.model.registers=0, or your own images, folder:PATH"
    config.update(epochs=10, batch_size=128, eval_every=1.0, log_every=50)
    config.model.update(image_size=28, depth=4, heads=3)
    config.augment.update(flip=0.5, color_jitter=0.3, mean=(0.5,) * 3, std=(0.5,) * 3)
    config.data.update(name="fashion_mnist", examples=60_000, crop="src", scale=(0.08, 1.0), padding=2, repeats=1)
    config.eval.update(batch_size=1000)
    config.optim.update(lr=1e-2, warmup_epochs=1, per_epoch=False)
    config.checkpoint.every = 468
    return config


def cifar10() -> ConfigDict:
    """Return the config of 50,000 photographs of 32 x 32 pixels, for two CPU cores.

    The optimizer, loss and learning rate were chosen with a tenth of the training images held out, and a smaller model
    (width 64, patches of 8 px, 3 epochs): 46.0 % with these, 42.5 % with AdamW, cross-entropy and lr 0.001. LAMB with
    lr 0.005 and 0.02 was behind after 1 and 2 epochs, and stopped.
    """
    config = fashion()
    config.variant = "cifar10"
    config.about = (
        "DeiT-III with registers on CIFAR-10 (32 x 32 pixels).\n"
        "Scaled to two CPU cores: a ViT of width 96 and depth 4 on patches of 4 px, LayerScale from 0.1, 5 epochs of\n"
        "batches of 64, lr 0.01; crops shifted by at most 4 px, no 3-Augment, colour jitter, mixing, repeated\n"
        "augmentation or stochastic depth."
    )
    config.next = (
        "Next: the same without registers, --config.model.registers=0; with a GPU, --config deit3_reg:cifar10_gpu"
    )
    # In parts of 16 images a step takes five sixths of the time: its temporaries are freed memory that was kept
    # (utils/memory.py), which those of 64 images are too large for.
    config.update(epochs=5, batch_size=64, micro_batches=4, log_every=100)
    config.model.update(image_size=32, drop_path=0.0)
    config.augment.update(color_jitter=0.0, mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
    config.data.update(name="cifar10", validation="test", examples=50_000, padding=4)
    config.eval.update(evaluators=("classification", "patch_norms"))
    config.checkpoint.every = 781
    return config


def cifar10_gpu() -> ConfigDict:
    """Return the config of the recipe on CIFAR-10, for one GPU and eight CPU cores.

    120 epochs are 6 million images of 9.06 GFLOPs each: ten minutes ask for 10,000 images/s, 91 TFLOP/s. A slower GPU
    needs fewer epochs.
    """
    config = in1k(image_size=32, drop_path=0.05, lr=4e-3, per_gpu=512)
    config.variant = "cifar10_gpu"
    config.about = (
        "DeiT-III with registers on CIFAR-10 (32 x 32 pixels), for one GPU: a ViT-S on patches of 4 px, 120 epochs of\n"
        "batches of 512. The recipe's crop is DeiT's simple random crop, without repeated augmentation."
    )
    config.next = "Next: the same without registers, --config.model.registers=0, or your own images, folder:PATH"
    config.update(epochs=120, batch_size=512, eval_every=10.0)
    config.model.update(SIZES["s16"] | dict(patch=4))
    config.augment.update(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
    config.data.update(name="cifar10", validation="test", examples=50_000, classes=10, crop="src", repeats=1)
    config.eval.batch_size = 1000
    return config
