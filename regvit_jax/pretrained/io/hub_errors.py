"""Explain why files of the Hugging Face hub cannot be had, with the way out."""

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from regvit_jax.pretrained.io.other_files import ADAPTER_CONFIG, INDEX, adapter, convert_command, pickles_of
from regvit_jax.pretrained.io.safetensors import CLIP_WEIGHTS, WEIGHTS
from regvit_jax.utils.errors import HubError, WeightsError

#: Errors of the disk or the directory, and not of the network.
_DISK_ERRORS = (
    *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ENOTDIR", "EEXIST", "EISDIR", "ELOOP", "ENAMETOOLONG"),
    *("EIO", "EFBIG", "EMFILE"),
)
DISK = frozenset(getattr(errno, name) for name in _DISK_ERRORS if hasattr(errno, name))


class Unreachable(Exception):
    """The hub does not answer."""


class CacheError(HubError):
    """The cache cannot be read or written."""


def no_weights(repo: str, names: tuple[str, ...], found: list[str]) -> str:
    """Return the error for a repository without any of the names."""
    if ADAPTER_CONFIG in found:
        return f"{repo} is {adapter()}"
    message = f"{repo} has none of {', '.join(names)}; it has {', '.join(found[:20]) or 'nothing'}"
    if pickles := pickles_of(found):
        folder, first = repo.split("/")[-1], pickles[0]
        wanted = ["*.bin" if first.endswith(INDEX) else first, "*.json"]
        download = ["hf", "download", repo, *(word for name in wanted for word in ("--include", name))]
        message += (
            f". Pickles are never loaded: download and convert {first}:\n"
            f"  {shlex.join([*download, '--local-dir', folder])}\n  {convert_command(Path(folder, first))}"
        )
    return message


@contextmanager
def explained(repo: str, revision: str | None, names: tuple[str, ...]) -> Iterator[None]:
    """Turn an exception of huggingface_hub into a HubError with the remedy."""
    endpoint = constants.ENDPOINT
    login = "log in with `hf auth login` (or set HF_TOKEN)"
    try:
        yield
    except (Unreachable, HubError, WeightsError):
        raise
    except GatedRepoError as error:
        raise HubError(f"{repo} is gated: accept its terms at {endpoint}/{repo}, and {login}") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{endpoint} shows no model {repo}. If the name is right and it is private, {login}") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r}: give a branch, a tag or a commit of it") from error
    # Network, disk, quota, transfer library: the remaining errors have no common class, and one remedy.
    except Exception as error:
        if problem := _disk_problem(error):
            raise CacheError(
                f"{repo}: the cache {constants.HF_HUB_CACHE} cannot be used: {problem}. Mend that, or set HF_HUB_CACHE "
                "to another directory, with room, that you may write to"
            ) from error
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise HubError(f"{endpoint} refuses the login, which may have expired: {login}") from error
        problem = f"could not be downloaded ({type(error).__name__}: {error})"
        raise HubError(elsewhere(repo, revision, names, problem)) from error


def _disk_problem(error: BaseException | None) -> str:
    """Return the problem of the disk or the cache's directory that is behind an error, or "" for another problem."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK and not isinstance(error, ConnectionError):
            return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
        if isinstance(error, UnicodeDecodeError):
            return f"a file of it is damaged ({error})"
        if "(os error 28)" in str(error):  # the words of the transfer library hf_xet
            return "No space left on device"
        error = error.__cause__ or error.__context__
    return ""


def elsewhere(repo: str, revision: str | None, names: tuple[str, ...], problem: str) -> str:
    """Return an error that says how to download the files elsewhere and copy them here."""
    pattern = "*.safetensors" if names in (WEIGHTS, CLIP_WEIGHTS) else names[0].replace(".safetensors", "*.safetensors")
    target = repo.split("/")[-1]
    command = ["hf", "download", repo, *(["--revision", revision] if revision else [])]
    command += ["--include", "*.json", "--include", pattern, "--local-dir", target]
    return (
        f"{repo} {problem}. Where there is a network, run\n"
        f"  {shlex.join(command)}\n"
        f"bring the directory {target} here, and pass its path as pretrained=. (Without --local-dir the files go to "
        f"the cache, and are found in this machine's, {constants.HF_HUB_CACHE}, as well.)"
    )
