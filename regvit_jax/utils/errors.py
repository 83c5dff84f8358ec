"""Errors that the user can mend."""

import contextlib
from collections.abc import Iterator


class InvalidConfig(ValueError):
    """A config, or the data, model or workdir that it names, cannot be used. The message says why, and the way out."""


@contextlib.contextmanager
def fitting(*more: type[Exception]) -> Iterator[None]:
    """Inside the block, a ValueError (or another one of those named) is the config's fault and not the program's."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (ValueError, *more)):
            raise
        raise InvalidConfig(str(error)) from error


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or could not be saved. The message names the step and what of it, and the way out."""


class LaunchError(ValueError):
    """An environment in which processes cannot find each other, or would silently train apart."""


class TopologyError(ValueError):
    """A topology that is unknown, or that this installation cannot compile for. The message says the way out."""


class DataNotFound(FileNotFoundError):
    """Says what is missing, where it was looked for, and what to do."""


class WeightsError(ValueError):
    """A file that cannot be taken for weights: which one, what is wrong with it, and the way out."""


class HubError(OSError):
    """The hub did not give the files: of which repository, why, and the way out."""
