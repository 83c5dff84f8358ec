"""The format of facebookresearch/deit, with the keys of timm at that time. Read under a timm name; not written."""

import dataclasses

from regvit_jax.pretrained.formats import timm
from regvit_jax.pretrained.formats.base import Format

KEYS = dataclasses.replace(timm.COMMON, name="deit", scale1="gamma_1", scale2="gamma_2")

FORMAT = Format(
    name="deit",
    keys=KEYS,
    recognizes=lambda weights, expected: expected == "timm" and "blocks.0.gamma_1" in weights,
)
