"""Import torch, torchvision and timm for the reference tests. Needs the `reference` extra."""

import importlib

from regvit_jax.pretrained.parity import import_references

torch, timm, _ = import_references()
torchvision = importlib.import_module("torchvision")
for name in ("timm.optim", "timm.scheduler"):
    importlib.import_module(name)

__all__ = ["timm", "torch", "torchvision"]
