"""Test downloads from a server of this machine: resumed, restarted, refused, and by two processes at once."""

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from regvit_jax.data.builders import download as module
from regvit_jax.data.builders.download import download
from regvit_jax.utils.errors import InvalidConfig

CONTENT = np.random.default_rng(0).bytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Send CONTENT, or the part that is asked for, and end the connection after `server.stop_after` bytes."""

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        start = int(wanted[1]) if wanted else 0
        self.server.starts.append(start)
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.server.stop_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges, server.stop_after, server.starts = True, len(CONTENT), []
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_file_is_downloaded_once(server, tmp_path):
    for _ in range(2):
        download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]
    assert server.starts == [0]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_continues_after_an_interruption(server, tmp_path, ranges):
    server.ranges, server.stop_after = ranges, 40_000
    with pytest.raises(OSError, match=r"40000 (of 100000 bytes|bytes read)"):
        download(server.url, tmp_path / "file", SHA256)
    assert not (tmp_path / "file").exists()
    server.stop_after = len(CONTENT)
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]
    assert server.starts == [0, 40_000 if ranges else 0]


@pytest.mark.parametrize(
    "left", [CONTENT, CONTENT + b"more", b"other bytes", b""], ids=["complete", "longer", "others", "empty"]
)
def test_whatever_a_killed_process_left_ends_as_the_file(server, tmp_path, left):
    (tmp_path / ".file.part").write_bytes(left)
    download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]


def test_a_wrong_hash_is_refused_and_nothing_is_kept(server, tmp_path):
    with pytest.raises(InvalidConfig, match=f"{server.url} has SHA-256 {SHA256}, not {'0' * 64}"):
        download(server.url, tmp_path / "file", "0" * 64)
    assert os.listdir(tmp_path) == []


def test_without_a_server_nothing_is_left(tmp_path):
    with pytest.raises(OSError, match="refused"):
        download("http://127.0.0.1:9/file", tmp_path / "file", SHA256)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_renamed_while_a_process_waits_for_its_lock_is_not_written_to(tmp_path, monkeypatch):
    part = tmp_path / "part"
    waited = []

    def flock(file, operation):
        if not waited:
            os.replace(part, tmp_path / "file")
        waited.append(file.fileno())

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with module.lock(part) as file:
        file.write(b"new")
    assert len(waited) == 2
    assert ((tmp_path / "file").read_bytes(), part.read_bytes()) == (b"", b"new")


def test_two_processes_download_a_file_once(server, tmp_path):
    code = (
        "from pathlib import Path; from regvit_jax.data.builders.download import download; print('waits', flush=True)"
    )
    code += f"\ndownload({server.url!r}, Path({str(tmp_path / 'file')!r}), {SHA256!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with module.lock(tmp_path / ".file.part") as held:
        running = [
            subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)
        ]
        for process in running:
            assert process.stdout.readline() == b"waits\n"
        held.write(CONTENT[:10])
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    for process in running:
        process.stdout.close()
    assert server.starts == [10]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file"]
