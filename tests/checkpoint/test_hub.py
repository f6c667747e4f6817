"""Models by hub id: a local stand-in for the hub tells what is asked of it; a prepared cache needs no network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from alphaquant.checkpoint import Checkpoint, resolve_model
from alphaquant.errors import CheckpointError
from pipeline import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"config.json", "tokenizer.json", "model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors"}
STATE = "which commit is the newest"
NOT_NEEDED = ("README.md", "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "adapter_model.safetensors",
              "trainer_state.json", "old.safetensors", "onnx/model.safetensors", "modeling.py")  # fmt: skip


def error_of(call, *args):
    with pytest.raises(CheckpointError) as info:
        call(*args)
    assert info.value.where
    assert info.value.remedy
    return info.value


def test_local_directory(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == Path(tmp_path)


def test_local_wins_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")


def test_what_is_neither(tmp_path):
    assert "no model directory" in error_of(resolve_model, str(tmp_path / "none")).what
    assert "no model directory" in error_of(resolve_model, "just-a-name").what


@pytest.fixture
def repository(tmp_path):
    """What the stand-in holds: a sharded model, and much that nobody needs."""
    directory = tiny.write_model(tmp_path / "repository", "olmoe", shards=2)
    for name in NOT_NEEDED:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    return directory


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """A stand-in for the hub, an empty cache, and the list of files that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/api/models/org/name/tree/"):
                paths = [path for path in repository.rglob("*") if path.is_file()]
                self.give_json([self.entry(path) for path in paths])
            elif self.path.startswith("/api/models/org/name"):
                siblings = [
                    {"rfilename": path.relative_to(repository).as_posix()}
                    for path in repository.rglob("*")
                    if path.is_file()
                ]
                fetched.append(STATE)
                self.give_json({"id": "org/name", "sha": COMMIT, "siblings": siblings})
            else:
                self.do_HEAD(body=True)

        def do_HEAD(self, *, body: bool = False):
            before, _, name = self.path.partition(f"/resolve/{COMMIT}/")
            if before != "/org/name" or not (repository / name).is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = (repository / name).read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                fetched.append(name)
                self.wfile.write(data)

        def entry(self, path: Path) -> dict[str, object]:
            data = path.read_bytes()
            name = path.relative_to(repository).as_posix()
            return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

        def give_json(self, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield fetched
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_what_is_needed_is_fetched_and_only_once(hub, repository, monkeypatch):
    directory = resolve_model("org/name")
    assert sorted(hub) == sorted([STATE, *NEEDED]), "one state of the repository, though it is asked twice"
    assert {path.name for path in directory.iterdir()} == NEEDED
    assert Checkpoint.open(directory).names() == Checkpoint.open(repository_without_others(repository)).names()
    hub.clear()
    assert resolve_model("org/name") == directory
    assert hub == [STATE]
    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/name") == directory
    assert hub == []


def repository_without_others(repository: Path) -> Path:
    for name in NOT_NEEDED:
        (repository / name).unlink()
    return repository


def test_a_model_without_an_index(hub, repository):
    (repository / "model.safetensors.index.json").unlink()
    (repository / "part-0.safetensors").unlink()
    (repository / "part-1.safetensors").rename(repository / "model.safetensors")
    (repository / "old.safetensors").unlink()
    resolve_model("org/name")
    assert sorted(hub) == ["config.json", "model.safetensors", "tokenizer.json", STATE]


def test_a_broken_index_is_named(hub, repository):
    (repository / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "is no plain name" in error_of(resolve_model, "org/name").what
    assert "part-0.safetensors" not in hub


def test_a_model_that_the_hub_lacks(hub):
    error = error_of(resolve_model, "org/other")
    assert "'org/other'" in error.what
    assert "\n" not in error.what
    assert "local model directory" in error.remedy


def test_offline_without_a_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = error_of(resolve_model, "org/name")
    assert "'org/name'" in error.what
    assert "HF_HUB_OFFLINE" in error.what
    assert "local model directory" in error.remedy
    assert hub == []


def test_no_route_to_the_hub(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = error_of(resolve_model, "org/name")
    assert "Connect" in error.what
    assert "\n" not in error.what


def test_the_command_works_from_a_prepared_cache(tmp_path):
    """As a user has it: the cache of an earlier download, and the switch in the environment."""
    home = tmp_path / "home"
    repository = home / "hub" / "models--org--name"
    snapshot = tiny.write_model(repository / "snapshots" / COMMIT, "olmoe", shards=2)
    blobs = repository / "blobs"
    blobs.mkdir()
    for path in snapshot.iterdir():  # the cache is made of links
        blob = path.rename(blobs / hashlib.sha1(path.read_bytes()).hexdigest())
        path.symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    done = subprocess.run(
        [sys.executable, "-m", "alphaquant", "inspect", "org/name", "--json"],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "olmoe"
