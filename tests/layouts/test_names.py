import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.layouts.names import NamePatterns


def moe_names(num_layers, num_experts, dense=()):
    names = ["model.embed_tokens", "lm_head"]
    for layer in range(num_layers):
        names += [f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkvo"]
        leaves = ("gate_proj", "up_proj", "down_proj")
        if layer in dense:
            names += [f"model.layers.{layer}.mlp.{leaf}" for leaf in leaves]
            continue
        names.append(f"model.layers.{layer}.mlp.gate")
        names += [f"model.layers.{layer}.mlp.experts.{e}.{leaf}" for e in range(num_experts) for leaf in leaves]
    return names


def matched(patterns, names):
    return [name for name in names for pattern in patterns if re.match(pattern, name)]


@st.composite
def subsets(draw):
    """A model, dense in some layers, and a random set of its modules: by layer, by expert, by role, or name by name."""
    num_layers, num_experts = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    names = moe_names(num_layers, num_experts, draw(st.sets(st.integers(0, num_layers - 1))))
    by = draw(st.sampled_from([r"layers\.(\d+)", r"experts\.(\d+)", r"(\w+)$", r"(.*)"]))
    keys = {name: m[1] if (m := re.search(by, name)) else "" for name in names}
    chosen = draw(st.sets(st.sampled_from(sorted(set(keys.values())))))
    return names, [name for name in names if keys[name] in chosen]


@settings(max_examples=100)
@given(subsets())
def test_patterns_match_exactly_the_chosen_names_once(subset):
    names, chosen = subset
    patterns = NamePatterns(names).cover(chosen)
    assert sorted(matched(patterns, names)) == sorted(chosen)
    assert all(pattern.startswith("^") and pattern.endswith("$") for pattern in patterns)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (lambda n: ".experts." in n, [r"^model\.layers\.\d+\.mlp\.experts\.\d+\.(?:gate_proj|up_proj|down_proj)$"]),
        (lambda n: "self_attn" in n, [r"^model\.layers\.\d+\.self_attn\.(?:q_proj|k_proj|v_proj|o_proj)$"]),
        (lambda n: n.endswith("mlp.gate"), [r"^model\.layers\.\d+\.mlp\.gate$"]),
        (lambda n: re.search(r"layers\.(0|11)\..*q_proj", n), [r"^model\.layers\.(?:0|11)\.self_attn\.q_proj$"]),
        (lambda n: re.search(r"layers\.2\..*experts\.\d+\.up", n), [r"^model\.layers\.2\.mlp\.experts\.\d+\.up_proj$"]),
        (
            lambda n: re.search(r"experts\.[03]\.up", n),
            [r"^model\.layers\.\d+\.mlp\.experts\.(?:0|3)\.up_proj$"],
        ),
        (lambda n: n == "lm_head", ["^lm_head$"]),
        (lambda _: False, []),
    ],
)
def test_patterns_are_compact(chosen, expected):
    # layer 0 has no experts: the others are still all of their kind
    names = moe_names(12, 8, dense={0} if expected and "experts" in expected[0] else ())
    assert NamePatterns(names).cover(filter(chosen, names)) == expected


def test_indices_are_ordered_as_numbers():
    names = [f"layers.{i}.a" for i in (10, 9, 2, 1, 0)]
    assert NamePatterns(names).cover(names[:-1]) == [r"^layers\.(?:1|2|9|10)\.a$"]


def test_names_are_escaped_and_sizes_do_not_leak():
    names = ["a+b.0.w", "aab.0.w", "aXb.0.w", "a+b.0.ww"]
    patterns = NamePatterns(names).cover(["a+b.0.w"])
    assert matched(patterns, names) == ["a+b.0.w"]
    leaves = ["m.a+b", "m.aab", "m.c"]
    assert matched(NamePatterns(leaves).cover(["m.a+b", "m.c"]), leaves) == ["m.a+b", "m.c"]


def test_plain_names_stay_plain():
    names = moe_names(2, 2)
    marked = NamePatterns(names).cover_marked(["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"])
    assert marked == ["lm_head", r"re:^model\.layers\.\d+\.mlp\.gate$"]


def test_a_large_model_takes_few_patterns():
    names = moe_names(48, 128)
    assert len(NamePatterns(names).cover(n for n in names if "experts" in n and "down" not in n)) == 1
