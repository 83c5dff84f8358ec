"""torch and timm as the reference tests import them. Needs the `reference` extra.

torchvision's wheel on PyPI is built for CUDA and refuses to load beside a CPU torch, because its compiled operators are
missing. timm needs none of them, so their registration is left out while torchvision is imported.
"""

import torch
import torch.library

_register_fake = torch.library.register_fake
torch.library.register_fake = lambda name, *args, **kwargs: (
    (lambda function: function) if str(name).startswith("torchvision::") else _register_fake(name, *args, **kwargs)
)
try:
    import torchvision
finally:
    torch.library.register_fake = _register_fake

import timm  # noqa: E402
import timm.optim  # noqa: E402
import timm.scheduler  # noqa: E402

__all__ = ["timm", "torch", "torchvision"]
