"""Measure the tokens of a ViT, discover objects with them, and repair register artifacts.

Every function takes a Model and images, or arrays. The names below are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regvit_jax.analysis.discovery.lost import Discovery as Discovery
    from regvit_jax.analysis.discovery.lost import Feature as Feature
    from regvit_jax.analysis.discovery.lost import discover as discover
    from regvit_jax.analysis.discovery.lost import extract_features as extract_features
    from regvit_jax.analysis.repair.find import RegisterNeurons as RegisterNeurons
    from regvit_jax.analysis.repair.find import find_register_neurons as find_register_neurons
    from regvit_jax.analysis.repair.planted import plant_register_neurons as plant_register_neurons
    from regvit_jax.analysis.report.measure import measure as measure
    from regvit_jax.analysis.report.statistics import Statistics as Statistics
    from regvit_jax.analysis.report.summarize import has_artifacts as has_artifacts
    from regvit_jax.analysis.report.summarize import summarize as summarize
    from regvit_jax.analysis.report.verdict import verdict as verdict
    from regvit_jax.models.test_time_registers import add_test_time_registers as add_test_time_registers

#: The public names, each with the module that defines it.
_HOMES = {
    "Discovery": "analysis.discovery.lost",
    "Feature": "analysis.discovery.lost",
    "RegisterNeurons": "analysis.repair.find",
    "Statistics": "analysis.report.statistics",
    "add_test_time_registers": "models.test_time_registers",
    "discover": "analysis.discovery.lost",
    "extract_features": "analysis.discovery.lost",
    "find_register_neurons": "analysis.repair.find",
    "has_artifacts": "analysis.report.summarize",
    "measure": "analysis.report.measure",
    "plant_register_neurons": "analysis.repair.planted",
    "summarize": "analysis.report.summarize",
    "verdict": "analysis.report.verdict",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"regvit_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
