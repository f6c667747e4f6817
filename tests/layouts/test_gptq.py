"""The GPTQ layout against its own definition, one number at a time, and against a reader written from that alone."""

import json
import re

import pytest
import torch
from hypothesis import given, settings

from alphaquant.formats import QuantizedTensor, dequantize
from alphaquant.layouts import LAYOUTS
from alphaquant.plan import ModuleKind

from .samples import random_quantized, scheme
from .test_configs import assignments, fused_prefixes
from .test_names import moe_names

VERSIONS = ("gptq", "gptq_v2")
SCHEMES = [
    scheme(f"int{bits}", group, symmetric=symmetric)
    for bits in (2, 3, 4, 8)
    for group in (-1, 16, 32, 64)
    for symmetric in (True, False)
]


def fields(words, bits, count):
    """The first `count` fields of int32 words taken as one little-endian stream, by arithmetic of big integers."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(stream >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]


def naive_weight(stored, bits, version):
    """AutoGPTQ's formula, `scales[g] * (q - (zeros[g] + 1))` in version 1: for every weight by itself, [O][I]."""
    qweight, qzeros, scales, g_idx = (stored[name].tolist() for name in ("qweight", "qzeros", "scales", "g_idx"))
    num_out, num_in = len(qweight[0]), len(g_idx)
    zeros = [fields(row, bits, num_out) for row in qzeros]
    offset = 1 if version == "gptq" else 0
    columns = [fields([row[o] for row in qweight], bits, num_in) for o in range(num_out)]
    return [
        [scales[g_idx[i]][o] * (columns[o][i] - ((zeros[g_idx[i]][o] + offset) % (1 << bits))) for i in range(num_in)]
        for o in range(num_out)
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chosen", SCHEMES, ids=str)
def test_a_reader_of_the_definition_gets_our_weight(version, chosen):
    layout = LAYOUTS[version]
    if layout.unsupported(chosen, (32, 64)) is not None:
        assert version == "gptq"
        assert not chosen.symmetric
        return
    q = random_quantized(chosen, 32, 64)
    stored = {name.removeprefix("m."): tensor for name, tensor in layout.tensors("m", q).items()}
    weight = torch.tensor(naive_weight(stored, chosen.format.bits, version), dtype=torch.float64)
    assert torch.equal(weight.float(), dequantize(q))


def test_bytes_worked_out_by_hand():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]] * 8, dtype=torch.uint8)
    q = QuantizedTensor(codes, torch.full((8, 1), 0.5), None, None, scheme("int4", -1))
    for version, zeros in (("gptq", 0x77777777), ("gptq_v2", 0x88888888 - (1 << 32))):
        stored = LAYOUTS[version].tensors("m", q)
        assert stored["m.qweight"].tolist() == [[0xF7654321 - (1 << 32)] * 8]
        assert stored["m.qzeros"].tolist() == [[zeros]]
        assert stored["m.scales"].dtype == torch.float16
        assert stored["m.scales"].tolist() == [[0.5] * 8]
        assert stored["m.g_idx"].tolist() == [0] * 8
        assert stored["m.g_idx"].dtype == torch.int32


def test_three_bits_straddle_words_as_autogptq_packs_them():
    """Its loop: ten values, two bits of the next; one bit, ten, one; two bits, ten."""
    values = torch.randint(0, 8, (32, 32), generator=torch.Generator().manual_seed(1))
    q = QuantizedTensor(values.to(torch.uint8), torch.ones(32, 1), None, None, scheme("int3", -1))
    words = LAYOUTS["gptq"].tensors("m", q)["m.qweight"]
    for o, row in enumerate(values.tolist()):
        expected = [
            sum(row[j] << (3 * j) for j in range(10)) | row[10] << 30,
            (row[10] >> 2) & 1 | sum(row[11 + j] << (3 * j + 1) for j in range(10)) | row[21] << 31,
            (row[21] >> 1) & 3 | sum(row[22 + j] << (3 * j + 2) for j in range(10)),
        ]
        assert [w & 0xFFFFFFFF for w in words[:, o].tolist()] == [w & 0xFFFFFFFF for w in expected]


# --- Its config, as vLLM and GPTQModel read it ----------------------------------------------------------------------

CONFIG_SCHEMES = [
    None,
    scheme("int4", 128),
    scheme("int4", 64),
    scheme("int8", -1),
    scheme("int3", 32, symmetric=False),
]


def settings_for(config, name):
    """The first rule that matches decides; a "-:" rule leaves the module."""
    base = {key: config[key] for key in ("bits", "group_size", "sym")}
    for rule, overrides in config["dynamic"].items():
        if re.match(rule[2:], name):
            return None if rule[0] == "-" else base | overrides
    return base


@settings(max_examples=60, deadline=None)
@given(assignments(CONFIG_SCHEMES))
def test_rules_give_every_module_its_scheme(schemes):
    config = LAYOUTS["gptq_v2"].quantization_config(schemes)
    if config is None:
        assert set(schemes.values()) == {None}
        return
    config = json.loads(json.dumps(config))
    for name, chosen in (schemes | fused_prefixes(schemes)).items():
        found = settings_for(config, name)
        if chosen is None:
            assert found is None, name
        else:
            assert found == {"bits": chosen.format.bits, "group_size": chosen.group_size, "sym": chosen.symmetric}, name


def test_the_config_of_one_model():
    schemes = dict.fromkeys(moe_names(4, 4), scheme("int4", 128)) | {"lm_head": None, "model.embed_tokens": None}
    schemes |= {n: scheme("int8", -1) for n in schemes if "layers.1.mlp.experts" in n}
    kinds = {"model.embed_tokens": ModuleKind.EMBEDDING}
    int8 = {"bits": 8, "group_size": -1}
    assert LAYOUTS["gptq"].quantization_config(schemes, kinds) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {
            r"+:^model\.layers\.1\.mlp\.experts\.\d+\.(?:gate_proj|up_proj|down_proj)$": int8,
            r"+:^model\.layers\.1\.mlp\.experts$": int8,
            r"-:^lm_head$": {},
        },
    }
