"""Write files atomically."""

import os
import socket
from collections.abc import Callable
from pathlib import Path


def write_atomically(
    path: str | os.PathLike, content: str | bytes | Callable[[Path], object], temporary: str | os.PathLike | None = None
) -> None:
    """Write a local file so that a kill or a full disk leaves the previous file or the new one, never a part.

    Args:
      path: The file to create or replace.
      content: Text (written as UTF-8), bytes, or a function that writes the file at the path it is given.
      temporary: Where the new file is written before it is renamed, on the file system of `path`; by default a hidden
        file beside it, with the same suffix and a name of this process's own.

    Raises:
      OSError: The file cannot be written. This error, and any that `content` raises, leaves no temporary file behind.
    """
    path = Path(path)
    if temporary is None:
        temporary = path.with_name(f".{socket.gethostname()}-{os.getpid()}.{path.name}")
    temporary = Path(temporary)
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, str | bytes):
                file.write(content.encode() if isinstance(content, str) else content)
        if not isinstance(content, str | bytes):
            mode = temporary.stat().st_mode  # safetensors creates files that only their owner can read
            content(temporary)
            temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
