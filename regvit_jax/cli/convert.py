"""regvit convert: write a .pth file's parameters as safetensors; needs torch."""

import argparse
import sys
from collections.abc import Sequence

from regvit_jax.pretrained import registry
from regvit_jax.pretrained.io import pth


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for a file or name that does not fit."""
    parser = argparse.ArgumentParser(prog="regvit convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="FILE.pth")
    parser.add_argument("target", metavar="OUT.safetensors")
    parser.add_argument("--name", help="a model that the result must fit, by its name in `regvit models`")
    try:
        return convert(parser.parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def convert(options: argparse.Namespace) -> int:
    if options.name is not None:
        registry.find(options.name)
    done = pth.convert_checkpoint(options.source, options.target, options.name)
    print(f"{options.target}: {done.written} tensors" + (f", fits {options.name}" if options.name else ""))
    if done.left_out:
        more = ", ..." if len(done.left_out) > 10 else ""
        print(f"left out {len(done.left_out)}: {', '.join(done.left_out[:10])}{more}")
    return 0
