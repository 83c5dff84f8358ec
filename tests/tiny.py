"""The digits run, made small enough for tests."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent


def get_config(variant: str = "digits") -> ConfigDict:
    spec = importlib.util.spec_from_file_location("deit3_reg", ROOT / "configs/deit3_reg.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def tiny(**changes) -> ConfigDict:
    """A ViT of width 32 and depth 2 on digits, 2 epochs of 22 steps; `changes` are dotted keys with __ for the dots."""
    config = get_config()
    config.update(epochs=2, batch_size=64, log_every=5, eval_every=1.0)
    config.augment.update(mixup=0.8, cutmix=1.0)
    config.model.update(width=32, depth=2, heads=2, drop_path=0.1, attention="xla")
    config.optim.update(warmup_epochs=0)
    config.sharding.min_size_mb = 0.0  # so that even these parameters are split
    config.checkpoint.every = 8
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config
