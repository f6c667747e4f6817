from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.errors import PlanError
from alphaquant.patterns import compile_pattern

L = "model.layers"

TRAPS = [
    # pattern, matches, does not match
    ("*.mlp.gate", [f"{L}.3.mlp.gate", "x.mlp.gate"], [f"{L}.3.mlp.gate_proj", f"{L}.3.mlp.gate.x", "mlp.gate"]),
    ("*.self_attn.*", [f"{L}.0.self_attn.q_proj", "a.self_attn.b.c"], [f"{L}.0.self_attn", f"{L}.0.xself_attn.q_proj"]),
    (f"{L}.*.mlp.experts.*", [f"{L}.0.mlp.experts.3.gate_proj"], [f"{L}.0.1.mlp.experts.3.up_proj", f"{L}.0.mlp.gate"]),
    ("*gate_proj", [f"{L}.0.mlp.gate_proj", "gate_proj", f"{L}.0.mlp.experts.9.gate_proj"], [f"{L}.0.mlp.gate"]),
    (f"{L}.[0-3].*", [f"{L}.0.mlp.gate", f"{L}.3.a"], [f"{L}.4.mlp.gate", f"{L}.10.mlp.gate", f"{L}.0"]),
    (f"{L}.?.mlp.*", [f"{L}.7.mlp.up_proj", f"{L}.7.mlp.experts.0.up_proj"], [f"{L}.17.mlp.up_proj", f"{L}...mlp.x"]),
    (f"{L}.1.*", [f"{L}.1.mlp.gate"], [f"{L}.10.mlp.gate", f"{L}.11.mlp.gate", "xmodel.layers.1.mlp.gate"]),
    (f"{L}.1*.mlp.gate", [f"{L}.1.mlp.gate", f"{L}.17.mlp.gate"], [f"{L}.1.7.mlp.gate", f"{L}.2.mlp.gate"]),
    (f"{L}.1[0-5].*", [f"{L}.10.a", f"{L}.15.a"], [f"{L}.1.a", f"{L}.16.a", f"{L}.5.a"]),
    (f"{L}.[!01].mlp.gate", [f"{L}.2.mlp.gate"], [f"{L}.0.mlp.gate", f"{L}.1.mlp.gate", f"{L}...mlp.gate"]),
    ("**", ["lm_head", f"{L}.0.mlp.gate"], []),
    ("*", ["lm_head", f"{L}.0.mlp.gate"], []),
    ("**.gate", ["gate", "mlp.gate", f"{L}.0.mlp.gate"], ["mlp.agate"]),
    ("model.**.up_proj", ["model.up_proj", f"{L}.0.mlp.up_proj"], ["up_proj", "model.x_up_proj", "amodel.up_proj"]),
    (f"{L}.0.**", [f"{L}.0", f"{L}.0.mlp.gate"], [f"{L}.01", f"{L}.00.x"]),
    ("a.**.**.b", ["a.b", "a.x.y.b"], ["ab"]),
    ("lm_head", ["lm_head"], ["lm_head.x", "model.lm_head", "LM_HEAD"]),
    ("lm_head.weight", ["lm_head"], ["lm_head.weight"]),
    ("*.mlp.gate.weight", [f"{L}.0.mlp.gate"], [f"{L}.0.mlp.gate_proj"]),
    (
        "*.mlp.shared_expert*.*",
        ["a.mlp.shared_experts.up_proj"],
        ["a.mlp.shared_expert_gate"],
    ),
    ("*.q_?_proj", ["a.q_a_proj", "a.q_b_proj"], ["a.q_proj", "a.q_ab_proj"]),
    ("*experts*", ["a.experts.0.x", "experts", "a.shared_experts"], ["a.expert.x"]),
    ("x[--0]y", ["x-y", "x0y", "x/y"], ["x.y", "x1y"]),
    ("x[a-]y", ["x-y", "xay"], ["xby"]),
    ("x[a-c&&--]y", ["x&y", "xby"], ["xdy"]),
]


@pytest.mark.parametrize(("text", "hits", "misses"), TRAPS, ids=[row[0] for row in TRAPS])
def test_traps(text, hits, misses):
    pattern = compile_pattern(text)
    assert [name for name in hits if not pattern.matches(name)] == []
    assert [name for name in misses if pattern.matches(name)] == []


MALFORMED = [
    ("", "is empty", "** means every module"),
    (".weight", "is empty", "** means every module"),
    ("a..b", "empty segment", "remove the extra dot"),
    (".a", "empty segment", "remove the extra dot"),
    ("a.", "empty segment", "remove the extra dot"),
    ("a**b", "joins **", "alone between dots"),
    ("***", "joins **", "alone between dots"),
    ("a[0", "unbalanced bracket", "close it"),
    ("a]", "unbalanced bracket", "close it"),
    ("a[0.1]b", "unbalanced bracket", "no dot inside"),
    ("a[]", "empty class []", "list characters"),
    ("a[!]", "empty class [!]", "list characters"),
    ("a[3-0]", "range 3-0", "lower end first"),
    ("a.[10-12].b", "not a range of numbers", "1[0-5]"),
    ("re:.*mlp.*", "holds ':'", "write dotted names"),
    ("a(b|c)", "holds '('", "write dotted names"),
    ("a b", "holds ' '", "write dotted names"),
    ("a[^0]", "holds '^'", "write dotted names"),
    ("*a" * 13, "more than 12 stars", "several rules"),
]


@pytest.mark.parametrize(("text", "what", "remedy"), MALFORMED, ids=[row[0] or "empty" for row in MALFORMED])
def test_malformed_patterns_name_the_value_and_the_remedy(text, what, remedy):
    with pytest.raises(PlanError, match=re.escape(repr(text))) as error:
        compile_pattern(text)
    assert what in error.value.what
    assert remedy in (error.value.remedy or "")


@pytest.mark.parametrize(
    ("text", "literal", "names_last"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head.weight", "lm_head", True),
        ("*.mlp.gate", None, True),
        ("**.gate", None, True),
        ("*gate", None, False),
        ("*.gat?", None, False),
        ("*.gat[e]", None, False),
        ("a.**", None, False),
    ],
)
def test_a_literal_last_segment_is_told_from_a_wild_one(text, literal, names_last):
    pattern = compile_pattern(text)
    assert (pattern.literal, pattern.names_last) == (literal, names_last)


def naive(pattern: list[str], name: list[str], *, is_first: bool = True) -> bool:
    """The rule, spelled out: segment by segment, trying every split."""
    if not pattern:
        return not name
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        return any(naive(rest, name[k:], is_first=False) for k in range(len(name) + 1))
    starts = range(len(name)) if is_first and head.startswith("*") else range(min(1, len(name)))
    for start in starts:
        if not fnmatchcase(name[start], head):
            continue
        if not rest and head.endswith("*"):
            return True
        if naive(rest, name[start + 1 :], is_first=False):
            return True
    return False


SEGMENT = st.one_of(
    st.sampled_from(["**", "*", "a", "ab", "a*", "*a", "*b*", "?", "a?", "[ab]", "[!a]b", "b*a", "0", "[0-1]"]),
    st.text("ab*?", min_size=1, max_size=4).filter(lambda text: "**" not in text),
)
NAME = st.lists(st.text("ab01", min_size=1, max_size=3), min_size=1, max_size=5)


@given(st.lists(SEGMENT, min_size=1, max_size=4), NAME)
def test_agrees_with_a_naive_matcher(pattern, name):
    if "".join(pattern).count("*") > 12:
        return
    assert bool(compile_pattern(".".join(pattern)).matches(".".join(name))) == naive(pattern, name)


@given(st.text("ab01.*?[]!-", max_size=12))
def test_any_text_compiles_or_is_a_plan_error(text):
    error = None
    try:
        compile_pattern(text).matches("a.b.0")
    except PlanError as caught:
        error = caught
    assert error is None or (repr(text) in error.what and error.remedy)
