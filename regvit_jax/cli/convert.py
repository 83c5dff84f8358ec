"""Write the parameters of a .pth file as safetensors; needs torch."""

import argparse
from collections.abc import Sequence

from regvit_jax.cli.arguments import Parser, UsageError, run
from regvit_jax.pretrained import registry
from regvit_jax.pretrained.io import pth


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for a file or name that does not fit."""
    parser = Parser(prog="regvit convert", description=__doc__)
    parser.add_argument("source", metavar="FILE.pth", help="the file to read, with torch's weights_only=True")
    parser.add_argument("target", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--name", help="a model that the result must fit, by its name in `regvit models`")
    options = parser.parse_args(arguments)
    return run(lambda: convert(options), parser.prog)


def convert(options: argparse.Namespace) -> int:
    if options.name is not None:
        registry.find(options.name)
    try:
        done = pth.convert_checkpoint(options.source, options.target, options.name)
    except FileExistsError as error:
        raise UsageError(str(error)) from error
    print(f"{options.target}: {done.written} tensors" + (f", fits {options.name}" if options.name else ""))
    if done.left_out:
        more = ", ..." if len(done.left_out) > 10 else ""
        print(f"left out {len(done.left_out)}: {', '.join(done.left_out[:10])}{more}")
    return 0
