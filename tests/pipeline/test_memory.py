"""Memory does not grow with the number of layers: nothing of a layer outlives it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphaquant.pipeline import evaluate_checkpoint
from alphaquant.solver import Recipe

from . import tiny

BENCHMARK = Path(__file__).parents[2] / "benchmarks/memory.py"


def leftovers(call) -> list[tuple[int, ...]]:
    """Shapes of the tensors that only the garbage collector would free after a call."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        call()
        gc.collect()
        return [tuple(found.shape) for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("family", ["olmoe", "llama"])
def test_tensors_are_freed_when_they_are_done_with(request, family, text, tmp_path):
    """A cycle of references, such as a local function that calls itself, keeps what it sees until Python collects it.

    That is seldom: tensors count as one object each. By then several layers' workspaces lie in memory.
    """
    model = request.getfixturevalue(family)
    assert leftovers(lambda: tiny.quantize(model, tmp_path / "gptq", "int3:g32", text)) == []
    tuned = Recipe(tune_steps=2, asymmetric_target=0.5)
    assert leftovers(lambda: tiny.quantize(model, tmp_path / "tuned", "int3:g32", text, recipe=tuned)) == []
    assert leftovers(lambda: tiny.quantize(model, tmp_path / "rtn", "int3:g32", None)) == []
    assert leftovers(lambda: evaluate_checkpoint(tmp_path / "gptq", data=str(text), seqlen=32, against=model)) == []


def test_the_search_for_leftovers_finds_one():
    def cycle():
        held = torch.zeros(7, 5)

        def again(n):
            return again(n - 1) if n else held

        again(2)

    assert leftovers(cycle) == [(7, 5)]


@pytest.mark.slow
def test_peak_does_not_grow_with_the_layers():
    """The measurement of `benchmarks/memory.py`, which is made at 256 MiB a layer, at a size that a test can bear.

    How the C library places blocks of this size makes 10% either way; were every layer kept, it would be 1.5.
    """
    options = ["--layer-mib", "32", "--layers", "4", "14", "--effort", "fast"]
    done = subprocess.run([sys.executable, BENCHMARK, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["model"]["layer_bytes"] == pytest.approx(32 << 20, rel=0.05)
    assert [run["layers"] for run in figures["runs"]] == [4, 14]
    assert figures["ratio"] <= 1.2, figures
