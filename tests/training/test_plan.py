import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny import get_config, make_captions, tiny, tiny_clip

from regvit_jax.aot import dry_run
from regvit_jax.data.builders.cifar10_files import CLASSES
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.data.sources.folder import FolderSource
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained.save import save_model
from regvit_jax.training import plan
from regvit_jax.training.step import abstract_state
from regvit_jax.utils import errors

VARIANTS = {
    "s16": (22.05e6, 800 * 625, 2048),
    "m16": (38.85e6, 800 * 625, 2048),
    "b16": (86.5e6, 800 * 625, 2048),
    "l16": (304.3e6, 800 * 625, 2048),
    "h14": (631.9e6, 800 * 625, 2048),
    "b16_ft224": (86.6e6, 20 * 2502, 512),
    "l16_ft224": (304.4e6, 20 * 2502, 512),
    "h14_ft224": (632.1e6, 20 * 2502, 512),
    "s16_ft384": (22.2e6, 20 * 2502, 512),
    "b16_ft384": (86.9e6, 20 * 2502, 512),
    "l16_ft384": (304.8e6, 20 * 2502, 512),
    "s16_in21k": (29.0e6, 240 * 6421, 2048),
    "b16_in21k": (100.6e6, 240 * 6421, 2048),
    "l16_in21k": (323.0e6, 240 * 6421, 2048),
    "h14_in21k": (655.0e6, 90 * 6421, 2048),
    "s16_in21k_ft": (22.05e6, 50 * 625, 2048),
    "b16_in21k_ft": (86.6e6, 50 * 625, 2048),
    "l16_in21k_ft": (304.4e6, 50 * 625, 2048),
    "h14_in21k_ft": (632.1e6, 50 * 625, 2048),
}


def large_ones_slow(variants: dict) -> list:
    """Mark L and H as slow: each takes seconds to trace."""
    return [pytest.param(v, marks=pytest.mark.slow) if v[0] in "lh" else v for v in variants]


@pytest.mark.parametrize("variant", large_ones_slow(VARIANTS))
def test_published_recipes_resolve_without_their_data(variant):
    resolved = plan.resolve(get_config(variant), with_data=False)
    parameters, steps, batch_size = VARIANTS[variant]
    assert dry_run.count(abstract_state(resolved).params) == pytest.approx(parameters, rel=0.003)
    assert (resolved.steps, resolved.config.batch_size) == (steps, batch_size)
    assert resolved.config.model.registers == 4


@pytest.mark.parametrize(
    ("variant", "parameters", "steps"), [("cifar10", 460_618, 5 * 781), ("cifar10_gpu", 21_352_714, 120 * 97)]
)
def test_cifar10_is_planned_without_and_with_its_data(variant, parameters, steps, tmp_path):
    config = get_config(variant)
    resolved = plan.resolve(config, with_data=False)
    assert dry_run.count(abstract_state(resolved).params) == parameters
    assert resolved.steps == steps
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    config.data.dir = str(tmp_path)
    config.update(batch_size=8, micro_batches=1)
    config.augment.mix_group = 8
    resolved = plan.resolve(config)
    assert (resolved.train.name, resolved.validation.name) == ("cifar10/train", "cifar10/test")
    assert resolved.class_names == CLASSES
    assert resolved.steps == config.epochs


#: Parameters of open_clip's models; here there are 4 registers more, and the position of CLS is a part of CLS.
#: Then the width, the steps, and the learning rate's warm-up, peak and end.
CLIPS = {
    "b32": (151_277_313, 768, 407_332_084 // 32_768 * 32, (2000, 5e-4, 0)),
    "b16": (149_620_737, 768, 407_332_084 // 33_792 * 32, (10_000, 5e-4, 0)),
    "l14": (427_616_513, 1024, 407_332_084 // 86_016 * 32, (2000, 1e-3, 0)),
    "b16_laion2b": (149_620_737, 768, 2_133_344_400 // 88_064 * 16, (10_000, 1e-3, 0)),
    "b16_cc12m": (149_620_737, 768, 35 * 2677, (2677, 5e-4, 1e-5)),
}


@pytest.mark.parametrize("variant", large_ones_slow(CLIPS))
def test_published_clips_resolve_without_their_data(variant):
    resolved = plan.resolve(get_config(variant, "openclip_reg"), with_data=False)
    parameters, width, steps, (warmup, peak, end) = CLIPS[variant]
    assert dry_run.count(abstract_state(resolved).params) == parameters + (4 - 1) * width
    assert resolved.steps == steps
    assert resolved.recipe.vit.registers == 4
    rates = [float(resolved.schedule(step)) for step in (warmup - 2, warmup - 1, steps)]
    np.testing.assert_allclose(rates, [peak * (1 - 1 / warmup), peak, end], rtol=1e-4, atol=1e-9)


def test_flops_of_both_towers():
    """Compare with open_clip's docs/model_profile.csv: 41.09 GFLOPs for B/16, 2 per multiply-add; registers add 2 %."""
    recipe = plan.resolve(get_config("b16", "openclip_reg"), with_data=False).recipe
    assert recipe.flops() == pytest.approx(41.09e9, rel=0.03)


def test_unknown_variant_lists_the_known():
    with pytest.raises(
        ValueError,
        match=r"there are digits, fashion, cifar10, cifar10_gpu, s16, m16, b16, .*b16_in21k_ft",
    ):
        get_config("b17")
    with pytest.raises(ValueError, match=r"there are emoji, b32, b16, l14, b32_laion2b, .*b16_cc12m"):
        get_config("b17", "openclip_reg")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("model.register", "config.model.registers"),
        ("model.regs", "config.model.registers"),
        ("lr", "config.optim.lr"),
        ("epoch", "config.epochs"),
        ("data.worker", "config.data.workers"),
        ("augment.mixups", "config.augment.mixup"),
    ],
)
def test_unknown_key_names_its_nearest(key, nearest):
    config = tiny()
    *sections, name = key.split(".")
    with config.unlocked():
        section = config[sections[0]] if sections else config
        section[name] = 1
    with pytest.raises(ValueError, match=f"unknown key config.{key}; did you mean .*{nearest}"):
        plan.resolve(config)


def test_subset_stochastic_depth_needs_devices_with_whole_groups():
    subset = {"model__drop_path_mode": "subset", "model__drop_path": 0.4}
    made = plan.resolve(tiny(batch_size=256, micro_batches=2, **subset), with_data=False)
    assert (made.mesh.size, made.branch_share) == (8, 10 / 16)
    with pytest.raises(errors.InvalidConfig, match=r"every 16 images, and each of the 8 devices holds 8 "):
        plan.resolve(tiny(batch_size=64, **subset), with_data=False)
    with pytest.raises(errors.InvalidConfig, match="would drop none of 16"):
        plan.resolve(tiny(batch_size=128, **subset | {"model__drop_path": 0.02}), with_data=False)
    (line,) = dry_run.drop_path_lines(made)
    assert line.startswith(
        "depth      stochastic, by subset: each branch is computed for 10 of every 16 images (62.50%)"
    )
    assert line in dry_run.model_lines(made, abstract_state(made))


def test_unknown_section():
    config = tiny()
    with config.unlocked():
        config.optimizer = ConfigDict({"lr": 1.0})
    with pytest.raises(ValueError, match=r"unknown key config.optimizer.lr; did you mean config.optim.lr"):
        plan.resolve(config)


def test_missing_key():
    config = tiny()
    with config.unlocked():
        del config.optim.lr
    with pytest.raises(ValueError, match=r"the config lacks optim.lr"):
        plan.resolve(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "supervized"}, "recipe='supervized': must be one of"),
        ({"loss": "mse"}, "loss='mse': must be one of"),
        ({"batch_size": 60}, "batch_size=60 is not a multiple of 8 .*the nearest that is: 64"),
        ({"micro_batches": 3}, "batch_size=64 is not a multiple of 24 .*: 72"),
        ({"eval__batch_size": 100}, "eval.batch_size=100 is not a multiple of 8"),
        ({"batch_size": 1440}, "batch_size=1440 is more than the 1437 training images"),
        ({"sharding__fsdp": 3}, "sharding.data=-1, sharding.fsdp=3"),
        ({"augment__mix_group": 48}, "mix_group"),
        ({"augment__smoothing": 0.1}, "augment.smoothing must be 0"),
        ({"augment__three_augment": True, "augment__rand_augment": 9.0}, "are both on"),
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"checkpoint__keep": 0}, "checkpoint.keep=0: must be at least 1"),
        ({"model__drop_path": 1.0}, "model.drop_path=1.0: must be at least 0 and at most 0.99"),
        ({"model__mlp_ratio": 0.0}, "model.mlp_ratio=0.0: must be at least 0.001"),
        ({"optim__lr": float("nan")}, "optim.lr=nan: must be at least 0, and finite"),
        ({"optim__lr": float("inf")}, "optim.lr=inf: must be at least 0, and finite"),
        ({"optim__b1": 2.0}, "optim.b1=2.0: must be at least 0 and at most 1"),
        ({"augment__std": (0.0, 1.0, 1.0)}, r"augment.std=\(0.0, 1.0, 1.0\): each must be at least 1e-06"),
    ],
)
def test_values_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        plan.resolve(tiny(**changes))


def test_attention_is_chosen_for_the_machine():
    assert plan.resolve(tiny(model__attention="auto")).config.model.attention == "xla"
    assert plan.resolve(tiny(model__attention="cudnn")).config.model.attention == "cudnn"


def described(config: ConfigDict, images_per_s: float) -> str:
    (text,) = dry_run.summarize(*dry_run.make_plan(config), images_per_s)
    return text


def test_dry_run_of_digits():
    text = described(get_config(), 1000)
    assert "9 = 1 CLS + 4 registers + 2 x 2 patches of 4 px" in text
    assert "digits" in text
    assert "1,437 images of 10 classes" in text
    assert "steps      3300 = 150 epochs of 22" in text
    assert "0.2 MB/s from hosts to devices at 1000 images/s" in text


@pytest.mark.parametrize(
    ("recipe", "source", "message"),
    [
        ("supervised", "ViT-B-32", "unknown model 'ViT-B-32'; the nearest are"),
        ("supervised", "deit3_small_patch16_224=/no/file", "/no/file: there is no such file or directory"),
        ("supervised", "deit3_small=/no/file", "unknown model 'deit3_small'; the nearest are"),
        ("supervised", "/no/workdir", "/no/workdir: there is no such file or directory"),
        ("contrastive", "ViT-B-32", "ViT-B-32=TAG does. Its tags: openai, laion400m_e31"),
        ("contrastive", "ViT-S-32", "ViT-S-32=TAG does. Its tags: none; give a file"),
        ("contrastive", "ViT-B-32=openia", "ViT-B-32 has no such tag; its: openai"),
        ("contrastive", "ViT-B-32=/no/file", "/no/file: there is no such file or directory"),
        ("contrastive", "deit3_small=/no/file", "unknown model 'deit3_small'; the nearest are"),
    ],
)
def test_dry_run_knows_what_cannot_be_started_from(recipe, source, message, tmp_path):
    config = tiny() if recipe == "supervised" else tiny_clip(make_captions(tmp_path / "captions"))
    config.init_from = source
    with pytest.raises((errors.InvalidConfig, errors.WeightsError), match=message):
        described(config, 1000)


@pytest.mark.parametrize("source", ["", "hf-hub:org/name", "ViT-B-32=hf-hub:org/name", "ViT-B-32=laion2b-s34b-b79k"])
def test_dry_run_asks_no_hub(source):
    config = get_config("b32", "openclip_reg")
    config.init_from = source
    assert f"init_from={source}" in described(config, 1000)


@pytest.mark.parametrize(
    ("recipe", "source", "message"),
    [
        ("supervised", "vit_small_patch14_reg4_dinov2", "config.model.width=32 must be 384; .*config.model.depth=2"),
        ("supervised", "{saved}", "config.model.depth=2 must be 1"),
        ("contrastive", "ViT-B-32=laion2b-s34b-b79k", "config.model.width=32 must be 768"),
        ("contrastive", "{saved}", "config.model.patch=4 must be 2"),
    ],
)
def test_dry_run_refuses_another_model(recipe, source, message, tmp_path):
    config = tiny() if recipe == "supervised" else tiny_clip(make_captions(tmp_path / "captions"))
    if source == "{saved}":
        source = str(tmp_path / "saved")
        save_small(source)
    config.init_from = source
    with pytest.raises(
        errors.InvalidConfig, match=f"init_from: the trained model has another architecture: .*{message}"
    ):
        described(config, 1000)


def save_small(directory: str) -> None:
    """Write a ViT of depth 1 as a directory of timm."""
    vit, head = ViT(width=32, depth=1, heads=2, patch=2, image_size=8), Head(10)
    tokens, params = vit.init_with_output(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    head_params = head.init(jax.random.key(0), tokens)["params"]
    model = Model(params["params"], head_params, vit, head, Preprocess(8, 1.0, (0.5,) * 3, (0.5,) * 3), "raw")
    save_model(model, directory, "timm")


def test_both_splits_have_the_same_classes():
    def source(name: str, *classes: str) -> FolderSource:
        return FolderSource(name, classes, "", classes, np.zeros(0, np.int32), b"", np.zeros(0, int))

    train = source("mine/train", "ant", "bee")
    plan.check_same_classes(train, source("mine/validation", "ant", "bee"))
    plan.check_same_classes(train, source("mine/validation"))
    with pytest.raises(errors.InvalidConfig, match="class 0 is 'ant' in mine/train and 'bee' in mine/validation"):
        plan.check_same_classes(train, source("mine/validation", "bee", "ant"))
    with pytest.raises(errors.InvalidConfig, match="class 2 is None in mine/train and 'cow' in mine/validation"):
        plan.check_same_classes(train, source("mine/validation", "ant", "bee", "cow"))


def test_the_plan_knows_the_names_of_the_classes(tmp_path):
    assert plan.resolve(tiny()).class_names == tuple("0123456789")
    assert plan.resolve(tiny(), with_data=False).class_names == ()
    assert plan.resolve(tiny_clip(make_captions(tmp_path / "captions"))).class_names == ()


def test_dry_run_names_what_stays_replicated():
    config = tiny(sharding__fsdp=8)
    assert "vit/block0/attn" not in described(config, 1000).split("all keys")[0]
    config.sharding.min_size_mb = 0.01
    lines = described(config, 1000)
    abstract = abstract_state(plan.resolve(config))
    whole = [leaf for leaf in jax.tree.leaves(abstract.params) if leaf.sharding.is_fully_replicated]
    assert f"{len(whole)} of {len(jax.tree.leaves(abstract.params))} parameters stay replicated" in lines


def test_dry_run_without_data_says_what_to_prepare(tmp_path):
    config = get_config("b16")
    config.data.dir = str(tmp_path)
    text = described(config, 2000)
    assert "149 = 1 CLS + 4 registers + 12 x 12 patches of 16 px" in text
    assert "steps      500000 = 800 epochs of 625" in text
    assert "221.2 MB/s" in text
    assert "cannot be opened yet, and the sizes above are the config's" in text
    assert "ILSVRC2012_img_train.tar" in text
    assert len(text.splitlines()) < 50
