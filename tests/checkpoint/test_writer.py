import errno
import hashlib
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from alphaquant.checkpoint import (
    read_safetensors,
    shard,
    write_bytes,
    write_index,
    write_json,
    write_shard,
    write_text,
    writer,
)
from alphaquant.errors import OutputError

from .test_reader import random_tensor, same

TENSORS = {f"t.{name}": random_tensor(3, 5, dtype=dtype) for name, dtype in shard.DTYPES.items()}


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def files_in(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_shard_loads_with_safetensors_and_with_ours(tmp_path):
    path = tmp_path / "layer-0.safetensors"
    tensors = {**TENSORS, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "é": torch.ones(1)}
    info = write_shard(path, tensors, {"format": "pt", "a": "ü"})
    for loaded in (load_file(path), read_safetensors(path)):
        assert loaded.keys() == tensors.keys()
        assert all(same(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ü"}
    assert info.name == "layer-0.safetensors"
    assert info.num_bytes == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(info.tensor_names) == sorted(tensors)
    assert list(files_in(tmp_path)) == ["layer-0.safetensors"]


def test_tensors_are_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    write_shard(path, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3, dtype=torch.float64)}, {"k": "v"})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    for slot in shard.load_shard(path).slots.values():
        assert slot.offset % slot.info.dtype.itemsize == 0


def test_shard_is_the_same_byte_for_byte(tmp_path):
    write_shard(tmp_path / "1", TENSORS, {"a": "1", "b": "2"})
    write_shard(tmp_path / "2", {name: TENSORS[name] for name in reversed(TENSORS)}, {"b": "2", "a": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_shard_of_strided_tensors_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 64)
    tensor = torch.randn(12, 40)
    tensors = {"t": tensor.T, "s": tensor[:, ::3], "e": torch.ones(1).expand(5, 7), "p": torch.nn.Parameter(tensor)}
    info = write_shard(tmp_path / "x", tensors, {})
    loaded = load_file(tmp_path / "x")
    assert all(loaded[name].equal(tensors[name]) for name in tensors)
    assert info.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shard_of_gpu_tensors(tmp_path):
    write_shard(tmp_path / "1", {name: tensor.cuda() for name, tensor in TENSORS.items()}, {})
    write_shard(tmp_path / "2", TENSORS, {})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.tuples(st.sampled_from(list(shard.DTYPES.values())), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_any_tensors_come_back(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    tensors = {name: random_tensor(*shape, dtype=dtype) for name, (dtype, shape) in specs.items()}
    write_shard(path, tensors, {})
    for loaded in (load_file(path), read_safetensors(path)):
        assert loaded.keys() == tensors.keys()
        assert all(same(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("tensors", [{"w": torch.zeros(2, dtype=torch.complex64)}, {"__metadata__": torch.ones(1)}])
def test_shard_refuses_what_does_not_fit(tmp_path, tensors):
    with pytest.raises(OutputError) as info:
        write_shard(tmp_path / "x", tensors, {})
    assert next(iter(tensors)) in info.value.what
    assert info.value.remedy
    assert files_in(tmp_path) == {}


WRITES = {
    "shard": lambda path: write_shard(path, TENSORS, {}),
    "json": lambda path: write_json(path, {"a": 1}),
    "text": lambda path: write_text(path, "hello"),
    "bytes": lambda path: write_bytes(path, b"hello"),
    "index": lambda path: write_index(path, {"a": "b"}, 1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("old", [None, b"old"])
def test_failure_leaves_no_trace(tmp_path, monkeypatch, write, old):
    path = tmp_path / "file"
    if old:
        path.write_bytes(old)
    monkeypatch.setattr(writer.os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OutputError, match="disk is full") as info:
        write(path)
    assert info.value.where == str(path)
    assert "free space" in info.value.remedy
    assert files_in(tmp_path) == ({"file": old} if old else {})


def test_failure_in_the_middle_of_a_shard(tmp_path, monkeypatch):
    seen = []

    def iter_chunks(tensor, limit):
        seen.extend(files_in(tmp_path))
        if len(seen) > 3:
            failing(errno.EIO)()
        return shard.iter_chunks(tensor, limit)

    monkeypatch.setattr(writer, "iter_chunks", iter_chunks)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        write_shard(tmp_path / "x.safetensors", TENSORS, {})
    assert set(seen) == {"x.safetensors.tmp"}  # never the final name before the end
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_no_trace_and_stays_itself(tmp_path, monkeypatch, error):
    def iter_chunks(tensor, limit):
        raise error

    monkeypatch.setattr(writer, "iter_chunks", iter_chunks)
    with pytest.raises(error):
        write_shard(tmp_path / "x.safetensors", TENSORS, {})
    assert files_in(tmp_path) == {}


def test_file_is_synced_before_it_is_named_and_its_directory_after(tmp_path, monkeypatch):
    events = []

    def fsync(descriptor):
        is_file = (tmp_path / "file.tmp").exists() and os.path.samestat(
            os.fstat(descriptor), (tmp_path / "file.tmp").stat()
        )
        events.append(("file" if is_file else "directory", (tmp_path / "file").exists()))

    monkeypatch.setattr(writer.os, "fsync", fsync)
    write_bytes(tmp_path / "file", b"x")
    assert events == [("file", False), ("directory", True)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_file_system_that_cannot_sync_a_directory(tmp_path, monkeypatch, number):
    def fsync(_):
        if (tmp_path / "file").exists():  # it has its name: now the directory is synced
            failing(number)()

    monkeypatch.setattr(writer.os, "fsync", fsync)
    if number == errno.EINVAL:
        write_bytes(tmp_path / "file", b"x")
    else:
        with pytest.raises(OutputError):
            write_bytes(tmp_path / "file", b"x")
    assert files_in(tmp_path) == {"file": b"x"}


def test_no_such_directory(tmp_path):
    with pytest.raises(OutputError, match="cannot be written") as info:
        write_shard(tmp_path / "none" / "x", TENSORS, {})
    assert "exists" in info.value.remedy


def test_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": ["é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == 1
    write_json(path, {"a": float("inf")}, allow_nan=True)
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == float("inf")


def test_text_and_index(tmp_path):
    write_text(tmp_path / "t", "é\n")
    assert (tmp_path / "t").read_bytes() == "é\n".encode()
    write_index(tmp_path / "i.json", {"b": "2.safetensors", "a": "1.safetensors"}, 12)
    index = json.loads((tmp_path / "i.json").read_text())
    assert index == {"metadata": {"total_size": 12}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    assert list(index["weight_map"]) == ["a", "b"]
