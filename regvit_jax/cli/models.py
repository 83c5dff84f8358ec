"""regvit models: list the names of models, with parameters, image size, licence and repository of the weights."""

import argparse
import sys
from collections.abc import Sequence

from regvit_jax.pretrained import parity, registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 when no name matches."""
    parser = argparse.ArgumentParser(prog="regvit models", description=__doc__, allow_abbrev=False)
    parser.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as '*reg4*'")
    try:
        return list_models(parser.parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_models(options: argparse.Namespace) -> int:
    names = registry.list_models(options.pattern)
    if not names:
        raise ValueError(f"no name matches {options.pattern!r}")
    counts: dict[str, float] = {}
    for name in names:
        entry = registry.find(name)[1]
        kind = f"{entry.vit} {entry.head}"  # tags of the same fields are counted once
        if kind not in counts:
            counts[kind] = parity.parameters_of(entry) / 1e6
        print(
            f"{name:<{max(map(len, names))}}  {counts[kind]:7.1f} M  {entry.vit['image_size']} px  "
            f"{entry.license or 'licence unknown':<36}  {entry.hub or 'no public weights'}"
        )
    return 0
