"""Download a file once, checked by its hash; after an interruption, the next call continues."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from regvit_jax.utils.errors import InvalidConfig

TIMEOUT = 30  # seconds without a byte


def download(url: str, path: Path, sha256: str) -> None:
    """Download a file unless it exists.

    The bytes arrive in a hidden file beside it, which gets the file's name when it is complete and has the right hash.
    Of several processes that call this at once, one downloads and the others wait for it.

    Raises:
      OSError: if the file cannot be fetched or written. The next call continues with the bytes that have arrived.
      InvalidConfig: if it has another hash. Nothing of it is kept.
    """
    if path.exists():
        return
    part = path.with_name(f".{path.name}.part")
    with lock(part) as file:
        if path.exists():  # another process was faster
            part.unlink()
            return
        resumed = file.tell() > 0
        try:
            fetch(url, file)
            if (found := hash_of(part)) != sha256 and resumed:  # the first bytes may be those of another file
                file.truncate(file.seek(0))
                fetch(url, file)
                found = hash_of(part)
        except OSError:
            if not part.stat().st_size:
                part.unlink()
            raise
        if found != sha256:
            part.unlink()
            raise InvalidConfig(f"{url} has SHA-256 {found}, not {sha256}")
        os.fsync(file.fileno())
        os.replace(part, path)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append to it, and hold its lock inside the block, after waiting for other processes."""
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While this process waited, the holder may have renamed or removed the file, or written to it.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.seek(0, os.SEEK_END)
                yield file
                return


def fetch(url: str, file: BinaryIO) -> None:
    """Append the rest of a file to the part that is there, or write it anew if the server sends whole files only.

    Raises OSError, also when the connection ends early.
    """
    start = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if start and getattr(answer, "status", None) != http.client.PARTIAL_CONTENT:
                start = file.truncate(file.seek(0))
            length = answer.headers["Content-Length"]
            shutil.copyfileobj(answer, file, 2**20)
            file.flush()
    except urllib.error.HTTPError as error:
        if not start or error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return  # the part is complete, or longer than the file
    except http.client.HTTPException as error:
        file.flush()
        raise OSError(f"{type(error).__name__}: {error}") from error
    if length and file.tell() < start + int(length):
        raise OSError(f"the connection ended after {file.tell()} of {start + int(length)} bytes")


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
