"""The libraries that define the layouts, where they are installed: compressed-tensors and humming-kernels."""

import json
import re

import pytest
import torch

from alphaquant.formats import Activation, dequantize, quantize
from alphaquant.layouts import LAYOUTS

from .samples import DTYPES, all_schemes, scheme
from .test_names import moe_names

SHAPE = (64, 192)
COMPRESSED_TENSORS = [
    s for s in all_schemes((-1, 16, 32, 96), DTYPES) if LAYOUTS["compressed-tensors"].unsupported(s, SHAPE) is None
]

BLOCKS = [s for s in all_schemes((128,), DTYPES) if s.format.block_rows > 1]


def weight(rows=SHAPE[0], columns=SHAPE[1]):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=rng) * torch.randn(rows, 1, generator=rng).mul(3).exp()
    w[3] = 0
    return w


def local(layout, q):
    return {name.removeprefix("m."): tensor for name, tensor in LAYOUTS[layout].tensors("m", q).items()}


def config_of(layout, schemes):
    return json.loads(json.dumps(LAYOUTS[layout].quantization_config(schemes)))


@pytest.mark.parametrize("scheme", [*COMPRESSED_TENSORS, *BLOCKS], ids=lambda s: f"{s}-{s.scale_dtype}")
def test_compressed_tensors_decompresses_to_our_weight(scheme):
    pytest.importorskip("compressed_tensors", minversion="0.20")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")

    config = config_of("compressed-tensors", {"m": scheme, "lm_head": None})
    group = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    inferred = compressors.format.infer_module_format(torch.nn.Linear, group)
    assert inferred.value == config["format"] == group.format
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    # its decompressor takes the blocks' height from the number of scales: whole blocks, and more than one
    q = quantize(weight(*(256, 384) if scheme in BLOCKS else SHAPE), scheme)
    stored = local("compressed-tensors", q)
    assert set(stored) == set(compressor.compression_param_names(group))
    unpacked = compressor.decompress(stored, group)["weight"]
    assert torch.equal(unpacked, dequantize(q, unpacked.dtype))


@pytest.mark.parametrize("scheme", BLOCKS, ids=lambda s: f"{s}-{s.scale_dtype}")
def test_compressed_tensors_rounds_to_our_blocks(scheme):
    """Its compressor on the same scales chooses our codes, also in a last block of fewer rows; its preset is ours."""
    pytest.importorskip("compressed_tensors", minversion="0.20")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")

    config = config_of("compressed-tensors", {"m": scheme})
    group = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    preset = quantization.preset_name_to_scheme("FP8_BLOCK", ["m"])
    assert (group.weights.strategy, group.weights.block_structure) == ("block", preset.weights.block_structure)
    if scheme.activation is Activation.FP8:
        inputs = ("strategy", "group_size", "dynamic", "num_bits", "type", "symmetric")
        assert all(getattr(group.input_activations, k) == getattr(preset.input_activations, k) for k in inputs)
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    w = weight(200, 384)
    stored = local("compressed-tensors", quantize(w, scheme))
    theirs = compressor.compress({"weight": w, "weight_scale": stored["weight_scale"].float()}, group)
    assert torch.equal(theirs["weight"].view(torch.uint8) & 0x7F, stored["weight"].view(torch.uint8) & 0x7F)
    assert torch.equal(theirs["weight"].float(), stored["weight"].float())  # but for the sign of zero


def test_compressed_tensors_takes_a_mixed_config():
    pytest.importorskip("compressed_tensors", minversion="0.20")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    match_targets = pytest.importorskip("compressed_tensors.utils.match").match_targets

    choices = [scheme("int4", 128), scheme("mxfp4"), scheme("fp8", -1), scheme("int3", 32, symmetric=False), None]
    names = [name for name in moe_names(5, 3) if "." in name]
    schemes = {name: choices[sum(map(ord, name)) % 5] for name in names}
    assert set(schemes.values()) == set(choices)
    config = quantization.QuantizationConfig.model_validate(config_of("compressed-tensors", schemes))
    assert config.format == "mixed-precision"
    linear = torch.nn.Linear(1, 1)
    for name, chosen in schemes.items():
        found = [group for group in config.config_groups.values() if match_targets(name, linear, group.targets)]
        assert len(found) == (chosen is not None)
        assert bool(match_targets(name, linear, config.ignore)) == (chosen is None)
        if chosen is not None:
            assert (found[0].weights.num_bits, found[0].weights.symmetric) == (chosen.format.bits, chosen.symmetric)


@pytest.mark.parametrize("scheme", all_schemes((-1, 16, 32, 96)), ids=str)
def test_humming_accepts_our_tensors_and_rules(scheme):
    # it is made for CUDA machines: elsewhere its own imports may be missing
    BaseWeightSchema = pytest.importorskip("humming.schema.base", exc_type=ImportError).BaseWeightSchema
    config = config_of("humming", {"m": scheme})
    schema = BaseWeightSchema.from_config(config)
    stored = local("humming", quantize(weight(), scheme))
    assert set(stored) == set(schema.get_tensors_attrs(*SHAPE, torch.bfloat16))
    if "weight_scale_2" in stored:  # an engine copies it into a float32 parameter
        stored["weight_scale_2"] = stored["weight_scale_2"].float()
    schema.validate_tensors(stored, *SHAPE, torch.bfloat16)
    for other in all_schemes((-1, 32)):
        config = config_of("humming", {"l.0.x": other, "l.1.x": other, "m": scheme})
        rules = config.pop("dynamic").items()
        merged = config | next((r for pattern, r in rules if re.match(pattern[2:], "m")), {})
        assert BaseWeightSchema.from_config(merged) == schema
