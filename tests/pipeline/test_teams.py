"""Several processes make of a model what one makes, byte for byte."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphaquant.pipeline.distributed import SOLO, Team
from alphaquant.solver import Recipe

from . import tiny
from .test_resume import result_of

SCRIPT = Path(__file__).parents[1] / "soak" / "teams.py"


def test_two_and_four_processes_make_what_one_makes():
    """Also when four are stopped, one goes on, is stopped too, and three end it."""
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr
    equal = json.loads(result.stdout)
    assert set(equal) == {"olmoe", "llama", "deepseek", "qwen2_moe", "mixtral"}
    assert min(equal.values()) >= 9


def test_two_launchers_with_one_rendezvous(olmoe, text, tmp_path):
    """As on two machines: each starts one process, and both meet at an address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    call = ["quantize", str(olmoe), "--scheme", "int4:g32", "--calib", str(text), "--nsamples", "24", "--seqlen", "32"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, "--local-addr", "127.0.0.1"]
    launchers = [
        subprocess.Popen(
            [*command, "-m", "alphaquant", *call, "--json", "-o", str(tmp_path / "out")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    (report,) = [json.loads(out) for out, _ in said if out]
    assert report["sessions"][0]["processes"] == 2
    tiny.quantize(olmoe, tmp_path / "alone", "int4:g32", text, recipe=Recipe())
    alone = result_of(tmp_path / "alone")
    found = result_of(tmp_path / "out")
    del alone["README.md"]  # which tells the command
    assert [name for name in alone if found[name] != alone[name]] == []


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_items", [0, 1, 6, 7, 8])
def test_turns(size, num_items):
    """Every item is someone's, in order, and all have as many rounds."""
    items = list(range(num_items))
    turns = [Team(rank, size).turns(items) for rank in range(size)]
    assert len({len(part) for part in turns}) == 1
    assert [item for taken in zip(*turns, strict=True) for item in taken if item is not None] == items


@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
def test_shares(size):
    costs = {"experts": [1.0] * 8, "q": [3.0], "k": [2.0], "v": [2.0], "few": [5.0, 5.0, 5.0]}
    shares = Team(0, size).shares(costs)
    assert shares.keys() == costs.keys()
    for whole, parts in costs.items():
        assert len(shares[whole]) == size
        assert [part for share in shares[whole] for part in share] == list(range(len(parts))), "runs, in order"
    assert max(map(len, shares["experts"])) == -(-8 // size)
    if size == 2:
        singles = {"a": [4.0], "b": [3.0], "c": [3.0], "d": [2.0]}
        owners = {whole: [len(share) for share in ranks] for whole, ranks in Team(1, 2).shares(singles).items()}
        assert owners == {"a": [1, 0], "b": [0, 1], "c": [0, 1], "d": [1, 0]}


def test_one_alone_gives_back_what_it_is_given():
    x = torch.randn(4, 3)
    assert SOLO.tell({"a": 1}) == [{"a": 1}]
    assert SOLO.gather({"x": x})["x"] is x
    before = x.clone()
    SOLO.spread(x, 0)
    assert torch.equal(x, before)
