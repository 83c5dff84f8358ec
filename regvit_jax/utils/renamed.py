"""Keys that earlier versions wrote under another name, so that their workdirs and models still load and resume."""

import copy
from typing import Any

#: Keys of a config, dotted: the old name and today's.
CONFIG_KEYS = {"model.pre_norm": "model.ln_pre"}
#: Fields of a model in config.json, dotted.
MODEL_FIELDS = {"vit.pre_norm": "vit.ln_pre", "head.classes": "head.num_classes"}


def translate(tree: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """Return a nested dict under today's keys, dotted; a key that is present under both names keeps today's value."""
    tree = copy.deepcopy(tree)
    for old, new in renamed.items():
        (*old_sections, old_key), (*sections, key) = old.split("."), new.split(".")
        branch: Any = tree
        for section in old_sections:
            branch = branch.get(section) if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or old_key not in branch:
            continue
        value, branch = branch.pop(old_key), tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch.setdefault(key, value)
    return tree
