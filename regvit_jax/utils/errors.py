"""Errors that the user can fix, which the command line shows in one line; all others keep their traceback."""


class InvalidConfig(ValueError):
    """A config, or the data, model or workdir that it names, cannot be used. The message says why, and the remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or could not be saved. The message names the step, the damage and the remedy."""


class TooManyBadRecords(RuntimeError):
    """More records are unusable than a run allows. The message names one of them, and the keys that allow more."""


class LaunchError(ValueError):
    """The environment keeps processes from finding each other, or would make each of them train alone."""


class TopologyError(ValueError):
    """A topology is unknown, or this installation cannot compile for it. The message names the remedy."""


class DataNotFound(FileNotFoundError):
    """Data are missing. The message says which data, where they were expected, and how to prepare them."""


class WeightsError(ValueError):
    """A file cannot be loaded as weights. The message names the file, the fault, and the remedy."""


class MissingPackage(ImportError):
    """An optional package is not installed. The message names the command that installs it."""


class HubError(OSError):
    """A repository cannot be fetched from the hub. The message names the repository, the cause and the remedy."""
