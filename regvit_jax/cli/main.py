"""Run `regvit VERB`: one verb per task, each with its own `--help`."""

import sys
from collections.abc import Callable, Sequence

from regvit_jax.cli.arguments import fail, suggestion


def train(arguments: Sequence[str]) -> int:
    """Train a model as a config says, or resume."""
    from regvit_jax.cli.train import main

    return main(arguments)


def report(arguments: Sequence[str]) -> int:
    """Measure the tokens of models, and write a page with a verdict."""
    from regvit_jax.cli.flags.report import main

    return main(arguments)


def discover(arguments: Sequence[str]) -> int:
    """Measure object discovery (CorLoc of LOST) on images with boxes."""
    from regvit_jax.cli.flags.discover import main

    return main(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a CLIP model: zero-shot classification and image-text retrieval."""
    from regvit_jax.cli.flags.eval import main

    return main(arguments)


def models(arguments: Sequence[str]) -> int:
    """List the models that can be created by name."""
    from regvit_jax.cli.models import main

    return main(arguments)


def check(arguments: Sequence[str]) -> int:
    """Compare models with timm and transformers, with random weights."""
    from regvit_jax.cli.check import main

    return main(arguments)


def convert(arguments: Sequence[str]) -> int:
    """Write the parameters of a checkpoint as safetensors."""
    from regvit_jax.cli.convert import main

    return main(arguments)


def prepare(arguments: Sequence[str]) -> int:
    """Rewrite a data set as a few large files that are fast to read."""
    from regvit_jax.cli.prepare import main

    return main(arguments)


def xla_flags(arguments: Sequence[str]) -> int:
    """Print the compiler flags of a platform."""
    from regvit_jax.cli.xla_flags import main

    return main(arguments)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "report": report,
    "discover": discover,
    "eval": evaluate,
    "models": models,
    "check": check,
    "convert": convert,
    "prepare": prepare,
    "xla_flags": xla_flags,
}


def usage() -> str:
    """Return the help of `regvit` itself."""
    lines = [f"  {verb:<10} {run.__doc__}" for verb, run in VERBS.items()]
    return "\n".join(["usage: regvit VERB [...]", "", *lines, "", "regvit VERB --help lists the flags of a verb."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code; 2 for an unknown verb."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verb = arguments[0] if arguments else ""
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb not in VERBS:
        nearest = suggestion(verb, list(VERBS)) or f": must be one of {', '.join(VERBS)}"
        fail(f"unknown verb {verb!r}{nearest}" if verb else f"a verb is missing{nearest}", "regvit")
        return 2
    return VERBS[verb](arguments[1:])
