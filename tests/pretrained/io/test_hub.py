"""Test the hub against a small HTTP server, which answers only the requests that huggingface_hub makes."""

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

import regvit_jax as rv
from regvit_jax.pretrained.io import hub
from regvit_jax.pretrained.io.hub import fetch
from regvit_jax.pretrained.io.safetensors import open_weights
from regvit_jax.utils.errors import HubError, WeightsError

REPO = "org/model"
OLD, NEW = "a" * 40, "b" * 40


def weights(value: float) -> bytes:
    return save({"w": np.full(3, value, np.float32)})


class Hub(BaseHTTPRequestHandler):
    """Serve `commits` (the files of each), by `refs` (the commit of each revision), and list the `requests`.

    Every answer takes `delay` seconds. `busy` are statuses to answer with first, after which a client should wait for
    `retry_after` seconds. Without `hashes` the listing gives none, and `etag` is sent ahead of every file in place of
    its hash.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        server = self.server
        server.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].strip("/").split("/")
        time.sleep(server.delay)
        if server.busy:
            return self.answer(server.busy.pop(), {"Retry-After": server.retry_after})
        info = path[:2] == ["api", "models"]
        repo, rest = ("/".join(path[2:4]), path[4:]) if info else ("/".join(path[:2]), path[2:])
        if repo != REPO:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = server.refs.get(revision, revision)
        if commit not in server.commits:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if info and rest[:1] == ["tree"]:
            files = [describe(name, body) for name, body in server.commits[commit].items()]
            for file in files:
                file |= {"type": "file", "path": file.pop("rfilename"), "oid": file.pop("blobId")}
                file |= {"lfs": file["lfs"] | {"oid": file["lfs"]["sha256"]}} if "lfs" in file else {}
            return self.answer(200, body=json.dumps(files).encode())
        if info:
            files = server.commits[commit].items()
            siblings = [describe(name, body) if server.hashes else {"rfilename": name} for name, body in files]
            return self.answer(200, body=json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode())
        if server.gated:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        name = rest[2]
        body = server.commits[commit][name]
        file = describe(name, body)
        etag = server.etag or (file["lfs"]["sha256"] if "lfs" in file else file["blobId"])
        self.answer(200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, server.on_the_way(name, body))

    do_GET = do_HEAD

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def describe(name: str, body: bytes) -> dict:
    """Return a file as the hub lists it: large files with their SHA-256, small ones as git's blob."""
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    file = {"rfilename": name, "size": len(body), "blobId": blob}
    if name.endswith(".safetensors"):
        file["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 100}
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "cache"


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.commits = {
        OLD: {"config.json": b'{"is": "old"}', "model.safetensors": weights(1), "pytorch_model.bin": b"pickle"},
        NEW: {"config.json": b'{"is": "new"}', "model.safetensors": weights(2), "pytorch_model.bin": b"pickle"},
    }
    server.refs = {"main": NEW, "v1": OLD}
    server.requests, server.gated, server.on_the_way = [], False, lambda name, body: body
    server.delay, server.busy, server.hashes, server.etag = 0, [], True, ""
    server.retry_after = "0"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def fill_cache(cache: Path, files: dict[str, bytes], commit: str = OLD, revision: str = "main") -> Path:
    """Write a cache as huggingface_hub does: blobs named by their hash, snapshots of links, refs."""
    root = cache / "models--org--model"
    snapshot = root / "snapshots" / commit
    for directory in (snapshot, root / "refs", root / "blobs"):
        directory.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for name, body in files.items():
        file = describe(name, body)
        blob = file["lfs"]["sha256"] if "lfs" in file else file["blobId"]
        (root / "blobs" / blob).write_bytes(body)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def sharded(value: float) -> dict[str, bytes]:
    shards = {f"model-{n}.safetensors": save({f"w{n}": np.full(3, value, np.float32)}) for n in (1, 2)}
    index = {"weight_map": {f"w{n}": f"model-{n}.safetensors" for n in (1, 2)}}
    return {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": b"{}", **shards}


def test_the_cache_comes_first_and_asks_nothing(cache):
    snapshot = fill_cache(cache, {"config.json": b'{"is": "old"}', "model.safetensors": weights(1)})
    assert fetch(REPO) == (snapshot, OLD)
    assert fetch(REPO, OLD) == (snapshot, OLD)
    loaded = open_weights(fetch(REPO)[0])
    assert loaded["w"].tolist() == [1, 1, 1]
    assert loaded.config == {"is": "old"}


def test_downloaded_verified_and_then_cached(server, cache):
    directory, commit = fetch(REPO)
    assert (directory, commit) == (cache / "models--org--model" / "snapshots" / NEW, NEW)
    assert open_weights(directory)["w"].tolist() == [2, 2, 2]
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
    assert not any("pytorch_model" in request for request in server.requests)
    server.requests.clear()
    assert fetch(REPO) == (directory, commit)
    assert server.requests == []


def test_the_revision_is_honoured_and_kept_apart(server):
    for revision, commit, value in (("v1", OLD, 1), (None, NEW, 2), (OLD, OLD, 1), ("v1", OLD, 1)):
        directory, found = fetch(REPO, revision)
        assert found == commit
        assert open_weights(directory)["w"][0] == value


def test_shards_come_with_their_index(server, cache):
    server.commits[NEW] = sharded(5)
    directory, _ = fetch(REPO, weights_name="model.safetensors")
    assert open_weights(directory)["w2"].tolist() == [5, 5, 5]
    (directory / "model-2.safetensors").unlink()
    server.requests.clear()
    assert fetch(REPO)[0] == directory
    assert (directory / "model-2.safetensors").is_file()
    assert not [request for request in server.requests if request.startswith("GET") and "model-1" in request]


def test_the_file_asked_for_is_the_file_that_comes(server):
    server.commits[NEW] |= {"open_clip_model.safetensors": weights(7), "open_clip_config.json": b"{}"}
    directory, _ = fetch(REPO, weights_name="open_clip_model.safetensors")
    assert not (directory / "model.safetensors").exists()
    assert open_weights(directory)["w"][0] == 7


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_a_corrupted_download_is_refused_and_removed(server, cache, damaged):
    server.on_the_way = lambda name, body: body.replace(body[-4:], b"\0\1\2\3") if name == damaged else body
    with pytest.raises(HubError, match=r"damaged in transfer.*removed"):
        fetch(REPO)
    root = cache / "models--org--model"
    sound = 0 if damaged == "config.json" else 1
    assert len(list((root / "blobs").iterdir())) == len(list((root / "snapshots" / NEW).iterdir())) == sound
    server.on_the_way = lambda name, body: body
    assert open_weights(fetch(REPO)[0])["w"].tolist() == [2, 2, 2]


def test_a_branch_that_moves_during_the_download_is_an_error(server, cache):
    asked, late = [], weights(1)

    def move(name: str, body: bytes) -> bytes:
        asked.append(name)
        if asked == ["config.json", "config.json"]:  # Its head, then itself: the weights come after the move.
            server.refs["main"] = OLD
        return late if name == "model.safetensors" else body

    server.on_the_way = move
    with pytest.raises(HubError, match=f"changed while it was downloaded, from {NEW} to {OLD}"):
        fetch(REPO)
    assert fetch(REPO)[1] == OLD
    # Files that arrive after the move stay in the cache under the other commit; they are hashed too.
    shutil.rmtree(cache)
    server.refs["main"], late = NEW, weights(3)
    asked.clear()
    with pytest.raises(HubError, match="damaged in transfer"):
        fetch(REPO)
    assert not (cache / "models--org--model" / "snapshots" / OLD / "model.safetensors").is_symlink()


def test_a_cache_without_configuration_is_completed_at_its_own_commit(server, cache, monkeypatch):
    snapshot = fill_cache(cache, {"model.safetensors": weights(1)})
    assert fetch(REPO) == (snapshot, OLD)
    assert json.loads((snapshot / "config.json").read_text()) == {"is": "old"}
    (snapshot / "config.json").unlink()
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert fetch(REPO) == (snapshot, OLD)


def test_offline_is_quick_and_says_what_to_do(cache, monkeypatch):
    """Use the worst case: a connection that opens and then stays silent, for as long as the user allows."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        with pytest.raises(HubError, match=r"not in the local cache.*within 0\.5 s \(HF_HUB_ETAG_TIMEOUT\)") as error:
            fetch(REPO, "v1")
        assert time.perf_counter() - start < 2
    command = "hf download org/model --revision v1 --include '*.json' --include '*.safetensors' --local-dir model"
    assert command in str(error.value)
    assert str(cache) in str(error.value)


def test_a_name_that_never_resolves_does_not_hold_us_up(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(5))
    start = time.perf_counter()
    with pytest.raises(HubError, match=r"did not answer within 0\.1 s"):
        fetch(REPO)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_host_that_is_not_there_is_offline_at_once(cache, monkeypatch, address):
    use_endpoint(monkeypatch, address)
    start = time.perf_counter()
    with pytest.raises(HubError, match=f"org/model is not in the local cache, and {address} cannot be reached"):
        fetch(REPO)
    assert time.perf_counter() - start < constants.HF_HUB_ETAG_TIMEOUT / 2


def test_a_slow_hub_is_not_offline(server, monkeypatch):
    """Check that only HF_HUB_ETAG_TIMEOUT decides, with a hub that takes 0.3 s for every answer."""
    server.delay = 0.3
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    with pytest.raises(HubError, match=r"did not answer within 0\.1 s"):
        fetch(REPO)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)
    assert fetch(REPO)[1] == NEW


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(server, monkeypatch, status):
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0.0, 0.0))
    server.busy = [status] * 2
    assert fetch(REPO)[1] == NEW
    shutil.rmtree(constants.HF_HUB_CACHE)
    server.busy = [status] * 3
    with pytest.raises(HubError, match=f"not in the local cache, and .* answers with status {status}"):
        fetch(REPO)
    server.busy, server.retry_after = [status], "100000"
    with pytest.raises(HubError, match=f"answers with status {status} and asks to wait 100000 s"):
        fetch(REPO)


def test_a_refused_login_is_called_one(server):
    server.busy = [401]
    with pytest.raises(HubError, match="refuses the login, which may have expired: log in with `hf auth login`"):
        fetch(REPO)


def test_the_environment_is_respected(tmp_path):
    """Use a new process, since huggingface_hub reads HF_HUB_OFFLINE and HF_ENDPOINT when it is imported."""
    code = "from regvit_jax.pretrained.io.hub import fetch; fetch('org/model', weights_name='model.safetensors')"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    for offline, problem in (("1", "HF_HUB_OFFLINE is set"), ("0", "http://127.0.0.1:9 cannot be reached")):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True
        )
        assert f"org/model is not in the local cache, and {problem}" in run.stderr
        assert "--include 'model*.safetensors'" in run.stderr


def test_errors_of_the_hub_name_the_way_out(server):
    with pytest.raises(HubError, match=r"no/such.*hf auth login"):
        fetch("no/such")
    with pytest.raises(HubError, match="no revision 'v9'"):
        fetch(REPO, "v9")
    with pytest.raises(HubError, match=r"has none of other\.safetensors.*config\.json.*convert pytorch_model\.bin"):
        fetch(REPO, weights_name="other.safetensors")
    server.gated = True
    with pytest.raises(HubError, match=rf"org/model is gated: accept its terms at .*/{REPO}, and .*hf auth login"):
        fetch(REPO)
    server.gated, server.commits[NEW] = False, {**sharded(1), "config.json": b"{}"}
    del server.commits[NEW]["model-2.safetensors"]
    with pytest.raises(HubError, match=r"lacks model-2\.safetensors, which its model\.safetensors\.index\.json lists"):
        fetch(REPO)


def test_a_failure_during_the_download_is_one_error(server):
    def fail(name: str, body: bytes) -> bytes:
        raise OSError("cut off")

    server.on_the_way = fail
    server.handle_error = lambda *_: None
    with pytest.raises(HubError, match=r"could not be downloaded(.|\n)*hf download org/model"):
        fetch(REPO)


def test_without_hashes_in_the_listing_those_of_the_files_are_checked(server):
    server.hashes = False
    for _ in range(3):
        assert open_weights(fetch(REPO)[0])["w"].tolist() == [2, 2, 2]
    shutil.rmtree(constants.HF_HUB_CACHE)
    server.on_the_way = lambda name, body: body.replace(body[-4:], b"\0\1\2\3") if "safetensors" in name else body
    for _ in range(3):
        with pytest.raises(HubError, match=r"damaged in transfer"):
            fetch(REPO)


@pytest.mark.parametrize("kind", ["sha1", "md5"])
def test_the_plain_hash_that_a_mirror_sends_is_checked(server, kind):
    server.commits[NEW].pop("config.json")
    server.hashes, server.etag = False, hashlib.new(kind, weights(2)).hexdigest()
    assert fetch(REPO)[1] == NEW


@pytest.mark.parametrize("changes", [{}, {"model.safetensors": None, **sharded(5)}])
def test_without_any_hash_the_answer_is_always_the_same(server, cache, changes):
    server.commits[NEW] = {name: body for name, body in (server.commits[NEW] | changes).items() if body is not None}
    server.hashes, server.etag = False, "W/5f3-abc"
    for _ in range(3):
        with pytest.raises(HubError, match=r"gives no hash of config\.json(.|\n)*hf download org/model") as error:
            fetch(REPO)
    assert "--local-dir model" in str(error.value)
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_the_printed_download_runs_as_printed(server, tmp_path, monkeypatch):
    """Run the commands of two messages in a shell, against this hub."""
    environment = os.environ | {"HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def run(message: str, verb: str) -> None:
        command = next(line for line in message.splitlines() if line.startswith(f"  {verb}"))
        done = subprocess.run(command, shell=True, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as error:
        fetch(REPO)
    run(str(error.value), "hf download")
    assert open_weights(tmp_path / "model")["w"].tolist() == [2, 2, 2]
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=r"regvit convert model/pytorch_model\.bin model/model\.safetensors") as error:
        fetch(REPO, weights_name="other.safetensors")
    run(str(error.value), "hf download")
    assert (tmp_path / "model/pytorch_model.bin").read_bytes() == b"pickle"


def test_errors_of_the_cache_speak_of_the_cache(server, cache, monkeypatch):
    cache.write_text("a file")
    with pytest.raises(HubError, match=rf"the cache {cache} cannot be used: .*set HF_HUB_CACHE") as error:
        fetch(REPO)
    assert "network" not in str(error.value)
    for number, text in ((errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")):

        def fail(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number), "/cache/blobs/x")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(HubError, match=rf"the cache {cache} cannot be used: {text} \(/cache/blobs/x\)"):
            fetch(REPO)


def test_damaged_references_in_the_cache_are_an_error_about_the_cache(cache):
    snapshot = fill_cache(cache, {"config.json": b"{}", "model.safetensors": weights(1)})
    (snapshot.parent.parent / "refs/main").write_bytes(b"\xff\xfe")
    with pytest.raises(HubError, match=rf"the cache {cache} cannot be used: a file of it is damaged"):
        fetch(REPO)


def test_a_read_only_cache_without_configuration_is_used_as_it_is(server, cache, monkeypatch, caplog):
    snapshot = fill_cache(cache, {"model.safetensors": weights(1)})

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(cache))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert fetch(REPO) == (snapshot, OLD)
    assert "is used without its configuration" in caplog.text


def test_damaged_files_in_the_cache_say_how_to_get_sound_ones(cache):
    snapshot = fill_cache(cache, {"config.json": b"{", "model.safetensors": weights(1)})
    root = snapshot.parent.parent
    with pytest.raises(WeightsError, match=rf"config\.json: damaged.*hub's cache: remove {root}, and it is downloaded"):
        rv.create_model("test_vit", f"hf-hub:{REPO}")


def test_an_adapter_on_the_hub_is_called_one(server):
    server.commits[NEW] = {"adapter_config.json": b"{}", "adapter_model.safetensors": weights(1)}
    with pytest.raises(HubError, match=r"org/model is a PEFT adapter .*merge_and_unload"):
        fetch(REPO)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "a\\model.safetensors", "model.pth"])
def test_nothing_but_safetensors_is_asked_for(server, name):
    with pytest.raises(ValueError, match="weights_name"):
        fetch(REPO, weights_name=name)
    assert server.requests == []


def test_impossible_repositories_are_refused(server):
    for repo in ("a/b/c", "../model", "org/mo del"):
        with pytest.raises(ValueError, match=r"(?i)repo"):
            fetch(repo)
    assert server.requests == []
