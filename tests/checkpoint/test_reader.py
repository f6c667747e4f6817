import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alphaquant.checkpoint import Checkpoint, read_safetensors, resolve_model, shard
from alphaquant.errors import CheckpointError

DTYPES = list(shard.DTYPES.values())


def random_tensor(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def same(a, b):
    """Equal bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a).equal(as_bytes(b))


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def make_dir(path, tensors=None, name="model.safetensors", config="{}"):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    if tensors is not None:
        save_file(tensors, path / name)
    return path


def raw_file(header, data=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(*offsets, dtype="U8", shape=(4,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def error_of(call, *args):
    with pytest.raises(CheckpointError) as info:
        call(*args)
    assert info.value.where
    assert info.value.remedy
    return info.value


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# What is read.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 0, 3), (2, 3, 4)], ids=str)
def test_reads_what_safetensors_wrote(tmp_path, dtype, shape):
    tensor = random_tensor(*shape, dtype=dtype)
    odd = torch.tensor([1, 2, 3], dtype=torch.uint8)
    directory = make_dir(tmp_path / "m", {"odd": odd, "w": tensor})
    checkpoint = Checkpoint.open(directory)
    read = checkpoint.read("w")
    assert same(read, tensor)
    assert same(read, load_file(directory / "model.safetensors")["w"])
    assert checkpoint.info("w").dtype == dtype
    assert checkpoint.info("w").shape == shape
    assert checkpoint.info("w").num_bytes == tensor.nbytes
    assert checkpoint.total_bytes == tensor.nbytes + 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_into_a_slice_of_another_dtype(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(shard, "CHUNK_BYTES", 64)  # several chunks, and rows wider than one
    tensor = torch.randn(6, 40, dtype=dtype) if dtype == torch.float64 else random_tensor(6, 40, dtype=dtype)
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", {"w": tensor}))
    stacked = torch.zeros(3, 6, 40, dtype=torch.float32)
    checkpoint.read_into("w", stacked[1])
    assert torch.equal(stacked[1].nan_to_num(), tensor.to(torch.float32).nan_to_num())
    assert stacked[0].count_nonzero() == 0
    assert stacked[2].count_nonzero() == 0


def test_read_into_places_of_any_stride(tmp_path, monkeypatch):
    tensor = torch.randn(6, 40)
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", {"w": tensor}))
    contiguous, transposed, sliced = torch.zeros(6, 40), torch.zeros(40, 6), torch.zeros(6, 80)
    checkpoint.read_into("w", contiguous)
    checkpoint.read_into("w", transposed.T)
    monkeypatch.setattr(shard, "CHUNK_BYTES", 64)
    checkpoint.read_into("w", sliced[:, ::2])
    assert contiguous.equal(tensor)
    assert transposed.T.equal(tensor)
    assert sliced[:, ::2].equal(tensor)
    assert sliced[:, 1::2].count_nonzero() == 0


def test_read_into_a_parameter_that_wants_gradients(tmp_path):
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", {"w": torch.ones(2, 3)}))
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    checkpoint.read_into("w", parameter)
    assert parameter.detach().equal(torch.ones(2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_read_into_a_gpu(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(shard, "CHUNK_BYTES", 64)
    tensor = torch.randn(6, 40).bfloat16()
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", {"w": tensor}))
    stacked = torch.zeros(3, 6, 40, dtype=dtype, device="cuda")
    checkpoint.read_into("w", stacked[1])
    assert stacked[1].cpu().equal(tensor.to(dtype))
    assert stacked[0].count_nonzero() == 0


def test_read_goes_in_several_system_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_MAX_READ_BYTES", 7)
    tensor = random_tensor(3, 11, dtype=torch.int32)
    assert same(Checkpoint.open(make_dir(tmp_path / "m", {"w": tensor})).read("w"), tensor)


@given(shape=st.lists(st.integers(0, 5), max_size=4), limit=st.integers(1, 40), flip=st.booleans())
def test_chunks_cover_a_tensor_in_order(shape, limit, flip):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    if flip:
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    parts = list(shard.iter_chunks(tensor, limit))
    assert all(0 < part.numel() <= limit for part in parts)
    assert [x for part in parts for x in part.flatten().tolist()] == tensor.flatten().tolist()


def test_sharded_index_decides(tmp_path):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(2)}, "x-1.safetensors", '{"model_type": "tiny"}')
    save_file({"b": torch.zeros(3), "a": torch.zeros(2), "unlisted": torch.zeros(1)}, directory / "x-2.safetensors")
    save_file({"other": torch.zeros(1)}, directory / "model.safetensors")
    write_index(directory, {"b": "x-2.safetensors", "a": "x-1.safetensors"})
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.names() == ("a", "b")
    assert checkpoint.read("a").equal(torch.ones(2))
    assert "b" in checkpoint
    assert "other" not in checkpoint
    assert checkpoint.config == {"model_type": "tiny"}
    assert checkpoint.path == directory


def test_model_safetensors_wins_over_other_files(tmp_path):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(2)})
    save_file({"a": torch.zeros(2)}, directory / "adapter.safetensors")
    assert Checkpoint.open(directory).read("a").equal(torch.ones(2))


def test_without_index_all_files_count(tmp_path):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(2)}, "one.safetensors")
    assert Checkpoint.open(directory).names() == ("a",)
    save_file({"b": torch.ones(2)}, directory / "two.safetensors")
    assert Checkpoint.open(directory).names() == ("a", "b")
    save_file({"a": torch.ones(2)}, directory / "three.safetensors")
    error = error_of(Checkpoint.open, directory)
    assert "'a'" in error.what
    assert "one.safetensors" in error.what
    assert "three.safetensors" in error.what


def test_symlinked_files_as_in_the_hub_cache(tmp_path):
    blobs = make_dir(tmp_path / "blobs", {"a": torch.ones(2)}, "0123abcd")
    directory = tmp_path / "snapshots" / "main"
    directory.mkdir(parents=True)
    (directory / "config.json").symlink_to(blobs / "config.json")
    (directory / "x-1.safetensors").symlink_to("../../blobs/0123abcd")
    write_index(directory, {"a": "x-1.safetensors"})
    assert Checkpoint.open(directory).read("a").equal(torch.ones(2))


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize(
    "leads_to", ["../private.safetensors", "{}/private.safetensors", "sub/../../private.safetensors"]
)
def test_links_out_of_the_directory_are_refused(tmp_path, is_indexed, leads_to):
    directory = make_dir(tmp_path / "m")
    (directory / "sub").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "private.safetensors")
    (directory / "x.safetensors").symlink_to(leads_to.format(tmp_path))
    if is_indexed:
        write_index(directory, {"a": "x.safetensors"})
    error = error_of(Checkpoint.open, directory)
    assert "is a link out of the checkpoint directory" in error.what
    assert "private.safetensors" in error.what
    (directory / "x.safetensors").unlink()
    save_file({"a": torch.ones(2)}, directory / "sub" / "y.safetensors")
    (directory / "x.safetensors").symlink_to("sub/y.safetensors")
    assert Checkpoint.open(directory).names() == ("a",)


def test_header_digest_tells_checkpoints_apart(tmp_path):
    first = Checkpoint.open(make_dir(tmp_path / "1", {"a": torch.ones(2)})).header_digest()
    again = Checkpoint.open(make_dir(tmp_path / "2", {"a": torch.ones(2)})).header_digest()
    renamed = Checkpoint.open(make_dir(tmp_path / "3", {"b": torch.ones(2)})).header_digest()
    longer = Checkpoint.open(make_dir(tmp_path / "4", {"a": torch.ones(3)})).header_digest()
    config = Checkpoint.open(make_dir(tmp_path / "5", {"a": torch.ones(2)}, config='{"x": 1}')).header_digest()
    assert first == again
    assert len({first, renamed, longer, config}) == 4


def test_threads_read_the_same_file(tmp_path):
    tensors = {str(i): random_tensor(64, 33, dtype=torch.int16, seed=i) for i in range(20)}
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", tensors))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(checkpoint.read, list(tensors) * 5))
    assert all(same(a, b) for a, b in zip(read, list(tensors.values()) * 5, strict=True))


def test_reads_leave_no_handle_open(tmp_path):
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", {"a": torch.ones(2)}))
    before = os.dup(0)  # the lowest free descriptor
    os.close(before)
    for _ in range(3):
        checkpoint.read("a")
    after = os.dup(0)
    os.close(after)
    assert before == after


MEMORY_PROBE = r"""
import json, re, sys, torch
from alphaquant.checkpoint import Checkpoint
def peak():
    # Not ru_maxrss, which a child process inherits.
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
checkpoint = Checkpoint.open(sys.argv[1])
out = torch.zeros(5 << 20, dtype=torch.bfloat16)
checkpoint.read_into("0", out)
before = peak()
total, mapped = 0.0, False
for name in checkpoint.names():
    tensor = checkpoint.read(name)
    total += float(tensor[0])
    mapped |= "model.safetensors" in open("/proc/self/maps").read()
    del tensor
    checkpoint.read_into(name, out)
print(json.dumps([peak() - before, total, mapped]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_memory_is_that_of_one_tensor(tmp_path):
    num, size = 10, 20 << 20  # 200 MB, sparse on the disk
    header = {str(i): entry(i * size, (i + 1) * size, dtype="F32", shape=(size // 4,)) for i in range(num)}
    directory = make_dir(tmp_path / "m")
    head = raw_file(header)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + num * size)
    # glibc keeps freed blocks of up to 32 MB for later; told not to, the peak is what the reader holds.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **malloc, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    growth, total, mapped = json.loads(run.stdout)
    assert total == 0.0
    assert not mapped
    assert growth < 1.5 * size


# Broken directories.


def test_path_does_not_exist(tmp_path):
    assert "does not exist" in error_of(Checkpoint.open, tmp_path / "none").what


def test_path_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "not a directory" in error_of(Checkpoint.open, tmp_path / "file").what
    assert "not a directory" in error_of(resolve_model, tmp_path / "file").what


def test_directory_that_the_system_does_not_let_us_see(tmp_path, monkeypatch):
    def is_dir(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", is_dir)
    for call in (Checkpoint.open, resolve_model):
        assert "Permission denied" in error_of(call, tmp_path).what


def test_no_config(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "config.json" in error_of(Checkpoint.open, tmp_path).what


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "list, not an object"),
        ("\x00", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (" " * 10_000_001, "more than"),
    ],
    ids=["cut", "list", "nul", "deep", "huge"],
)
def test_broken_config(tmp_path, config, says):
    error = error_of(Checkpoint.open, make_dir(tmp_path / "m", {"a": torch.ones(2)}, config=config))
    assert "config.json" in error.what
    assert says in error.what


def test_config_in_latin_1(tmp_path):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(2)})
    (directory / "config.json").write_bytes(b'{"name": "\xe9"}')
    assert "not valid JSON" in error_of(Checkpoint.open, directory).what


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, name):
    directory = make_dir(tmp_path / "m")
    (directory / name).write_bytes(b"\x80\x04.")
    error = error_of(Checkpoint.open, directory)
    assert name in error.what
    assert "safe_serialization=True" in error.remedy
    save_file({"a": torch.ones(2)}, directory / "model.safetensors")
    assert Checkpoint.open(directory).names() == ("a",)


def test_no_weights(tmp_path):
    assert "no *.safetensors" in error_of(Checkpoint.open, make_dir(tmp_path / "m")).what


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no plain name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "not there"),
        ('{"weight_map": {"z": "x.safetensors"}}', "does not hold it"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "no plain name"),
    ],
)
def test_broken_index(tmp_path, content, says):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(2)}, "x.safetensors")
    (directory / "model.safetensors.index.json").write_text(content)
    error = error_of(Checkpoint.open, directory)
    assert says in error.what
    assert error.where.endswith("model.safetensors.index.json")


@pytest.mark.parametrize(
    "path",
    [
        "../outside.safetensors",
        "sub/x.safetensors",
        "./x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
    ],
)
def test_index_may_not_leave_the_directory(tmp_path, path):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(2)}, "x.safetensors")
    (directory / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", directory / "sub" / "x.safetensors"):
        save_file({"a": torch.ones(2)}, place)
    write_index(directory, {"a": path})
    assert "no plain name" in error_of(Checkpoint.open, directory).what
    write_index(directory, {"a": str(tmp_path / "outside.safetensors")})
    assert "no plain name" in error_of(Checkpoint.open, directory).what


def test_shard_is_a_dangling_link(tmp_path):
    directory = make_dir(tmp_path / "m")
    (directory / "x.safetensors").symlink_to("nowhere")
    write_index(directory, {"a": "x.safetensors"})
    assert "not there" in error_of(Checkpoint.open, directory).what


def test_unknown_tensor_did_you_mean(tmp_path):
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", {"layers.0.q_proj.weight": torch.ones(2)}))
    for call in (checkpoint.info, checkpoint.read):
        error = error_of(call, "layers.0.q_porj.weight")
        assert "'layers.0.q_porj.weight'" in error.what
        assert "did you mean 'layers.0.q_proj.weight'?" in error.remedy
    assert "did you mean" not in error_of(checkpoint.read, "zzz").remedy
    error_of(checkpoint.read_into, "zzz", torch.zeros(2))


def test_read_into_another_shape(tmp_path):
    checkpoint = Checkpoint.open(make_dir(tmp_path / "m", {"w": torch.ones(2, 3)}))
    error = error_of(checkpoint.read_into, "w", torch.zeros(3, 2))
    assert "[2, 3]" in error.what
    assert "[3, 2]" in error.what


# Broken shards.


GOOD = {"a": entry(0, 4), "b": entry(4, 8)}
BROKEN = {
    "empty": (b"", "header of 0 bytes"),
    "short": (b"\x02\x00", "header of 2 bytes"),
    "length beyond the file": (raw_file(b"{}")[:-1], "header of 2 bytes"),
    "huge length": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "flipped header": (raw_file(json.dumps(GOOD).encode().replace(b"{", b"\xfb", 1), bytes(8)), "not valid JSON"),
    "header is no object": (raw_file([1]), "no JSON object"),
    "deep header": (raw_file(b"[" * 100_000), "not valid JSON"),
    "duplicate key": (raw_file(b'{"a":1,"a":1}'), "'a' occurs twice"),
    "metadata": (raw_file({"__metadata__": {"x": 1}}), "__metadata__"),
    "entry is no object": (raw_file({"a": 1}), "not described"),
    "entry without shape": (raw_file({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4)), "not described"),
    "unknown dtype": (raw_file({"a": entry(0, 4, dtype="C64")}, bytes(4)), "'C64'"),
    "dtype is a list": (raw_file({"a": entry(0, 4, dtype=["U8"])}, bytes(4)), "['U8']"),
    "negative dim": (raw_file({"a": entry(0, 4, shape=(-2, -2))}, bytes(4)), "impossible shape"),
    "fractional dim": (raw_file({"a": entry(0, 4, shape=(4.0,))}, bytes(4)), "impossible shape"),
    "boolean dim": (raw_file({"a": entry(0, 1, shape=(True,))}, bytes(1)), "impossible shape"),
    "overflowing shape": (raw_file({"a": entry(0, 0, shape=(0, 1 << 40, 1 << 40))}), "impossible shape"),
    "too many dims": (raw_file({"a": entry(0, 1, shape=(1,) * 65)}, bytes(1)), "impossible shape"),
    "three offsets": (raw_file({"a": entry(0, 4, 4)}, bytes(4)), "impossible data_offsets"),
    "negative offset": (raw_file({"a": entry(-4, 0)}, bytes(4)), "impossible data_offsets"),
    "offsets reversed": (raw_file({"a": entry(4, 0)}, bytes(4)), "impossible data_offsets"),
    "wrong byte count": (raw_file({"a": entry(0, 4, dtype="F32")}, bytes(4)), "takes 16 bytes"),
    "overlap": (raw_file({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "'b' overlaps"),
    "same place": (raw_file({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "overlaps"),
    "gap": (raw_file({"a": entry(0, 4), "b": entry(6, 10)}, bytes(10)), "gap"),
    "not from the start": (raw_file({"a": entry(2, 6)}, bytes(6)), "gap"),
    "out of the file": (raw_file(GOOD, bytes(7)), "'b' ends at byte"),
    "trailing bytes": (raw_file(GOOD, bytes(9)), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_shard(tmp_path, name):
    content, says = BROKEN[name]
    directory = make_dir(tmp_path / "m")
    file = directory / "model.safetensors"
    file.write_bytes(content)
    error = error_of(Checkpoint.open, directory)
    assert says in error.what
    assert error.where == str(file)


def test_header_over_the_limit(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw_file(GOOD, bytes(8)))
    assert read_safetensors(file)["b"].tolist() == [0] * 4
    monkeypatch.setattr(shard, "MAX_HEADER_BYTES", 20)
    assert "a header of" in error_of(read_safetensors, file).what


def test_the_sound_twin_of_the_broken_shards(tmp_path):
    directory = make_dir(tmp_path / "m")
    file = directory / "model.safetensors"
    file.write_bytes(raw_file({**GOOD, "none": entry(4, 4, shape=(0,))}, bytes(range(8))))
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.read("b").tolist() == [4, 5, 6, 7]
    assert checkpoint.read("none").numel() == 0


@given(data=st.data())
def test_flipped_and_cut_bytes(tmp_path_factory, data):
    """Fuzz: a damaged file is a CheckpointError, or the safetensors library reads the same from it."""
    content = bytearray(raw_file({"__metadata__": {"format": "pt"}, **GOOD}, bytes(range(8))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[len(content) - data.draw(st.sampled_from([0, 0, 0, 1, 9])) :]
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    file.write_bytes(content)
    try:
        read = read_safetensors(file)
    except CheckpointError:
        return
    try:
        expected = load_file(file)
    except safetensors.SafetensorError:
        pytest.fail("the reader takes a file that the safetensors library refuses")
    assert read.keys() == expected.keys()
    assert all(same(read[name], expected[name]) for name in read)


def test_truncated_real_file(tmp_path):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(8), "b": torch.ones(8)})
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for keep in (0, 4, 8, 20, len(whole) - 33, len(whole) - 1):
        file.write_bytes(whole[:keep])
        error_of(Checkpoint.open, directory)


def test_file_cut_or_gone_after_opening(tmp_path):
    directory = make_dir(tmp_path / "m", {"a": torch.ones(8)})
    checkpoint = Checkpoint.open(directory)
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    error = error_of(checkpoint.read, "a")
    assert "'a'" in error.what
    error_of(checkpoint.read_into, "a", torch.zeros(8, dtype=torch.float64))
    file.unlink()
    assert "cannot be read" in error_of(checkpoint.read, "a").what


def test_shard_is_a_directory(tmp_path):
    directory = make_dir(tmp_path / "m")
    (directory / "x.safetensors").mkdir()
    assert "cannot be read" in error_of(Checkpoint.open, directory).what
