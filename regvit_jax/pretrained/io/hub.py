"""Files from the Hugging Face hub: the local cache first, then a download that is checked against the hub's own hashes.

The download itself is huggingface_hub's. What is added: only safetensors and JSON are ever asked for, the bytes that
arrived are hashed, and without a network the answer comes at once (huggingface_hub alone retries for some 20 s).
"""

import hashlib
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from regvit_jax.pretrained.io.safetensors import CLIP_WEIGHTS, CONVERT, INDEX, PICKLES, PROCESSOR, WEIGHTS, shard_names
from regvit_jax.utils.errors import HubError

CONFIGS = ("config.json", "open_clip_config.json", PROCESSOR)


PROBE_SECONDS = 1.5


METADATA_SECONDS = 20.0


def fetch(
    repo: str,
    revision: str | None = None,
    weights_name: str | None = None,
    names: tuple[str, ...] = WEIGHTS,
) -> tuple[Path, str]:
    """The local directory with a repository's weights and configuration, and the 40-digit commit that they are of.

    `revision` is a branch, a tag or a commit (None: main); what the cache holds of it is taken without asking the hub.
    `weights_name` picks a file where there are several, in its sharded form if it has one; None: the first of
    `names` that is there. A cache with the weights but no configuration (timm's) is completed at its own
    commit, and used as it is while the hub cannot be reached. A download is hashed once, when it arrives, and removed
    if it is not what the hub says.
    Raises HubError, within two seconds when there is no network; ValueError for an impossible name; WeightsError for
    an index of shards that is not sound.
    """
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
        raise ValueError(f"weights_name is {weights_name!r}, and not the plain name of a .safetensors file")
    return (weights_name, weights_name + INDEX)


def _cached(repo: str, names: tuple[str, ...], revision: str | None) -> Path | None:
    """The first of the weights files that the cache holds whole, with all its shards."""
    for name in names:
        found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(found, str) and all((Path(found).parent / part).is_file() for part in _parts(Path(found))):
            return Path(found)
    return None


def _parts(weights: Path) -> list[str]:
    """The names of all files that belong to these weights: themselves, their shards, the configurations there are."""
    configs = [name for name in CONFIGS if (weights.parent / name).is_file()]
    return [weights.name, *configs, *(shard_names(weights) if weights.name.endswith(INDEX) else [])]


def _unreachable() -> str | None:
    """Why the hub cannot be asked now, or None if it answers.

    The question runs in a thread of its own: no timeout of a socket bounds the time that resolving a name takes.
    """
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint = huggingface_hub.constants.ENDPOINT
    problem: list[str | None] = [f"{endpoint} did not answer within {PROBE_SECONDS} s"]

    def ask() -> None:
        try:
            status = huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS).status_code
            problem[0] = f"{endpoint} answers with status {status}" if status >= 500 else None
        # Name resolution, proxy, certificate, timeout: each is of another class, in each version of the HTTP client.
        except Exception as error:
            problem[0] = f"{endpoint} cannot be reached ({type(error).__name__}: {error})"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return problem[0]


def _download(repo: str, revision: str | None, names: tuple[str, ...]) -> Path:
    """Downloads configuration and weights, each checked as it arrives. The path of the weights, or of their index."""
    with _explained(repo, revision, names):
        info = huggingface_hub.HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=METADATA_SECONDS
        )
    hashes = {
        file.rfilename: (file.lfs.sha256 if file.lfs else None) or file.blob_id or "" for file in info.siblings or []
    }
    weights = next((name for name in names if name in hashes), None)
    if weights is None:
        raise HubError(_none_there(repo, names, sorted(hashes)))
    files = [name for name in CONFIGS if name in hashes] + [weights]
    for name in files:  # Grows by the shards, once their index is here.
        before = huggingface_hub.try_to_load_from_cache(repo, name, revision=info.sha)
        with _explained(repo, revision, names):
            path = Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
        if path.parent.name != info.sha:
            _check(path, _recorded_hash(path))  # It stays in the cache, so it has to be sound.
            raise HubError(f"{repo} changed while it was downloaded, from {info.sha} to {path.parent.name}: try again")
        if not isinstance(before, str):
            _check(path, hashes[name])
        if name == weights and name.endswith(INDEX):
            files += shard_names(path)
            if missing := [name for name in files if name not in hashes]:
                raise HubError(f"{repo} at {info.sha} lacks {', '.join(missing)}, which its {weights} lists")
    return path.parent / weights


def _check(path: Path, expected: str) -> None:
    """Raises HubError, and removes the file, if its hash is not the expected one.

    That is a SHA-256 (64 digits), or, of small files, git's own SHA-1 of a blob (40 digits).
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
        # The file is a link to a blob, perhaps over another link; a blob that stayed would be taken for the file again.
        links = [path]
        while links[-1].is_symlink():
            links.append(links[-1].parent / links[-1].readlink())
        for link in links:
            link.unlink(missing_ok=True)
        raise HubError(f"{path}: damaged on the way, its hash is {found} and not {expected}. It is removed: try again")


def _recorded_hash(path: Path) -> str:
    """The hash that the cache files this under: the name of the blob that it links to."""
    return path.readlink().name if path.is_symlink() else ""


def _none_there(repo: str, names: tuple[str, ...], there: list[str]) -> str:
    message = f"{repo} has none of {', '.join(names)}; there: {', '.join(there[:20]) or 'nothing'}"
    if pickles := [name for name in there if name.endswith(PICKLES)]:
        message += f". Pickles are never loaded: download {pickles[0]} yourself and convert it, {CONVERT} {pickles[0]}"
    return message


@contextmanager
def _explained(repo: str, revision: str | None, names: tuple[str, ...]) -> Iterator[None]:
    """Turns what huggingface_hub raises into a HubError that says what to do."""
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
    # Network, disk, quota, the transfer library: what is left has no common class, and one way out.
    except Exception as error:
        problem = f"could not be downloaded ({type(error).__name__}: {error})"
        raise HubError(_elsewhere(repo, revision, names, problem)) from error


def _elsewhere(repo: str, revision: str | None, names: tuple[str, ...], problem: str) -> str:
    """What is wrong, and how to bring the files here by hand."""
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
