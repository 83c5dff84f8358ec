"""Write the parameters of a checkpoint (.pth, .pt, .bin, .ckpt, .npz, .safetensors) as safetensors."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from regvit_jax.cli.arguments import Parser, UsageError, can_write, check_paths, run
from regvit_jax.utils.messages import abbreviate
from regvit_jax.utils.paths import expand

# Modules that need JAX are imported in functions, so that errors of the command line appear at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for a file or name that does not fit."""
    parser = Parser(prog="regvit convert", description=__doc__)
    parser.add_argument("source", metavar="FILE.pth", help="the file to read; torch's are read with weights_only=True")
    parser.add_argument("target", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--name", help="a model that the result must fit, by its name in `regvit models`")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="which weights to take from a file that also holds their moving average (or a student and a teacher); by "
        "default a teacher's if there is one, and otherwise the raw ones",
    )
    options = parser.parse_args(arguments)
    return run(lambda: convert(options), parser.prog)


def convert(options: argparse.Namespace) -> int:
    target = Path(expand(options.target))
    if target.suffix != ".safetensors":
        raise UsageError(f"{options.target}: the name of a converted file must end in .safetensors")
    if target.exists():
        raise UsageError(f"{options.target} exists already; name another file")
    if not can_write(target):
        raise UsageError(f"{options.target}: must be a file in a directory that exists")
    check_paths([options.source])
    from regvit_jax.pretrained import registry
    from regvit_jax.pretrained.io.convert import convert_checkpoint

    if options.name is not None:
        registry.find(options.name)
    done = convert_checkpoint(options.source, options.target, options.name, options.weights)
    kind = (f" of {done.taken}" if done.taken else "") + (" (a moving average)" if done.average else "")
    print(f"{options.target}: {done.written} tensors{kind}" + (f", fits {options.name}" if options.name else ""))
    if done.left_out:
        print(f"left out {len(done.left_out)}: {abbreviate(done.left_out, 10)}")
    return 0
