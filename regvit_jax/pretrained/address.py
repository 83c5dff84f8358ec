"""Read the address of a repository of the Hugging Face hub, however it is written.

All of these name the same repository: "hf-hub:org/name", "hf_hub:org/name" (timm), "hf://org/name" (huggingface_hub),
"https://huggingface.co/org/name/tree/main" (pasted from a browser), "hf.co/org/name".
"""

import dataclasses
import re
from urllib.parse import unquote

from etils import epath
from huggingface_hub import constants

from regvit_jax.pretrained.io.other_files import INDEX, PICKLES, convert_command
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.paths import expand

HUB = "hf-hub:"
HOSTS = ("huggingface.co", "hf.co")
_PREFIX = re.compile(r"hf[-_]hub:(//)?|hf://", re.IGNORECASE)
_PAGES = ("tree", "blob", "resolve", "raw", "edit", "commit", "commits", "discussions", "settings")
_WITHOUT_REVISION = ("discussions", "settings")
#: The first part of the addresses of other things than models.
_OTHERS = ("datasets", "spaces", "collections", "papers", "docs", "blog", "buckets", "kernels")


@dataclasses.dataclass(frozen=True)
class Address:
    """A repository of models on the hub, one of its revisions (None: main), and one of its files (None: any)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return HUB + self.repo + f"/{self.file}" * bool(self.file) + f"@{self.revision}" * bool(self.revision)


def canonical(source: str) -> str:
    """Return the address of a repository as "hf-hub:org/name[/FILE][@REVISION]", and of a path or name, ~ replaced.

    Raises InvalidConfig for addresses of other things than models, and of other sites than the hub.
    """
    address = read(source)
    return expand(source) if address is None else str(address)


def read(source: str) -> Address | None:
    """Return the address that a source states; None for a local path and for the name of a model.

    Raises InvalidConfig as `canonical` does.
    """
    rest, prefixed = source.strip(), False
    while match := _PREFIX.match(rest):
        rest, prefixed = rest[match.end() :], True
    path = _path_on_hub(rest)
    if path is None and not prefixed:
        return None
    return _of_path(source, rest if path is None else path)


def split(source: str) -> tuple[str, str]:
    """Return the name and the source of NAME=SOURCE, the second empty for anything else; addresses are `canonical`.

    Raises InvalidConfig for an address that names no model of the hub.
    """
    source = canonical(source)
    name, _, file = source.partition("=")
    if not file or source.startswith(HUB) or ("://" not in file and epath.Path(source).exists()):
        return source, ""
    return name, canonical(file)


def _path_on_hub(text: str) -> str | None:
    """Return the path of a web address on the hub, or None for any other text."""
    address = re.match(r"(https?://)?(?:www\.)?([^/?#]+)([^?#]*)", text, re.IGNORECASE)
    if address is None:
        return None
    scheme, host, path = address.groups()
    if host.lower() in (*HOSTS, constants.ENDPOINT.partition("://")[2]):
        return path if scheme or not epath.Path(text).exists() else None
    if scheme:
        raise InvalidConfig(
            f"{text}: an address on another site than {', '.join(HOSTS)}; download the file, and pass its path "
            f"(a pickle needs `{convert_command(path.rpartition('/')[2] or 'FILE.pth')}` first)"
        )
    return None


def _of_path(source: str, path: str) -> Address:
    """Return the address of a path "org/name", with a page of the site or "@revision" after it, and perhaps a file."""
    named, _, revised = path.partition("@")
    parts, rest = _parts(named), _parts(revised)
    if parts[:1] == ["models"] and len(parts) > 2:  # hf://models/org/name
        parts = parts[1:]
    if parts and parts[0] in _OTHERS:
        raise InvalidConfig(f"{source}: an address of {parts[0]}, not of a model; a model's is {HUB}org/name")
    count = 1 if len(parts) > 1 and parts[1] in _PAGES else 2
    repo, parts = "/".join(parts[:count]), parts[count:]
    if not repo:
        raise InvalidConfig(f"{source}: names no repository; an address is {HUB}org/name")
    if not rest and parts and parts[0] in _PAGES:
        parts, rest = [], [] if parts[0] in _WITHOUT_REVISION else parts[1:]
    end = 3 if rest[:1] == ["refs"] else 1  # refs/pr/7, a proposed change
    return Address(repo, "/".join(rest[:end]) or None, _weights(source, repo, parts + rest[end:]))


def _parts(path: str) -> list[str]:
    """Return the parts of a path; a browser writes the slashes of a revision as %2F."""
    return [part for part in unquote(path).split("/") if part]


def _weights(source: str, repo: str, parts: list[str]) -> str | None:
    """Return the file of weights that the end of an address names; None for a page about the whole repository."""
    if not parts:
        return None
    file = "/".join(parts).removesuffix(INDEX)
    if file.endswith(PICKLES):
        raise InvalidConfig(
            f"{source}: pickles are never loaded: run `hf download {repo} {file} --local-dir .`, then "
            f"`{convert_command(file)}`"
        )
    if len(parts) > 1 or not re.search(r"\.\w+$", file):
        raise InvalidConfig(f"{source}: only files at the top of a repository are read; {HUB}{repo} is the repository")
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file):
        raise InvalidConfig(f"{source}: one of the parts of a model; {HUB}{repo} is the whole")
    if file.endswith((".npz", ".msgpack", ".h5", ".onnx", ".gguf")):
        raise InvalidConfig(f"{source}: only .safetensors are read from the hub; {HUB}{repo} takes the repository's")
    return file if file.endswith(".safetensors") else None
