"""Tests against engines as they are installed: each lives in a Python of its own, which `make test-engines` sets up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # tiny models come from there


def pytest_addoption(parser):
    parser.addoption("--vllm", default=str(ROOT / ".venv-engines/bin/python"), help="A Python that has vLLM.")
    parser.addoption(
        "--gptqmodel", default=str(ROOT / ".venv-gptqmodel/bin/python"), help="A Python that has GPTQModel."
    )


@pytest.fixture(scope="session")
def vllm(request) -> str:
    return str(request.config.getoption("--vllm"))
