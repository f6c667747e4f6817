import json

import pytest
import torch

from alphaquant.checkpoint import write_json, write_shard
from alphaquant.errors import CheckpointError
from alphaquant.formats import dequantize
from alphaquant.layouts import LAYOUTS, MODULES_FILE, QuantizedCheckpoint, module_table, open_source

from .samples import assert_same, random_quantized, scheme

Q, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.{}.up_proj"
PLAIN = {
    "model.norm.weight": torch.linspace(0, 1, 64, dtype=torch.bfloat16),
    f"{Q}.bias": torch.linspace(-1, 1, 96),
    "lm_head.weight": torch.arange(128.0).reshape(2, 64).to(torch.bfloat16),
}
WEIGHTS = {
    Q: random_quantized(scheme("int4", 32, symmetric=False), 96, 64),
    EXPERT.format(0): random_quantized(scheme("nvfp4"), 32, 64, 1),
    EXPERT.format(1): random_quantized(scheme("mxfp8"), 32, 64, 2),
    EXPERT.format(2): random_quantized(scheme("int3", -1, dtype=torch.float32), 32, 64, 3),
    EXPERT.format(3): random_quantized(scheme("int8", -1, inputs="int8"), 32, 64, 4),
}
SCHEMES = {name: q.scheme for name, q in WEIGHTS.items()} | {"lm_head": None, "model.norm": None}
SHAPES = {name: tuple(q.codes.shape) for name, q in WEIGHTS.items()}


def write_checkpoint(path, layout, table=None):
    tensors = dict(PLAIN)
    for name, q in WEIGHTS.items():
        tensors |= LAYOUTS[layout].tensors(name, q)
    (path / "alphaquant").mkdir()
    write_json(path / "config.json", {"model_type": "test"})
    write_shard(path / "model.safetensors", tensors, {})
    write_json(path / MODULES_FILE, module_table(SCHEMES, SHAPES, layout) if table is None else table)
    return path


@pytest.mark.parametrize("layout", ["compressed-tensors", "humming"])
def test_a_quantized_checkpoint_reads_as_its_logical_tensors(tmp_path, layout):
    source = open_source(write_checkpoint(tmp_path, layout))
    assert isinstance(source, QuantizedCheckpoint)
    assert source.names() == tuple(sorted([*PLAIN, *(f"{name}.weight" for name in WEIGHTS)]))
    for name, tensor in PLAIN.items():
        assert source.shape(name) == tuple(tensor.shape)
        source.read_into(name, out := torch.empty(tensor.shape, dtype=tensor.dtype))
        assert torch.equal(out, tensor)
    for name, q in WEIGHTS.items():
        assert source.shape(f"{name}.weight") == SHAPES[name]
        assert_same(source.read_quantized(name), q)
        for dtype in (torch.float32, torch.bfloat16):
            stacked = torch.zeros(3, *SHAPES[name], dtype=dtype)
            source.read_into(f"{name}.weight", stacked[1])
            assert torch.equal(stacked[1], dequantize(q, dtype))
            assert not stacked[0].any()
            assert not stacked[2].any()


def test_a_dense_checkpoint_and_a_foreign_one_are_plain(tmp_path):
    for name, keep in (("dense", True), ("foreign", False)):
        (path := tmp_path / name).mkdir()
        write_checkpoint(path, "dense")
        if not keep:
            (path / MODULES_FILE).unlink()
        source = open_source(path)
        assert source.names() == tuple(sorted([*PLAIN, *(f"{name}.weight" for name in WEIGHTS)]))
        assert source.shape(f"{Q}.weight") == (96, 64)
        source.read_into(f"{Q}.weight", out := torch.empty(96, 64))
        assert torch.equal(out, dequantize(WEIGHTS[Q], torch.bfloat16).float())


def test_the_table_is_the_documented_json(tmp_path):
    table = module_table(SCHEMES, SHAPES, "humming")
    assert json.loads(json.dumps(table)) == table
    assert (table["version"], table["layout"], sorted(table["modules"])) == (1, "humming", sorted(WEIGHTS))
    assert table["modules"][Q] == {
        "format": "int4",
        "group_size": 32,
        "symmetric": False,
        "scale_dtype": "bfloat16",
        "shape": [96, 64],
    }
    assert table["modules"][EXPERT.format(3)]["activation"] == "int8"


def test_reading_what_is_not_there(tmp_path):
    source = open_source(write_checkpoint(tmp_path, "humming"))
    with pytest.raises(CheckpointError, match="not among the quantized modules"):
        source.read_quantized("lm_head")
    with pytest.raises(CheckpointError, match="holds no tensor 'nothing'"):
        source.shape("nothing")
    with pytest.raises(CheckpointError, match="holds no tensor"):
        source.shape(Q)  # a module is no tensor
    with pytest.raises(CheckpointError, match=r"has shape \[96, 64\], but \[64, 96\] is expected"):
        source.read_into(f"{Q}.weight", torch.empty(64, 96))


# --- A table that is wrong ------------------------------------------------------------------------------------------


def entry(**changes):
    table = module_table(SCHEMES, SHAPES, "compressed-tensors")
    table["modules"][Q] = {key: value for key, value in (table["modules"][Q] | changes).items() if value != "absent"}
    return table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "no object with"),
        ({"version": 1, "layout": "humming"}, "no object with"),
        ({"version": 2, "layout": "humming", "modules": {}}, "version 2, and 1 is read"),
        ({"version": True, "layout": "humming", "modules": {}}, "version True"),
        ({"version": 1, "layout": "gguf", "modules": {}}, "layout is 'gguf', and known ones are compressed-tensors"),
        ({"version": 1, "layout": [], "modules": {}}, "layout is"),
        ({"version": 1, "layout": "humming", "modules": {"m": 3}}, "does not have exactly the keys"),
        (entry(shape="absent"), "does not have exactly the keys"),
        (entry(extra=1), "does not have exactly the keys"),
        (entry(format="int5"), "unknown format 'int5'"),
        (entry(format="bf16"), "none of a quantized module"),
        (entry(format=["int4"]), "wrong type"),
        (entry(group_size="32"), "wrong type"),
        (entry(group_size=True), "wrong type"),
        (entry(symmetric=0), "wrong type"),
        (entry(group_size=0), "group size 0"),
        (entry(group_size=48), "do not divide 64"),
        (entry(format="fp8"), "fp8 cannot be asymmetric"),
        (entry(format="fp6", symmetric=True), "compressed-tensors has no format for fp6"),
        (entry(scale_dtype="float8"), "scale_dtype 'float8', not one of bfloat16"),
        (entry(scale_dtype={}), "scale_dtype"),
        (entry(activation="int4"), "activation 'int4', not one of bf16, int8, fp8"),
        (entry(activation=[8]), "activation"),
        (entry(activation="int8"), "zero point would have to be taken off"),
        (entry(shape=[96]), r"shape \[96\]"),
        (entry(shape=[96, -64]), "shape"),
        (entry(shape=[96, 64.0]), "shape"),
    ],
)
def test_a_malformed_table_is_refused_with_place_and_remedy(tmp_path, table, message):
    path = write_checkpoint(tmp_path, "compressed-tensors", table)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    assert str(path / MODULES_FILE) in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN"])
def test_a_table_that_is_no_json_is_refused(tmp_path, raw):
    (write_checkpoint(tmp_path, "humming") / MODULES_FILE).write_bytes(raw)
    with pytest.raises(CheckpointError, match="module table cannot be used"):
        open_source(tmp_path)


def test_a_table_that_cannot_be_read_or_is_missing(tmp_path):
    table = write_checkpoint(tmp_path, "humming") / MODULES_FILE
    table.unlink()
    with pytest.raises(CheckpointError, match=r"has no alphaquant/modules\.json"):
        QuantizedCheckpoint.open(tmp_path)
    table.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_source(tmp_path)


def test_a_table_and_weights_of_different_runs(tmp_path):
    path = write_checkpoint(tmp_path, "compressed-tensors", module_table(SCHEMES, SHAPES, "humming"))
    with pytest.raises(CheckpointError, match=rf"lists {Q} as int4 g32 asym.*no tensor '{Q}\.weight'") as caught:
        open_source(path)
    assert caught.value.remedy
    other = module_table(SCHEMES | {Q: scheme("int4", 64, symmetric=False)}, SHAPES, "compressed-tensors")
    write_json(path / MODULES_FILE, other)
    with pytest.raises(CheckpointError, match="implies") as caught:
        open_source(path).read_quantized(Q)
    assert caught.value.where == f"{Q}.weight_scale"
