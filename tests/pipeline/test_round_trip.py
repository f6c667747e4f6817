"""Every format, group size and zero point that a layout holds, in every family: from a run through exports to codes."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pytest
import torch

from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS, Activation, Scheme
from alphaquant.layouts import LAYOUTS, QuantizedCheckpoint
from alphaquant.models import detect
from alphaquant.pipeline import export_checkpoint, load
from alphaquant.solver import Effort, Recipe

from . import tiny
from .spy import Spy
from .test_outputs import assert_same_codes

GROUPS = (-1, 16, 32, 64)
CASES = list(itertools.product(sorted(tiny.CONFIGS), ("compressed-tensors", "gptq_v2", "humming")))


def schemes_of(layout: str) -> list[Scheme]:
    """All that the layout holds of a matrix of 64 by 64."""
    found = []
    for fmt, group, symmetric, inputs in itertools.product(FORMATS.values(), GROUPS, (True, False), Activation):
        with suppress(PlanError):  # what does not go together
            scheme = Scheme(fmt, group, symmetric=symmetric, activation=inputs)
            if LAYOUTS[layout].unsupported(scheme, (64, 64)) is None:
                found.append(scheme)
    return found


def plans_of(layout: str, family: str) -> list[dict[str, Any]]:
    """Plans that give every scheme of the layout to a module that takes it, and each module one."""
    modules = [m for m in detect(tiny.CONFIGS[family]).modules() if m.quantizable_by_default]
    left, every, plans = schemes_of(layout), schemes_of(layout), []
    while left:
        overrides = []
        for module in modules:
            shape = (module.out_features, module.in_features)
            fits = (s for s in (*left, *every) if LAYOUTS[layout].unsupported(s, shape) is None)
            scheme = next(fits, None)
            if scheme is None:
                overrides.append({"pattern": module.name, "skip": True})
                continue
            left = [other for other in left if other != scheme]
            keys = {"wq": scheme.format.name, "group_size": scheme.group_size, "aq": scheme.activation.value}
            overrides.append({"pattern": module.name, **keys, **({} if scheme.symmetric else {"symmetric": False})})
        plans.append({"overrides": overrides})
    return plans


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_all_that_a_layout_holds_survives(family, layout, tmp_path, monkeypatch):
    model, recipe, seen = tiny.write_model(tmp_path / "model", family), Recipe(effort=Effort.FAST), set()
    for number, plan in enumerate(plans_of(layout, family)):
        out, other, back = (tmp_path / f"{name}{number}" for name in ("out", "other", "back"))
        with monkeypatch.context() as patch:
            spy = Spy().install(patch)
            tiny.quantize(model, out, plan, None, layout=layout, recipe=recipe)
        export_checkpoint(out, other, "compressed-tensors" if layout == "gptq_v2" else layout)
        export_checkpoint(other, back, layout)
        for path in (out, other, back):
            stored = QuantizedCheckpoint.open(path)
            for name, q in spy.quantized.items():
                assert_same_codes(stored.read_quantized(name), q, name)
        for path in sorted(out.glob("*.safetensors")):
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name
        ids = tiny.token_ids(2, 8)
        assert torch.equal(load(other).logits(ids), load(out).logits(ids))
        seen |= {q.scheme for q in spy.quantized.values()}
    assert {str(scheme) for scheme in seen} == {str(scheme) for scheme in schemes_of(layout)}
