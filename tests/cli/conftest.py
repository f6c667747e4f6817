"""The command, run in this process as a user would: arguments in; exit code, output and errors out."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from alphaquant.cli import main

if TYPE_CHECKING:
    from pathlib import Path


class Result(NamedTuple):
    """What a call of the command gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def alphaquant(monkeypatch, capsys):
    """Call the command; its errors may not get past `main`."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["alphaquant", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        code = stop.value.code
        assert code is None or isinstance(code, int)
        return Result(code or 0, out, err)

    return run


@pytest.fixture
def works(alphaquant):
    """Call the command, which must succeed."""

    def run(*args: object) -> Result:
        result = alphaquant(*args)
        assert result.code == 0, result
        return result

    return run


@pytest.fixture
def fails(alphaquant, tmp_path):
    """Call the command, which must refuse: exit code 2, what is wrong and what to do, and nothing written.

    A run that fails when layers are done `keeps` them, and says so; one that `logs` writes that file.
    """

    def listing(logs):
        paths = [path for path in tmp_path.rglob("*") if not path.is_dir() and path != logs]
        return {path: path.stat().st_mtime_ns for path in paths if ".partial/" not in path.as_posix()}

    def run(*args: object, says: tuple[str, ...], keeps: bool = False, logs: Path | None = None) -> Result:
        before = listing(logs)
        result = alphaquant(*args)
        assert result.code == 2, result
        assert result.out == "", result
        assert "Traceback" not in result.err
        assert "error: " in result.err, result
        lines = result.err[result.err.index("error: ") :].splitlines()
        assert len(lines) <= 3 + keeps, lines
        assert any(line.startswith("  kept: ") for line in lines) == keeps, lines
        assert keeps or not any(tmp_path.rglob(".*.partial"))
        assert any(line.startswith("  remedy: ") for line in lines), lines
        for text in says:
            assert text in result.err, (text, result.err)
        assert listing(logs) == before
        return result

    return run


@pytest.fixture
def model(tmp_path, olmoe):
    """A sharded model of one's own, to damage."""
    return shutil.copytree(olmoe, tmp_path / "model")


@pytest.fixture(autouse=True)
def _no_stray_state():
    """The command leaves torch as it found it."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    yield
    assert before == (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled())
