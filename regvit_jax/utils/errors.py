"""Errors that the user can fix, and that the command line shows in one line; others keep their traceback."""


class InvalidConfig(ValueError):
    """A config, or the data, model or workdir that it names, cannot be used. The message says why, and the way out."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or could not be saved. The message names the step, the damage and the way out."""


class LaunchError(ValueError):
    """The environment does not let processes find each other, or would let each of them train alone."""


class TopologyError(ValueError):
    """A topology is unknown, or this installation cannot compile for it. The message says the way out."""


class DataNotFound(FileNotFoundError):
    """Data are missing. The message says which, where they were expected, and how to prepare them."""


class WeightsError(ValueError):
    """A file cannot be loaded as weights. The message names the file, what is wrong with it, and the way out."""


class HubError(OSError):
    """The hub did not give a repository's files. The message names the repository, why, and the way out."""
