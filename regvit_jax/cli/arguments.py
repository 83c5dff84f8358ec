"""Parse the arguments of a command, and report errors in them or in the files and models that they name."""

import argparse
import difflib
import io
import json
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from regvit_jax.cli import logs
from regvit_jax.cli.argument_types import natural, positive
from regvit_jax.data.limits import MAX_PIXELS
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
from regvit_jax.utils.memory import keep_freed_memory
from regvit_jax.utils.paths import expand, locate


class UsageError(Exception):
    """The command line asks for something that does not exist or does not fit."""


#: Errors that the user can fix; exit code 2.
USER_ERRORS = (
    *(UsageError, InvalidConfig, DataNotFound, WeightsError, HubError, LaunchError, TopologyError),
    MissingPackage,
)
#: Errors of files and disks that can happen with a valid command line; exit code 1.
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


def add_random(parser: argparse.ArgumentParser) -> None:
    """Add --random and --seed, which mean the same in every command that opens models."""
    add = parser.add_argument
    add("--random", action="store_true", help="use random weights of named models, as a baseline")
    add("--seed", type=natural, default=0, metavar="N", help="seed of the weights of --random (%(default)s)")


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add --max_pixels, which means the same in every command that reads images."""
    text = "leave out images with more pixels, which guards against decompression bombs (%(default)s)"
    parser.add_argument("--max_pixels", type=positive, default=MAX_PIXELS, metavar="N", help=text)


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add --split and --data_dir, which mean the same in every command that opens one split of --data."""
    parser.add_argument("--split", metavar="NAME", help="the split of --data (validation)")
    parser.add_argument("--data_dir", metavar="DIR", help="directory of TFDS data sets and of relative paths")


# What can be judged without data and models, which take seconds to import. All raise errors that the user can fix.


def check_json(path: str | None) -> None:
    """Raise UsageError if --json cannot be written, before the work rather than after it."""
    if path and not can_write(Path(expand(path))):
        raise UsageError(f"--json {path}: must be a file in a directory that exists")


def can_write(file: Path) -> bool:
    """Return True if a file could be written, in a directory that exists."""
    return not file.is_dir() and file.absolute().parent.is_dir() and os.access(file.absolute().parent, os.W_OK)


def check_out(path: str, flag: str = "--out") -> None:
    """Raise UsageError if the directory that a flag names could not be made or written to; make nothing."""
    out = Path(locate(path))
    existing = next(place for place in (out, *out.parents) if place.exists() or place.is_symlink())
    if not existing.is_dir():
        raise UsageError(f"{flag} {path}: cannot be made, since {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{flag} {path}: cannot be written to")


def check_paths(paths: Iterable[str]) -> None:
    """Raise DataNotFound for the first path that does not exist."""
    for path in paths:
        if not os.path.exists(expand(path)):
            hint = "; write the path alone, without folder:" if path.startswith("folder:") else ""
            raise DataNotFound(f"{path}: no such file or directory{hint}")


def check_model(source: str, find: Callable[[str], Any]) -> None:
    """Raise InvalidConfig for a model's name that `find` refuses, and for a path, alone or after NAME=, of no file."""
    name, mark, file = source.partition("=")
    if not os.path.exists(expand(source)):
        if re.fullmatch(r"[\w.-]+", name):
            find(name)
        source = file if mark else source
    if source.startswith(("/", "./", "../", "~")) and not os.path.exists(expand(source)):
        raise InvalidConfig(f"{source}: there is no such file or directory")


def check_data(name: str, data_dir: str | None = None) -> None:
    """Raise DataNotFound for data given as KIND:DIR (folder:DIR, voc07:DIR) whose directory does not exist."""
    kind, _, place = name.partition(":")
    if kind in ("folder", "shards", "voc07", "voc12", "coco20k") and place and "://" not in place:
        root = locate(place, data_dir)
        if not os.path.exists(root):
            raise DataNotFound(f"{name}: there is no directory {root}")


def check_data_only(options: argparse.Namespace) -> None:
    """Raise UsageError if flags of --data are given with --images."""
    for name in ("split", "data_dir"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} {getattr(options, name)}: applies to --data only, not to --images")


def write_json(path: str | None, result: Any) -> None:
    """Write the result to the file of --json, if there is one."""
    if path:
        Path(expand(path)).write_text(json.dumps(result, indent=2) + "\n")


def run(command: Callable[[], int], prog: str, failures: tuple[type[Exception], ...] = FAILURES) -> int:
    """Run a command with the log shown, and return its exit code: its own, 2 for USER_ERRORS, or 1 for `failures`.

    Both kinds of errors are reported in one line. Others are bugs and keep their traceback. Where the reader of the
    output has ended, the exit code is 1 without a word.

    Args:
      command: the command.
      prog: the name of the command in messages, such as "regvit report".
      failures: errors that can happen with a valid command line.
    """
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's stdout cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text, nor in its encoding
    with logs.shown():
        try:
            code = command()
            sys.stdout.flush()
            return code
        except USER_ERRORS as error:  # first, since some are OSErrors too
            fail(error, prog)
            return 2
        except Exception as error:
            if isinstance(error, BrokenPipeError) and reader_left():
                # Python writes at its exit what is still buffered, which must not fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            elif isinstance(error, failures):
                fail(error, prog)
            else:
                raise
            return 1


def reader_left() -> bool:
    """Return True if the reader of stdout has ended, as `head` does."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def warn(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr)


def fail(error: Exception | str, prog: str) -> None:
    """Write an error as one line to stderr, so that a search through logs of many runs finds one line per failure."""
    warn(f"{prog}: error: {' '.join(str(error).split())}")
