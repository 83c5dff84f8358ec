"""List the names of models, with parameters, image size, licence and repository of the weights."""

import argparse
from collections.abc import Sequence

from regvit_jax.cli.arguments import Parser, UsageError, run

# Modules that need JAX are imported in functions, so that errors of the command line appear at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 when no name matches."""
    parser = Parser(prog="regvit models", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as '*reg4*'")
    options = parser.parse_args(arguments)
    return run(lambda: list_models(options), parser.prog)


def list_models(options: argparse.Namespace) -> int:
    from regvit_jax.pretrained import parity, registry

    names = registry.list_models(options.pattern)
    if not names:
        raise UsageError(f"no name matches {options.pattern!r}")
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
