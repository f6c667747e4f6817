"""Models by hub id: a local stand-in for the hub tells what is asked of it; a prepared cache needs no network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from alphaquant.checkpoint import Checkpoint, open_model, resolve_model
from alphaquant.cli import app
from alphaquant.errors import CheckpointError
from pipeline import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"README.md", "config.json", "tokenizer.json", "model.safetensors.index.json", "part-0.safetensors",
          "part-1.safetensors"}  # fmt: skip
STATE = "which commit is the newest"
NOT_NEEDED = ("LICENSE.txt", "pytorch_model.bin", "model.gguf", "consolidated.safetensors", "adapter_model.safetensors",
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
    for name in ("README.md", *NOT_NEEDED):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    return directory


class Handler(BaseHTTPRequestHandler):
    """A stand-in for the hub: it serves one repository, and notes what is fetched."""

    repository: Path
    fetched: list[str]

    def do_GET(self):
        if self.path.startswith("/api/models/org/name/tree/"):
            paths = [path for path in self.repository.rglob("*") if path.is_file()]
            self.give_json([self.entry(path) for path in paths])
        elif self.path.startswith("/api/models/org/name"):
            siblings = [
                {"rfilename": path.relative_to(self.repository).as_posix()}
                for path in self.repository.rglob("*")
                if path.is_file()
            ]
            self.fetched.append(STATE)
            self.give_json({"id": "org/name", "sha": COMMIT, "siblings": siblings})
        else:
            self.do_HEAD(body=True)

    def do_HEAD(self, *, body: bool = False):
        before, _, name = self.path.partition(f"/resolve/{COMMIT}/")
        if before != "/org/name" or not (self.repository / name).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = (self.repository / name).read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        sent = data if part is None else data[int(part[1]) : int(part[2]) + 1]
        self.send_response(200 if part is None else 206)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if body:
            self.fetched.append(name if len(sent) == len(data) else f"{len(sent)} bytes of {name}")
            self.wfile.write(sent)

    def do_POST(self):
        asked = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        assert self.path == f"/api/models/org/name/paths-info/{COMMIT}"
        paths = [self.repository / name for name in asked.get("paths", ())]
        self.give_json([self.entry(path) for path in paths if path.is_file()])

    def entry(self, path: Path) -> dict[str, object]:
        data = path.read_bytes()
        name = path.relative_to(self.repository).as_posix()
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


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """A stand-in for the hub, an empty cache, and the list of files that were fetched."""
    fetched: list[str] = []

    handler = type("Bound", (Handler,), {"repository": repository, "fetched": fetched})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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


@pytest.mark.parametrize("shards", [1, 2])
def test_of_a_model_to_be_looked_at_headers_are_enough(hub, repository, monkeypatch, shards):
    monkeypatch.setattr("alphaquant.checkpoint.hub._BLOCK_BYTES", 512)
    if shards == 1:
        for name in ("model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors", "old.safetensors"):
            (repository / name).unlink()
        tiny.write_model(repository, "olmoe")
    seen, truth = open_model("org/name"), Checkpoint.open(repository)
    assert seen.names() == truth.names()
    assert [seen.info(name) for name in seen.names()] == [truth.info(name) for name in truth.names()]
    assert seen.header_digest() == truth.header_digest()
    whole = {name for name in hub if " bytes of " not in name and name != STATE}
    assert whole == {name for name in NEEDED if "part" not in name and (shards == 2 or "index" not in name)}
    parts = [int(name.split()[0]) for name in hub if " bytes of " in name]
    assert 0 < sum(parts) < 0.2 * truth.total_bytes
    with pytest.raises(CheckpointError, match="cannot be read"):
        seen.read(seen.names()[0])


def test_shards_in_the_cache_are_looked_at_there(hub, monkeypatch):
    directory = resolve_model("org/name")
    hub.clear()
    assert open_model("org/name").header_digest() == Checkpoint.open(directory).header_digest()
    assert hub == [STATE]
    (directory / "part-1.safetensors").unlink()
    assert open_model("org/name").header_digest()
    assert {name.split()[-1] for name in hub} == {"newest", "part-1.safetensors"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "part-1.safetensors" in error_of(open_model, "org/name").what


def test_looking_says_what_fetching_says(hub, repository, monkeypatch):
    for path in (str(repository / "config.json"), "just-a-name", "org/other"):
        assert error_of(open_model, path).lines() == error_of(resolve_model, path).lines()
    (repository / "part-1.safetensors").write_bytes(b"short")
    assert "part-1.safetensors is no valid safetensors file" in error_of(open_model, "org/name").what
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Connect" in error_of(open_model, "org/name").what


@pytest.mark.parametrize("verb", ["inspect", "plan", "quantize"])
def test_commands_that_only_look_fetch_no_weights(hub, monkeypatch, verb):
    monkeypatch.setattr("alphaquant.checkpoint.hub._BLOCK_BYTES", 512)
    plan = [] if verb == "inspect" else ["--scheme", "int4:g32"]
    plan += ["--dry-run", "-o", "OUT"] if verb == "quantize" else []
    done = CliRunner().invoke(app, [verb, "org/name", *plan])
    assert done.exit_code == 0, done.output
    assert {"part-0.safetensors", "part-1.safetensors"} & set(hub) == set()
    assert any(name.endswith(" bytes of part-1.safetensors") for name in hub)


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
    assert sorted(hub) == ["README.md", "config.json", "model.safetensors", "tokenizer.json", STATE]


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
