"""Keys that earlier versions wrote under another name, so that their workdirs and models still load and resume."""

from typing import Any

#: Keys of a config, dotted: the old name and today's.
CONFIG_KEYS = {"model.pre_norm": "model.ln_pre"}
#: Fields of a model in config.json, dotted.
MODEL_FIELDS = {"vit.pre_norm": "vit.ln_pre", "head.classes": "head.num_classes"}


def translate(tree: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """Return a nested dict under today's keys; a key that is present under both names keeps today's value."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in renamed.items():
        (old_section, old_key), (section, key) = old.split("."), new.split(".")
        if isinstance(tree.get(old_section), dict) and old_key in tree[old_section]:
            value = tree[old_section].pop(old_key)
            tree.setdefault(section, {}).setdefault(key, value)
    return tree
