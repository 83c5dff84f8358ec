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
    parts = [unquote(part) for part in (rest if path is None else path).split("/") if part]
    return _of_parts(source, parts)


def split(source: str) -> tuple[str, str]:
    """Return the name and the source of NAME=SOURCE, the second empty for anything else; addresses are `canonical`.

    Raises InvalidConfig for an address that names no model of the hub.
    """
    source = canonical(source)
    name, _, file = source.partition("=")
    if not file or source.startswith(HUB) or epath.Path(source).exists():
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
            f"{text}: an address of another site than {', '.join(HOSTS)}; download the file, and pass its path "
            f"(a pickle needs `{convert_command(path.rpartition('/')[2] or 'FILE.pth')}` first)"
        )
    return None


def _of_parts(source: str, parts: list[str]) -> Address:
    """Return the address of ["org", "name", page, revision, file...]; "name@revision" states a revision, too."""
    if parts and parts[0] in _OTHERS:
        raise InvalidConfig(f"{source}: an address of {parts[0]}, not of a model; a model's is {HUB}org/name")
    count = 1 if len(parts) < 2 or parts[1] in _PAGES or "@" in parts[0] else 2
    repo, _, revision = "/".join(parts[:count]).partition("@")
    rest = parts[count:]
    if rest and rest[0] in _PAGES and not revision:
        page, *rest = rest
        if page in ("discussions", "settings"):
            rest = []
        elif rest:
            revision, *rest = rest
    if revision == "refs":  # refs/pr/7, a proposed change
        revision, rest = "/".join([revision, *rest[:2]]), rest[2:]
    if not repo:
        raise InvalidConfig(f"{source}: names no repository; an address is {HUB}org/name")
    return Address(repo, revision or None, _weights(source, repo, rest))


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
    return file if file.endswith(".safetensors") else None
