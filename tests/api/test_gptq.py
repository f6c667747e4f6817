"""The in-memory API: the command's codes, in the model's own tensors; and whatever is wrong is said before a change."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import alphaquant
from alphaquant import errors
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.formats import QuantizedTensor, dequantize
from alphaquant.gptq import GPTQConfig, detect_moe_architecture, export, gptq_quantize_model, rtn_quantize_model
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.models import Decoder, load_decoder
from alphaquant.pipeline import load
from alphaquant.plan import Plan
from alphaquant.solver import Effort, Method, Recipe
from pipeline import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ARCHITECTURES = {
    "olmoe": "olmoe",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen",
    "qwen3_moe": "qwen",
    "llama": "standard",
    "deepseek": "deepseek",
}
DTYPES = {"llama": "float16", "qwen3_moe": "float32"}
NATIVE = "deepseek"  # not in transformers: only one by one, and through our own decoder


class OneByOne(torch.nn.Module):
    """A model as transformers 4 held it: a linear for each expert, with the names of the checkpoint."""

    class Config:
        def __init__(self, config: dict[str, Any]) -> None:
            self._config = config

        def to_dict(self) -> dict[str, Any]:
            return dict(self._config)

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.config = self.Config(json.loads((directory / "config.json").read_text()))
        for name, tensor in load_file(directory / "model.safetensors").items():
            *path, leaf = name.split(".")
            at = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            at.register_parameter(leaf, torch.nn.Parameter(tensor))


def from_transformers(directory: Path) -> Any:
    import transformers  # noqa: PLC0415  (slow)

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


HOLDERS = {"transformers": from_transformers, "one by one": OneByOne, "decoder": load}


def tokens(model: Path, text: Path, samples: int = 24, seqlen: int = 32) -> Tensor:
    batch = calibration_tokens(
        str(text), load_tokenizer(model), num_samples=samples, seqlen=seqlen, seed=0, vocab_size=tiny.VOCAB
    )
    return batch.ids


def state(model: Any) -> dict[str, Tensor]:
    if isinstance(model, Decoder):
        layers = {f"{i}.{key}": t for i, weights in enumerate(model.layers) for key, t in weights.items()}
        return {key: t.clone() for key, t in (model.outer | layers).items()}
    return {key: t.clone() for key, t in model.state_dict().items()}


def same_codes(ours: QuantizedTensor, theirs: QuantizedTensor) -> bool:
    return ours.scheme == theirs.scheme and all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(
            (ours.codes, ours.scale, ours.zero, ours.global_scale),
            (theirs.codes, theirs.scale, theirs.zero, theirs.global_scale),
            strict=True,
        )
    )


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    shards = sorted(path.name for path in theirs.glob("*.safetensors"))
    for name in (*shards, "model.safetensors.index.json", "alphaquant/modules.json", "tokenizer.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


CASES = [
    (family, holder)
    for family in ARCHITECTURES
    for holder in HOLDERS
    if not (family == NATIVE and holder == "transformers")
]


@pytest.mark.parametrize(("family", "holder"), CASES)
def test_codes_are_those_of_the_command(family, holder, text, tmp_path):
    directory = tiny.write_model(
        tmp_path / "model", family, num_key_value_heads=2, dtype=DTYPES.get(family, "bfloat16")
    )
    tiny.quantize(directory, tmp_path / "command", tiny.SERVED_PLAN, text)
    stored = QuantizedCheckpoint.open(tmp_path / "command")
    model, ids = HOLDERS[holder](directory), tokens(directory, text)
    places = {key: t.data_ptr() for key, t in model.state_dict().items()} if holder != "decoder" else {}
    assert detect_moe_architecture(model) == ARCHITECTURES[family]

    found = gptq_quantize_model(model=model, dataloader=[ids[:5], ids[5:]], layer_config=tiny.SERVED_PLAN, device="cpu")

    assert list(found) == [name for name in stored.modules if name in found]
    assert found.keys() == stored.modules.keys()
    assert {q.scheme.format.name for q in found.values()} >= {"int4", "int3", "mxfp4", "mxfp6", "nvfp4"}
    records = json.loads((tmp_path / "command/alphaquant/records/layer-00001.json").read_text())["modules"]
    for record in records:
        assert (found[record["name"]].loss, found[record["name"]].tokens) == (record["loss"], record["tokens"])
    for name, module in found.items():
        assert same_codes(module, stored.read_quantized(name)), name
    export(found, tmp_path / "ours", model=model, original=directory)
    assert_same_bytes(tmp_path / "ours", tmp_path / "command")
    if places:  # in the very tensors that the model had
        assert {key: t.data_ptr() for key, t in model.state_dict().items()} == places
    held = alphaquant.pipeline.hold(model)
    for name, module in found.items():
        weight = held.source.read(f"{name}.weight")
        assert weight.equal(dequantize(module, weight.dtype)), name
    if holder == "transformers":
        ours = load_decoder(held.source, held.spec, torch.float32).logits(tiny.token_ids())
        with torch.no_grad():
            assert (model.float()(tiny.token_ids()).logits - ours).abs().max() < 1e-3


def test_rounding_is_that_of_the_command(text, tmp_path):
    directory = tiny.write_model(tmp_path / "model", "qwen2_moe")
    ids = tokens(directory, text)
    for given, source in ((None, None), ([ids], text)):
        out = tmp_path / f"out-{source is None}"
        tiny.quantize(directory, out, "int3:g32", source, recipe=Recipe(method=Method.RTN))
        found = rtn_quantize_model(OneByOne(directory), "int3:g32", given)
        stored = QuantizedCheckpoint.open(out)
        assert found.keys() == stored.modules.keys()
        assert all(same_codes(module, stored.read_quantized(name)) for name, module in found.items())
        assert {module.record.method for module in found.values()} == {"rtn"}
        assert {module.tokens > 0 for module in found.values()} == {source is not None}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A mixture in one file."""
    return tiny.write_model(tmp_path_factory.mktemp("api") / "olmoe", "olmoe")


# --- What may be given ------------------------------------------------------------------------------------------------


def test_every_kind_of_loader_gives_the_same(single, text):
    import transformers  # noqa: PLC0415  (slow)

    ids = tokens(single, text, samples=6)
    ones = torch.ones_like(ids)
    loaders = {
        "whole": [ids],
        "rows": list(ids),
        "tensor": ids,
        "int32": (row.int() for row in ids),
        "dicts": [{"input_ids": ids[:4], "attention_mask": ones[:4]}, {"input_ids": ids[4:]}],
        "lists": [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids],
        "encodings": [transformers.BatchEncoding({"input_ids": ids, "attention_mask": ones})],
        "torch": DataLoader(TensorDataset(ids), batch_size=4),
        "inputs and targets": [(ids, ids.clone())],
        "mappings in tuples": [({"input_ids": ids}, None)],
    }
    found = {
        name: gptq_quantize_model(load(single), loader, {"model.layers.1.mlp.experts.3.down_proj": "int4:g32"})
        for name, loader in loaders.items()
    }
    for name, result in found.items():
        assert list(result) == ["model.layers.1.mlp.experts.3.down_proj"]
        assert all(same_codes(module, found["whole"][key]) for key, module in result.items()), name


def test_every_kind_of_layer_config(single, text, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(tiny.SERVED_PLAN))
    plan = Plan.from_dict(tiny.SERVED_PLAN)
    ids = tokens(single, text, samples=4)
    given = [tiny.SERVED_PLAN, plan, tmp_path / "plan.json", str(tmp_path / "plan.json")]
    schemes = [{n: str(q.scheme) for n, q in gptq_quantize_model(load(single), ids, each).items()} for each in given]
    assert all(each == schemes[0] for each in schemes)
    assert len(schemes[0]) == 55

    table = {
        "model.layers.0.self_attn.q_proj": "mxfp4",
        "model.layers.0.mlp.experts.5.up_proj": "int3:g16:asym",
        "model.layers.1.mlp.gate": "int8:channel",
        "model.layers.1.self_attn.o_proj": "bf16",
        "lm_head": "nvfp4",
    }
    model = load(single)
    before = state(model)
    found = gptq_quantize_model(model, ids, table)
    assert {name: str(q.scheme) for name, q in found.items()} == {
        "model.layers.0.self_attn.q_proj": "mxfp4 g32",
        "model.layers.0.mlp.experts.5.up_proj": "int3 g16 asym",
        "model.layers.1.mlp.gate": "int8 channel",
        "lm_head": "nvfp4 g16",
    }
    changed = {key for key, tensor in state(model).items() if not tensor.equal(before[key])}
    assert changed == {
        "0.self_attn.q_proj.weight",
        "0.mlp.experts.up_proj.weight",
        "1.mlp.gate.weight",
        "lm_head.weight",
    }
    experts = model.layers[0]["mlp.experts.up_proj.weight"], before["0.mlp.experts.up_proj.weight"]
    assert [e for e in range(8) if not experts[0][e].equal(experts[1][e])] == [5]


def test_other_names_of_modules(tmp_path, text):
    directory = tiny.write_model(tmp_path / "model", "mixtral")
    ids = tokens(directory, text, samples=4)
    name = "model.layers.0.block_sparse_moe.experts.2.w1"
    for given in (name, "model.layers.0.mlp.experts.2.gate_proj"):
        assert list(gptq_quantize_model(load(directory), ids, {given: "int4:g32"})) == [name]


def test_settings_reach_the_solver(single, text):
    ids = tokens(single, text)

    def codes(**settings: Any) -> dict[str, QuantizedTensor]:
        return gptq_quantize_model(load(single), ids, "int3:g32", GPTQConfig(**settings))

    plain = codes()
    differing = {
        "effort": "fast",
        "act_order": False,
        "damping": 0.5,
        "damping_evidence": 3.0,
        "shrinkage": 2.0,
        "routing_power": 0.0,
        "rtn_below": 100.0,
    }
    for name, value in differing.items():
        found = codes(**{name: value})
        assert not all(same_codes(q, plain[key]) for key, q in found.items()), name
    assert {q.record.method for q in codes(rtn_below=100.0).values()} == {"rtn"}


def test_settings_are_those_of_the_recipe():
    assert dataclasses.asdict(GPTQConfig()) == dataclasses.asdict(Recipe())
    assert GPTQConfig(effort="best") == GPTQConfig(effort=Effort.BEST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTQConfig().damping = 1.0


# --- Bad input: named, and the model is as it was ---------------------------------------------------------------------

GOOD = torch.arange(64).view(2, 32)
PADDED = {"input_ids": GOOD, "attention_mask": torch.tensor([[1] * 32, [1] * 30 + [0] * 2])}
LOADERS = {
    "nothing": ([], "yields nothing"),
    "empty batches": ([GOOD[:0]], "yields nothing"),
    "empty rows": ([GOOD[:, :0]], "rows have 0 tokens"),
    "no iterable": (7, "is a int, which yields no batches"),
    "none": (None, "yields nothing"),
    "text": ("wikitext2", "is a str, which yields no batches"),
    "one mapping": ({"input_ids": GOOD}, "is a dict, which yields no batches"),
    "texts": ([GOOD, "a text"], "batch 1"),
    "floats": ([GOOD, GOOD.float()], "token ids are float32, not integers"),
    "booleans": ([GOOD > 1], "token ids are bool, not integers"),
    "embeddings": ([GOOD[None]], r"shape \[1, 2, 32\]"),
    "a number": ([GOOD[0, 0]], r"shape \[\]"),
    "above the vocabulary": ([GOOD, GOOD + 70], "token id 128 in row 1 is outside the model's vocabulary of 128"),
    "below zero": ([-GOOD - 1], "token id -1 in row 0 is outside"),
    "ragged batches": ([GOOD, GOOD[:, :16]], "a row of 16 tokens, where those before have 32"),
    "ragged lists": ([{"input_ids": [[1, 2], [3]]}], "no rectangle"),
    "padded": ([PADDED], "attention_mask hides 2 positions"),
    "a mask of another shape": ([PADDED | {"attention_mask": torch.ones(2, 31)}], "attention_mask has shape"),
    "no ids": ([{"labels": GOOD}], "a mapping without input_ids; its keys: labels"),
    "too long": ([torch.zeros(1, 257).long()], "rows have 257 tokens; the model takes 1 to 256"),
}
CONFIGS = {
    "another module": (
        {"model.layers.0.self_attn.q_proj": "int4:g32", "model.layers.7.self_attn.q_proj": "int4"},
        r"names 1 modules that the model lacks: model\.layers\.7\.self_attn\.q_proj",
    ),
    "fused names": ({"model.layers.0.mlp.experts.gate_up_proj": "int4"}, "gate_up_proj"),
    "many": ({f"model.layers.9.x{i}": "int4" for i in range(9)}, r"names 9 modules .* and 5 more"),
    "a pattern of nothing": ({"overrides": [{"pattern": "model.layers.0.bogus", "wq": "int4"}]}, "bogus"),
    "an unknown format": ({"lm_head": "int5"}, "int5"),
    "a group that does not divide": ({"lm_head": "int4:g48"}, "group size 48 does not divide"),
    "no shorthand": ({"lm_head": 4}, "the scheme of lm_head is 4"),
    "an unknown shorthand": ("int4:g32:zigzag", "zigzag"),
    "no file": ("no/such/plan.json", "does not exist"),
    "nothing": ({}, "layer_config is empty"),
    "a number": (4, "layer_config is a int"),
    "a list": (["lm_head"], "layer_config is a list"),
    "an unknown key": ({"default": {"wq": "int4"}, "overides": []}, "overides"),
}


@pytest.fixture
def untouched(single):
    """A model, which a test must leave as it was."""
    model = OneByOne(single)
    before = state(model)
    yield model
    assert all(tensor.equal(before[key]) for key, tensor in state(model).items())


@pytest.mark.parametrize("name", LOADERS)
def test_a_bad_loader_is_named_before_any_weight_is_touched(untouched, name):
    loader, message = LOADERS[name]
    with pytest.raises(errors.CalibrationError, match=message) as caught:
        gptq_quantize_model(untouched, loader, "int4:g32")
    assert caught.value.remedy
    assert "dataloader" in caught.value.where


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_layer_config_is_named_before_any_weight_is_touched(untouched, name):
    layer_config, message = CONFIGS[name]
    for quantize in (
        lambda: gptq_quantize_model(untouched, [GOOD], layer_config),
        lambda: rtn(untouched, layer_config),
    ):
        with pytest.raises(errors.PlanError, match=message) as caught:
            quantize()
        assert caught.value.remedy


def rtn(model: Any, layer_config: Any) -> Any:
    return rtn_quantize_model(model, layer_config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"device": "tpu"}, "device 'tpu' is not"),
        ({"device": None}, "device 'None' is not a device"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"gptq_config": {"damping": 1}}, "gptq_config is a dict"),
    ],
)
def test_bad_options(untouched, settings, message):
    with pytest.raises(errors.ConfigError, match=message):
        gptq_quantize_model(untouched, [GOOD], "int4:g32", **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_without_a_gpu_cuda_is_an_error(untouched):
    with pytest.raises(errors.ConfigError, match="0 CUDA devices found") as caught:
        gptq_quantize_model(model=untouched, dataloader=[GOOD], layer_config="int4:g32", device="cuda")
    assert "cpu" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("effort", "heroic"),
        ("effort", None),
        ("method", "awq"),
        ("backend", "cuda"),
        ("act_order", 1),
        ("block_size", 0),
        ("block_size", 1.5),
        ("block_size", True),
        ("damping", -0.1),
        ("damping", float("nan")),
        ("damping_evidence", float("inf")),
        ("shrinkage", -0.1),
        ("routing_power", "1"),
        ("rtn_below", None),
    ],
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(errors.ConfigError, match=f"{name} is") as caught:
        GPTQConfig(**{name: value})
    assert caught.value.where == "GPTQConfig"


def unknown_class() -> Any:
    import transformers  # noqa: PLC0415  (slow)

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))


def without_head(single: Path) -> Any:
    import transformers  # noqa: PLC0415  (slow)

    return transformers.AutoModel.from_pretrained(single)


def changed(single: Path, **config: Any) -> OneByOne:
    model = OneByOne(single)
    model.config = OneByOne.Config(model.config.to_dict() | config)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda _: unknown_class(), errors.ConfigError, r"'gpt2'[\s\S]*GPT2LMHeadModel[\s\S]*olmoe"),
        (lambda _: torch.nn.Linear(2, 2), errors.ConfigError, "the model is a Linear"),
        (str, errors.ConfigError, "the model is a str"),
        (without_head, errors.CheckpointError, "lm_head.weight"),
        (lambda path: changed(path, num_experts=4), errors.CheckpointError, "experts.4"),
        (lambda path: changed(path, hidden_act="gelu"), errors.ConfigError, "hidden_act is 'gelu'"),
        (lambda path: changed(path, quantization_config={}), errors.CheckpointError, "quantized already"),
        (lambda path: OneByOne(path).to("meta"), errors.CheckpointError, "not in memory"),
        (lambda path: OneByOne(path).double(), errors.ConfigError, "dtype is 'float64'"),
    ],
)
def test_a_model_that_is_not_taken_is_named(single, make, kind, message):
    model = make(single)
    calls = (
        lambda: detect_moe_architecture(model),
        lambda: gptq_quantize_model(model, [GOOD], "int4:g32"),
        lambda: rtn_quantize_model(model, "int4:g32"),
    )
    for call in calls:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert caught.value.where
        assert caught.value.remedy


def test_an_error_on_the_way_leaves_the_model_as_it_was(single, text):
    model = OneByOne(single)
    model.get_parameter("model.layers.1.mlp.experts.7.down_proj.weight").data[3, 3] = float("nan")
    before = state(model)
    with pytest.raises(errors.NumericsError, match=r"layers\.1\.mlp\.experts\.7\.down_proj"):
        gptq_quantize_model(model, tokens(single, text), "int4:g32")
    assert all(torch.equal(t.nan_to_num(), before[key].nan_to_num()) for key, t in state(model).items())


# --- Export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, "compressed-tensors", "humming", "dense"])
def test_export_is_what_the_command_writes(layout, text, tmp_path):
    directory = tiny.write_model(tmp_path / "model", "qwen3_moe")
    tiny.quantize(directory, tmp_path / "command", "int4:g32", text, layout=layout)
    model = from_transformers(directory)
    found = gptq_quantize_model(model, tokens(directory, text), "int4:g32")
    written = alphaquant.export(found, tmp_path / "out", model=model, layout=layout)
    assert written == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    for shard in sorted((tmp_path / "command").glob("*.safetensors")):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    assert torch.equal(load(tmp_path / "out").logits(GOOD), load(tmp_path / "command").logits(GOOD))
    if layout == "dense":
        with torch.no_grad():
            assert torch.equal(from_transformers(tmp_path / "out")(GOOD).logits, model(GOOD).logits)


def test_a_bad_export_leaves_nothing(single, text, tmp_path):
    model = load(single)
    found = gptq_quantize_model(model, tokens(single, text, samples=4), {"lm_head": "int4:g32"})
    other = tiny.write_model(tmp_path / "other", "llama", hidden_size=32)
    wide = tiny.write_model(tmp_path / "wide", "olmoe", num_experts=9)
    before = tiny.listing(tmp_path)
    calls: list[tuple[Any, dict[str, Any], type[errors.AlphaQuantError], str]] = [
        (found, {}, errors.ConfigError, "does not keep its config.json"),
        (found, {"original": tmp_path / "none"}, errors.CheckpointError, "config.json cannot be read"),
        (found, {"original": wide}, errors.CheckpointError, "config.json is of another model"),
        (found, {"original": single, "layout": "gguf"}, errors.OutputError, "no layout 'gguf'"),
        ({}, {"original": single}, errors.OutputError, "no module is quantized"),
        (found, {"model": load(other), "original": other}, errors.CheckpointError, "no module lm_head of shape"),
        (found, {"out": single, "original": single}, errors.OutputError, "the model itself"),
        (found, {"out": wide, "original": single}, errors.OutputError, "not empty"),
    ]
    for modules, options, kind, message in calls:
        with pytest.raises(kind, match=message) as caught:
            export(modules, **({"out": tmp_path / "out", "model": model} | options))
        assert caught.value.remedy
        assert tiny.listing(tmp_path) == before
