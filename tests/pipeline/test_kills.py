"""Runs that are killed by SIGKILL; `make soak` kills at every touch of the disk, and many times in between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parents[1] / "soak" / "kills.py"


def test_six_kills_cost_no_layer_and_no_byte():
    command = [sys.executable, str(HARNESS), "--points", "5", "--instants", "1", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["points"] > 100
    assert seen["kills"] >= 6
