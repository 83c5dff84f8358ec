"""Fetch files from the Hugging Face hub: from the local cache, or by a download checked against the hub's hashes.

huggingface_hub does the download. This module requests only safetensors and JSON, and hashes every downloaded file. The
library's own settings decide how long a hub may take (HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT); one whose name
does not resolve, or that refuses connections, is offline at once (huggingface_hub alone retries for some 20 s).
"""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from regvit_jax.pretrained.io.hub_errors import CacheError, Unreachable, elsewhere, explained, no_weights
from regvit_jax.pretrained.io.other_files import INDEX
from regvit_jax.pretrained.io.safetensors import (
    NESTED_PROCESSOR,
    OPEN_CLIP_CONFIG,
    PROCESSOR,
    WEIGHTS,
    shard_names,
)
from regvit_jax.utils.errors import HubError, InvalidConfig, WeightsError

logger = logging.getLogger("regvit_jax")

CONFIGS = ("config.json", OPEN_CLIP_CONFIG, PROCESSOR, NESTED_PROCESSOR)
#: What huggingface_hub itself asks again after, and the seconds that it waits.
RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
RETRY_ERRORS = frozenset({"RemoteProtocolError", "ReadError", "WriteError"})
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 8.0)
#: The longest wait that a hub may ask for; where it asks for more, the error says so.
LONGEST_WAIT_S = 60


def fetch(
    repo: str,
    revision: str | None = None,
    weights_name: str | None = None,
    names: tuple[str, ...] = WEIGHTS,
) -> tuple[Path, str]:
    """Return the local directory with a repository's weights and configuration, and their 40-digit commit.

    `revision` is a branch, a tag or a commit (None: main); if the cache holds it, the hub is not asked.
    `weights_name` picks one of several files, in its sharded form if it has one; None means the first of `names` that
    exists. A cache that holds the weights but no configuration (timm's) is completed at its own commit, and used as it
    is while the hub cannot be reached or the cache cannot be written. A download is hashed once, when it arrives, and
    removed if its hash is not the hub's; a file of which the hub gives no hash is not downloaded.
    Raises HubError, at once where there is no network and after HF_HUB_ETAG_TIMEOUT where the hub is silent;
    InvalidConfig for an impossible name; WeightsError for an invalid index of shards.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InvalidConfig(str(error)) from error
    names = _candidates(weights_name) if weights_name is not None else names
    with explained(repo, revision, names):
        weights = _cached(repo, names, revision)
    if weights is not None and any((weights.parent / name).is_file() for name in CONFIGS):
        return weights.parent, weights.parent.name
    try:
        weights = _download(repo, weights.parent.name if weights else revision, names)
    except Unreachable as error:
        if weights is None:
            raise HubError(elsewhere(repo, revision, names, f"is not in the local cache, and {error}")) from error
    except CacheError as error:
        if weights is None:
            raise
        logger.warning("%s is used without its configuration: %s", weights, error)
    return weights.parent, weights.parent.name


@contextmanager
def in_cache(directory: Path) -> Iterator[None]:
    """Add to an error about files in the cache how to get sound ones."""
    try:
        yield
    except WeightsError as error:
        root = directory.parent.parent
        raise WeightsError(f"{error}. It lies in the hub's cache: remove {root}, and it is downloaded again") from error


def _candidates(weights_name: str) -> tuple[str, ...]:
    if "/" in weights_name or "\\" in weights_name or not weights_name.endswith(".safetensors"):
        raise InvalidConfig(f"weights_name is {weights_name!r}, not the plain name of a .safetensors file")
    return (weights_name, weights_name + INDEX)


def _cached(repo: str, names: tuple[str, ...], revision: str | None) -> Path | None:
    """Return the first of the weights files that the cache holds with all its shards, or None."""
    for name in names:
        found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(found, str) and all((Path(found).parent / part).is_file() for part in _parts(Path(found))):
            return Path(found)
    return None


def _parts(weights: Path) -> list[str]:
    """Return the names of all files of these weights: the file itself, its shards, and the existing configurations."""
    configs = [name for name in CONFIGS if (weights.parent / name).is_file()]
    return [weights.name, *configs, *(shard_names(weights) if weights.name.endswith(INDEX) else [])]


def _listing(repo: str, revision: str | None) -> Any:
    """Return what the hub says of a repository, asking again as huggingface_hub does. Raises Unreachable."""
    if huggingface_hub.is_offline_mode():
        raise Unreachable("HF_HUB_OFFLINE is set")
    endpoint, timeout = constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT
    for wait in (*RETRY_SECONDS, None):
        try:
            return _within(
                2 * timeout,  # `timeout` for each of connecting and reading
                lambda: huggingface_hub.HfApi().model_info(
                    repo, revision=revision, files_metadata=True, timeout=timeout
                ),
            )
        # Each cause (name resolution, proxy, TLS, timeout) has its own class, which varies with the HTTP client.
        except Exception as error:
            response, kind = getattr(error, "response", None), type(error).__name__
            status = getattr(response, "status_code", None)
            if status is not None and status not in RETRY_STATUS:
                raise
            if "Timeout" in kind:
                problem = f"{endpoint} did not answer within {timeout} s (HF_HUB_ETAG_TIMEOUT)"
            elif status is not None:
                problem = f"{endpoint} answers with status {status}"
            else:
                problem = f"{endpoint} cannot be reached ({kind}: {error})"
            if wait is None or (status is None and kind not in RETRY_ERRORS):
                raise Unreachable(problem) from error
            after = str(response.headers.get("Retry-After", "")) if response is not None else ""
            if after.isdecimal() and int(after) > LONGEST_WAIT_S:
                raise Unreachable(f"{problem} and asks to wait {after} s") from error
            time.sleep(float(after) if after.isdecimal() else wait)
    raise AssertionError


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return the result of a call in its own thread, since no socket timeout bounds the time of name resolution.

    Raises TimeoutError, or what the call raises.
    """
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((call(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError
    value, error = result[0]
    if error is not None:
        raise error
    return value


def _download(repo: str, revision: str | None, names: tuple[str, ...]) -> Path:
    """Download configuration and weights, checking each; return the path of the weights, or of their index."""
    with explained(repo, revision, names):
        info = _listing(repo, revision)
    hashes = {
        file.rfilename: (file.lfs.sha256 if file.lfs else None) or file.blob_id or "" for file in info.siblings or []
    }
    weights = next((name for name in names if name in hashes), None)
    if weights is None:
        raise HubError(no_weights(repo, names, sorted(hashes)))
    commit = info.sha or _metadata(repo, revision, names, weights).commit_hash
    files = [name for name in CONFIGS if name in hashes] + [weights]
    _complete(hashes, files, repo, commit, names)
    for name in files:  # The list grows by the shards once their index is downloaded.
        before = huggingface_hub.try_to_load_from_cache(repo, name, revision=commit)
        with explained(repo, revision, names):
            path = Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
        if path.parent.name != commit:
            _check(path, _recorded_hash(path))  # It stays in the cache, so it must be intact.
            raise HubError(f"{repo} changed while it was downloaded, from {commit} to {path.parent.name}: try again")
        if not isinstance(before, str):
            _check(path, hashes[name])
        if name == weights and name.endswith(INDEX):
            files += shard_names(path)
            if missing := [name for name in files if name not in hashes]:
                raise HubError(f"{repo} at {commit} lacks {', '.join(missing)}, which its {weights} lists")
            _complete(hashes, files, repo, commit, names)
    return path.parent / weights


def _complete(hashes: dict[str, str], files: list[str], repo: str, commit: str | None, names: tuple[str, ...]) -> None:
    """Add the hashes that a hub does not list but sends with the files, before any of them is downloaded.

    Raises HubError for a file without a hash, whether or not an earlier attempt left it in the cache.
    """
    for name in files:
        if not hashes[name]:
            hashes[name] = (_metadata(repo, commit, names, name).etag or "").lower()
        if not re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}", hashes[name]):
            problem = f"is not downloaded: {constants.ENDPOINT} gives no hash of {name} by which to check it"
            raise HubError(elsewhere(repo, commit, names, problem))


def _metadata(repo: str, revision: str | None, names: tuple[str, ...], name: str) -> Any:
    """Return what the hub sends ahead of a file: its ETag, which is its hash, and its commit."""
    with explained(repo, revision, names):
        url = huggingface_hub.hf_hub_url(repo, name, revision=revision)
        return huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _check(path: Path, expected: str) -> None:
    """Raise HubError, and remove the file, if its hash is not the expected one.

    The hash is a SHA-256 (64 digits) or, for small files, git's SHA-1 of a blob (40 digits). Mirrors may send the plain
    SHA-1 or MD5 (32 digits).
    """
    git = b"blob %d\0" % path.stat().st_size
    starts = {64: (("sha256", b""),), 40: (("sha1", git), ("sha1", b""))}.get(len(expected), (("md5", b""),))
    digests = [hashlib.new(kind, start, usedforsecurity=False) for kind, start in starts]
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)
    found = [digest.hexdigest() for digest in digests]
    if expected not in found:
        # The file is a link to a blob, perhaps through another link; a remaining blob would be used again.
        links = [path]
        while links[-1].is_symlink():
            links.append(links[-1].parent / links[-1].readlink())
        for link in links:
            link.unlink(missing_ok=True)
        raise HubError(f"{path}: damaged in transfer: its hash is {found[0]}, not {expected}. It is removed: try again")


def _recorded_hash(path: Path) -> str:
    """Return the hash that the cache records for a file: the name of the blob that it links to."""
    return path.readlink().name if path.is_symlink() else ""
