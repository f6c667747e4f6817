"""Files that a stranger may have written; `make soak` reads 20,000 of them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.checkpoint import Checkpoint, shard
from alphaquant.errors import AlphaQuantError, CalibrationError, CheckpointError

SCRIPT = Path(__file__).parents[1] / "soak" / "fuzz.py"


def test_five_hundred_files_are_read_or_refused():
    command = [sys.executable, str(SCRIPT), "500"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    refused = json.loads(result.stdout)
    assert len(refused) == 9
    assert all(0 < number <= 56 for number in refused.values()), refused
    assert min(refused.values()) < 50, "some are read"


@pytest.mark.parametrize("piece", [b"{},", b'{"":0},'])
def test_the_largest_header_takes_little_memory(tmp_path, piece):
    """The worst that fits into the limit: JSON takes many times its size once it is parsed."""
    text = b"[" + piece * ((shard.MAX_HEADER_BYTES - 10) // len(piece)) + b"0]"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="no JSON object"):
        Checkpoint.open(tmp_path)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 1 << 30, f"{grown >> 20} MiB"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_file_that_is_too_large_is_not_read(tmp_path, name):
    """A sparse file of 100 GiB: nothing but its length is looked at."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with (tmp_path / name).open("r+b") as file:
        if name == "model.safetensors":
            file.write((1 << 36).to_bytes(8, "little"))
        file.truncate(100 << 30)
    with pytest.raises(AlphaQuantError):
        Checkpoint.open(tmp_path)


def test_token_files_that_are_too_large(tmp_path):
    for name in ("tokenizer.json", "rows.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(100 << 30)
    with pytest.raises(CalibrationError, match="more than"):
        load_tokenizer(tmp_path)
    with pytest.raises(CalibrationError, match="more than"):
        calibration_tokens(str(tmp_path / "rows.json"), None, num_samples=1, seqlen=2, seed=0, vocab_size=8)
