"""Downloads against a local stand-in of the hub's HTTP interface: slow, cut off, gated, missing, of the wrong size."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models import download
from vllm_mlx.models.download import DEMO_FOLDER, Silent, resolve

COMMIT = "c" * 40
MODEL = "someone/tiny"
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 2000,
    "model.gguf": b"other format",
    "original/model.safetensors": b"other precision",
}


@dataclass
class Hub:
    """What the stand-in serves, and how it misbehaves."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    num_cuts: int = 0
    stall_s: float = 0.0
    num_stalls: int = 0
    announced_extra: int = 0
    ranges: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if hub.status is not None:
            return self.reply(hub.status, b"", hub.headers)
        if path.startswith("/api/models/"):
            if f"/{MODEL}" not in path:
                return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            if "/revision/" in path and path.rpartition("/")[2] not in ("main", COMMIT):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            body = {
                "id": MODEL,
                "modelId": MODEL,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "siblings": [
                    {"rfilename": name, "size": len(data) + hub.announced_extra} for name, data in hub.files.items()
                ],
            }
            return self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in hub.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.send_file(name)

    def send_file(self, name: str) -> None:
        hub, data = self.hub, self.hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.reply(200, data, headers)
        hub.fetched.append(name)
        start = 0
        if "Range" in self.headers:
            hub.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(rest))}.items():
            self.send_header(key, value)
        self.end_headers()
        if name == "model.safetensors" and hub.num_stalls > 0:
            hub.num_stalls -= 1
            time.sleep(hub.stall_s)
        if name == "model.safetensors" and hub.num_cuts > 0:
            hub.num_cuts -= 1
            self.wfile.write(rest[: hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            return None
        self.wfile.write(rest)
        return None

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def fetch(hub, tmp_path):
    waits: list[float] = []

    def call(model: str = MODEL, **options) -> Path:
        return resolve(
            model,
            **{"endpoint": hub.url, "cache_dir": tmp_path / "cache", "retries": 2, "sleep": waits.append, **options},
        )

    call.waits = waits
    return call


class Watcher(Silent):
    def __init__(self) -> None:
        self.total = self.done = 0
        self.notes: list[str] = []

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.total, self.done = total_bytes, done_bytes

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_model_arrives_whole_and_without_what_serving_does_not_need(hub, fetch):
    watcher = Watcher()
    folder = fetch(progress=watcher)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")
    }
    assert watcher.done == watcher.total == sum(len(path.read_bytes()) for path in folder.iterdir())


def test_the_second_time_nothing_is_fetched(hub, fetch):
    first = fetch()
    hub.fetched.clear()
    assert fetch() == first
    assert hub.fetched == []


def test_a_transfer_that_is_cut_off_goes_on_at_the_byte_where_it_broke(hub, fetch):
    # huggingface_hub writes 10 MiB at a time, so that is what can have been kept.
    hub.files["model.safetensors"] = data = os.urandom(2**20) * 11
    hub.cut_after, hub.num_cuts = 10 * 2**20 + 5, 1
    folder = fetch()
    assert (folder / "model.safetensors").read_bytes() == data
    assert hub.ranges == [f"bytes={10 * 2**20}-"]


def test_without_retries_a_transfer_that_is_cut_off_is_over(hub, fetch):
    hub.cut_after, hub.num_cuts = 100_000, 1
    with pytest.raises(ModelLoadError, match="model.safetensors of someone/tiny broke off .* run the command again"):
        fetch(retries=0)
    assert not hub.ranges and hub.fetched.count("model.safetensors") == 1
    assert (fetch(retries=0) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_without_retries_one_silence_is_enough(hub, fetch):
    hub.stall_s, hub.num_stalls = 1.0, 1
    with pytest.raises(ModelLoadError, match="was silent for 0.2 s"):
        fetch(retries=0, timeout_s=0.2)
    assert hub.fetched.count("model.safetensors") == 1


def test_a_silent_connection_times_out_and_is_tried_again(hub, fetch):
    hub.stall_s, hub.num_stalls = 1.0, 1
    folder = fetch(timeout_s=0.2)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.fetched.count("model.safetensors") == 2


def test_server_errors_are_repeated_later_and_later_and_then_explained(hub, fetch):
    hub.status = 503
    watcher = Watcher()
    with pytest.raises(ModelLoadError, match=r"answered 503 for someone/tiny; try again later\.$"):
        fetch(progress=watcher)
    assert fetch.waits == [2.0, 4.0]
    assert len(watcher.notes) == 2


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at"),
        (403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at"),
        (404, {"X-Error-Code": "RepoNotFound"}, "was not found at"),
        (401, {}, "HF_TOKEN"),
        (403, {}, "HF_TOKEN"),
    ],
)
def test_what_trying_again_cannot_mend_is_said_at_once(hub, fetch, status, headers, sentence):
    hub.status, hub.headers = status, headers
    with pytest.raises(ModelLoadError, match=sentence) as caught:
        fetch()
    assert "\n" not in str(caught.value)
    assert fetch.waits == []


def test_an_unknown_revision_is_named(fetch):
    with pytest.raises(ModelLoadError, match="someone/tiny has no revision v9"):
        fetch(revision="v9")


def test_a_pinned_commit_is_fetched(fetch):
    assert fetch(revision=COMMIT).name == COMMIT


def test_a_file_of_the_wrong_size_is_refused(hub, fetch):
    hub.announced_extra = 7
    with pytest.raises(ModelLoadError, match="arrived with the wrong size"):
        fetch(retries=1)


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(hub, fetch):
    del hub.files["model.safetensors"]
    with pytest.raises(ModelLoadError, match="holds no safetensors weights"):
        fetch()
    assert hub.fetched == []


def test_too_little_disk_is_said_with_both_numbers(hub, fetch, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ModelLoadError, match=r"needs 0\.5 MiB of disk, but .* has 0\.0 MiB free"):
        fetch()
    assert hub.fetched == []


def test_a_disk_that_fills_up_meanwhile_is_explained(hub, fetch, monkeypatch):
    def full(self, *args: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", full)
    with pytest.raises(ModelLoadError, match="filled up; make room"):
        fetch()


def test_an_unreachable_hub_is_explained(fetch):
    with pytest.raises(ModelLoadError, match=r"http://127\.0\.0\.1:9 cannot be reached for someone/tiny"):
        fetch(endpoint="http://127.0.0.1:9")


def test_an_unreachable_hub_does_not_matter_when_the_model_is_cached(fetch):
    folder = fetch()
    watcher = Watcher()
    assert fetch(endpoint="http://127.0.0.1:9", progress=watcher) == folder
    assert "cached copy" in watcher.notes[0]


def test_offline_uses_the_cache_and_nothing_else(hub, fetch):
    with pytest.raises(ModelLoadError, match="not in the local cache; run `vllm-mlx download someone/tiny`"):
        fetch(offline=True)
    folder = fetch()
    hub.status = 500
    assert fetch(offline=True) == folder


def test_a_download_that_was_interrupted_is_not_taken_for_whole_and_keeps_what_came(hub, fetch):
    hub.cut_after, hub.num_cuts = 0, 100
    with pytest.raises(ModelLoadError, match="model.safetensors of someone/tiny"):
        fetch(retries=0)
    with pytest.raises(ModelLoadError, match="not in the local cache"):
        fetch(offline=True)
    hub.num_cuts = 0
    hub.fetched.clear()
    fetch()
    assert hub.fetched == ["model.safetensors"]


def test_a_local_folder_is_itself_and_the_hub_is_not_asked(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path.resolve()
    assert resolve(os.path.relpath(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/nothing-here", "a/b/c", "../up", "bad name"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name):
    with pytest.raises(ModelLoadError, match="There is no folder"):
        resolve(name)


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="name the model's folder"):
        resolve(str(file))


def test_the_built_in_model_needs_no_network(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(download, "DEMO_FOLDER", tmp_path)
    assert resolve("demo", offline=True) == tmp_path
    assert DEMO_FOLDER.name == "demo"
