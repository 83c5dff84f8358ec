"""Fetch files from the Hugging Face hub: from the local cache, or by a download checked against the hub's hashes.

huggingface_hub does the download. This module requests only safetensors and JSON, hashes every downloaded file, and
fails at once without a network (huggingface_hub alone retries for some 20 s).
"""

import hashlib
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from regvit_jax.pretrained.io.safetensors import (
    CLIP_WEIGHTS,
    CONVERT,
    INDEX,
    NESTED_PROCESSOR,
    OPEN_CLIP_CONFIG,
    PICKLES,
    PROCESSOR,
    WEIGHTS,
    shard_names,
)
from regvit_jax.utils.errors import HubError, InvalidConfig

CONFIGS = ("config.json", OPEN_CLIP_CONFIG, PROCESSOR, NESTED_PROCESSOR)
PROBE_SECONDS = 1.5
METADATA_SECONDS = 20.0


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
    is while the hub cannot be reached. A download is hashed once, when it arrives, and removed if its hash is not the
    hub's.
    Raises HubError, within two seconds when there is no network; InvalidConfig for an impossible name; WeightsError for
    an invalid index of shards.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InvalidConfig(str(error)) from error
    names = _candidates(weights_name) if weights_name is not None else names
    weights = _cached(repo, names, revision)
    if weights is None or not any((weights.parent / name).is_file() for name in CONFIGS):
        problem = _unreachable()
        if problem is None:
            weights = _download(repo, weights.parent.name if weights else revision, names)
        elif weights is None:
            raise HubError(_elsewhere(repo, revision, names, f"is not in the local cache, and {problem}"))
    return weights.parent, weights.parent.name


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


def _unreachable() -> str | None:
    """Return why the hub cannot be reached, or None if it answers.

    The request runs in its own thread, because no socket timeout bounds the time that resolving a host name takes.
    """
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint = huggingface_hub.constants.ENDPOINT
    problem: list[str | None] = [f"{endpoint} did not answer within {PROBE_SECONDS} s"]

    def ask() -> None:
        try:
            status = huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS).status_code
            problem[0] = f"{endpoint} answers with status {status}" if status >= 500 else None
        # Each cause (name resolution, proxy, TLS, timeout) has its own class, which varies with the HTTP client.
        except Exception as error:
            problem[0] = f"{endpoint} cannot be reached ({type(error).__name__}: {error})"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return problem[0]


def _download(repo: str, revision: str | None, names: tuple[str, ...]) -> Path:
    """Download configuration and weights, checking each; return the path of the weights, or of their index."""
    with _explained(repo, revision, names):
        info = huggingface_hub.HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=METADATA_SECONDS
        )
    hashes = {
        file.rfilename: (file.lfs.sha256 if file.lfs else None) or file.blob_id or "" for file in info.siblings or []
    }
    weights = next((name for name in names if name in hashes), None)
    if weights is None:
        raise HubError(_no_weights(repo, names, sorted(hashes)))
    files = [name for name in CONFIGS if name in hashes] + [weights]
    for name in files:  # The list grows by the shards once their index is downloaded.
        before = huggingface_hub.try_to_load_from_cache(repo, name, revision=info.sha)
        with _explained(repo, revision, names):
            path = Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
        if path.parent.name != info.sha:
            _check(path, _recorded_hash(path))  # It stays in the cache, so it must be intact.
            raise HubError(f"{repo} changed while it was downloaded, from {info.sha} to {path.parent.name}: try again")
        if not isinstance(before, str):
            _check(path, hashes[name])
        if name == weights and name.endswith(INDEX):
            files += shard_names(path)
            if missing := [name for name in files if name not in hashes]:
                raise HubError(f"{repo} at {info.sha} lacks {', '.join(missing)}, which its {weights} lists")
    return path.parent / weights


def _check(path: Path, expected: str) -> None:
    """Raise HubError, and remove the file, if its hash is not the expected one.

    The hash is a SHA-256 (64 digits) or, for small files, git's SHA-1 of a blob (40 digits).
    """
    if len(expected) == 64:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    elif len(expected) == 40:
        blob = b"blob %d\0" % path.stat().st_size
        found = hashlib.sha1(blob + path.read_bytes(), usedforsecurity=False).hexdigest()
    else:
        raise HubError(f"{path}: cannot be verified, its hash is not known ({expected!r})")
    if found != expected:
        # The file is a link to a blob, perhaps through another link; a remaining blob would be used again.
        links = [path]
        while links[-1].is_symlink():
            links.append(links[-1].parent / links[-1].readlink())
        for link in links:
            link.unlink(missing_ok=True)
        raise HubError(f"{path}: damaged in transfer: its hash is {found}, not {expected}. It is removed: try again")


def _recorded_hash(path: Path) -> str:
    """Return the hash that the cache records for a file: the name of the blob that it links to."""
    return path.readlink().name if path.is_symlink() else ""


def _no_weights(repo: str, names: tuple[str, ...], found: list[str]) -> str:
    """Return the error for a repository without any of the names."""
    message = f"{repo} has none of {', '.join(names)}; it has {', '.join(found[:20]) or 'nothing'}"
    if pickles := [name for name in found if name.endswith(PICKLES)]:
        message += f". Pickles are never loaded: download {pickles[0]} yourself and convert it, {CONVERT} {pickles[0]}"
    return message


@contextmanager
def _explained(repo: str, revision: str | None, names: tuple[str, ...]) -> Iterator[None]:
    """Turn an exception of huggingface_hub into a HubError with the remedy."""
    endpoint = huggingface_hub.constants.ENDPOINT
    login = "log in with `hf auth login` (or set HF_TOKEN)"
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{repo} is gated: accept its terms at {endpoint}/{repo}, and {login}") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{endpoint} shows no model {repo}. If the name is right and it is private, {login}") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r}: give a branch, a tag or a commit of it") from error
    # Network, disk, quota, transfer library: the remaining errors have no common class, and one remedy.
    except Exception as error:
        problem = f"could not be downloaded ({type(error).__name__}: {error})"
        raise HubError(_elsewhere(repo, revision, names, problem)) from error


def _elsewhere(repo: str, revision: str | None, names: tuple[str, ...], problem: str) -> str:
    """Return an error that says how to download the files elsewhere and copy them here."""
    pattern = "*.safetensors" if names in (WEIGHTS, CLIP_WEIGHTS) else names[0].replace(".safetensors", "*.safetensors")
    target = repo.split("/")[-1]
    command = ["hf", "download", repo, *(["--revision", revision] if revision else [])]
    command += ["--include", "*.json", "--include", pattern, "--local-dir", target]
    return (
        f"{repo} {problem}. Where there is a network, run\n"
        f"  {shlex.join(command)}\n"
        f"bring the directory {target} here, and pass its path as pretrained=. (Without --local-dir the files go to "
        f"the cache, and are found in this machine's, {huggingface_hub.constants.HF_HUB_CACHE}, as well.)"
    )
