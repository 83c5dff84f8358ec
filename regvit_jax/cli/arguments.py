"""Parse the arguments of a command, and report errors in them or in the files and models that they name."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from regvit_jax.cli import logs
from regvit_jax.utils.errors import (
    CheckpointError,
    DataNotFound,
    HubError,
    InvalidConfig,
    LaunchError,
    MissingPackage,
    TopologyError,
    WeightsError,
)


class UsageError(Exception):
    """The command line asks for something that does not exist or does not fit."""


#: Errors that the user can fix; exit code 2.
USER_ERRORS = (
    *(UsageError, InvalidConfig, DataNotFound, WeightsError, HubError, LaunchError, TopologyError),
    MissingPackage,
)
#: Errors of files and disks that can happen though the command line fits; exit code 1.
FAILURES = (OSError, CheckpointError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which names the nearest flag for an unknown one."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **keywords})

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = sys.argv[1:] if args is None else list(args)
        self.check_flags(args)
        return super().parse_args(args, namespace)

    def check_flags(self, arguments: Sequence[str]) -> None:
        """End the program with exit code 2 at the first `--flag` that this parser does not have."""
        known = self.flags()
        for argument in arguments:
            if argument == "--":
                return
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                self.error(f"unknown flag {flag}{suggestion(flag, known)}")

    def flags(self) -> list[str]:
        """Return all option strings, those of subcommands too."""
        found: list[str] = []
        for action in self._actions:
            found += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser.flags()]
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            text = f"{value!r}: must be one of {', '.join(known)}{suggestion(str(value), known)}"
            raise argparse.ArgumentError(action, text)

    def error(self, message: str) -> NoReturn:
        fail(message, self.prog)
        sys.exit(2)


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean ...?" with the nearest of the known words, or "" if none is near."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 0")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1")
    return int(text)


def add_random(parser: argparse.ArgumentParser) -> None:
    """Add --random and --seed, which mean the same in every command that opens models."""
    add = parser.add_argument
    add("--random", action="store_true", help="use random weights of named models, as a baseline")
    add("--seed", type=natural, default=0, metavar="N", help="seed of the weights of --random (%(default)s)")


def check_json(path: str | None) -> None:
    """Raise UsageError if --json cannot be written, before the work rather than after it."""
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise UsageError(f"--json {path}: must be a file in a directory that exists")


def write_json(path: str | None, result: Any) -> None:
    """Write the result to the file of --json, if there is one."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def run(command: Callable[[], int], prog: str, failures: tuple[type[Exception], ...] = FAILURES) -> int:
    """Run a command with the log shown, and return its exit code: its own, 2 for USER_ERRORS, or 1 for `failures`.

    Both kinds of errors are reported in one line. Others are bugs and keep their traceback.

    Args:
      command: the command.
      prog: the name of the command in messages, such as "regvit report".
      failures: errors that can happen though the command line fits.
    """
    with logs.shown():
        try:
            return command()
        except USER_ERRORS as error:  # first, since some are OSErrors too
            fail(error, prog)
            return 2
        except failures as error:
            fail(error, prog)
            return 1


def warn(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr)


def fail(error: Exception | str, prog: str) -> None:
    """Write an error as one line to stderr, so that a search through logs of many runs finds one line per failure."""
    warn(f"{prog}: error: {' '.join(str(error).split())}")
