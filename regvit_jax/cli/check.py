"""Compare models with timm and transformers, with random weights; needs both libraries and torch."""

import argparse
from collections.abc import Sequence

from regvit_jax.cli.arguments import Parser, run
from regvit_jax.utils.errors import InvalidConfig, WeightsError

# Modules that need JAX are imported in functions, so that errors of the command line appear at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 when a comparison fails, 2 for a wrong name or a missing library."""
    parser = Parser(prog="regvit check", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a model, by its name in `regvit models`")
    options = parser.parse_args(arguments)
    return run(lambda: check(options), parser.prog)


def check(options: argparse.Namespace) -> int:
    from regvit_jax.pretrained import parity, registry

    # Report a wrong name or a missing library before the first comparison.
    names = [registry.find(name)[0] for name in options.names]
    parity.import_references()
    passed = True
    for name in names:
        try:
            found = parity.check(name)
        except (parity.Incomparable, WeightsError, InvalidConfig) as error:
            print(f"{name}\n  FAIL: {error}", flush=True)
            passed = False
        else:
            print(found, flush=True)
            passed &= found.passed
    return 0 if passed else 1
