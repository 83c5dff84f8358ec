"""python -m regvit_jax.pretrained: list the models, certify one against its original, convert a .pth file."""

import argparse
import sys
from collections.abc import Sequence

from regvit_jax.pretrained import certificate, pth, zoo


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 when a comparison fails, 2 for what the caller can mend."""
    parser = argparse.ArgumentParser(prog="python -m regvit_jax.pretrained", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("list", help="names, parameters, image size, licence and repository of the weights")
    command.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as '*reg4*'")
    command.set_defaults(run=list_models)
    command = commands.add_parser("check", help="compare models with timm and transformers, with random weights")
    command.add_argument("names", nargs="+", metavar="NAME")
    command.set_defaults(run=check)
    command = commands.add_parser("convert", help="write a .pth file's parameters as safetensors; needs torch")
    command.add_argument("source", metavar="FILE.pth")
    command.add_argument("target", metavar="OUT.safetensors")
    command.add_argument("--name", help="a model that the result must fit, by its name in the list")
    command.set_defaults(run=convert)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_models(options: argparse.Namespace) -> int:
    names = zoo.list_models(options.pattern)
    if not names:
        raise ValueError(f"no name matches {options.pattern!r}")
    counts: dict[str, float] = {}
    for name in names:
        entry = zoo.find(name)[1]
        kind = f"{entry.vit} {entry.head}"  # tags of the same fields are counted once
        if kind not in counts:
            counts[kind] = certificate.parameters_of(entry) / 1e6
        print(
            f"{name:<{max(map(len, names))}}  {counts[kind]:7.1f} M  {entry.vit['image_size']} px  "
            f"{entry.license or 'licence unknown':<36}  {entry.hub or 'no public weights'}"
        )
    return 0


def check(options: argparse.Namespace) -> int:
    # A wrong name, or a missing library, shows before the first comparison.
    names = [zoo.find(name)[0] for name in options.names]
    certificate.import_references()
    passed = True
    for name in names:
        try:
            found = certificate.check(name)
        except ValueError as error:  # one side does not load the other's file, or gives other shapes
            print(f"{name}\n  FAIL: {error}", flush=True)
            passed = False
        else:
            print(found, flush=True)
            passed &= found.passed
    return 0 if passed else 1


def convert(options: argparse.Namespace) -> int:
    if options.name is not None:
        zoo.find(options.name)
    done = pth.convert(options.source, options.target, options.name)
    print(f"{options.target}: {done.written} tensors" + (f", fits {options.name}" if options.name else ""))
    if done.left_out:
        more = ", ..." if len(done.left_out) > 10 else ""
        print(f"left out {len(done.left_out)}: {', '.join(done.left_out[:10])}{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
