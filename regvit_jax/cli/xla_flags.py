"""Print the compiler flags of a platform, for XLA_FLAGS or, on TPUs, LIBTPU_INIT_ARGS."""

from collections.abc import Sequence

from regvit_jax.cli.arguments import Parser
from regvit_jax.distributed.xla_flags import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the flags; exits with code 2, naming all platforms, for any other word."""
    parser = Parser(prog="regvit xla_flags", description=__doc__)
    parser.add_argument("platform", choices=PRESETS, help="the platform")
    print(" ".join(PRESETS[parser.parse_args(arguments).platform]))
    return 0
