"""Tiny models and texts that the tests of runs and of the command share; nothing may write into them."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from pipeline import tiny

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when Triton is imported
# a busy machine is no fault of the code
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# how long an example takes says how busy the machine is, not whether the code is right
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory):
    """A mixture of eight experts, in two shards."""
    return tiny.write_model(tmp_path_factory.mktemp("models") / "olmoe", "olmoe", shards=2)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A dense model with grouped queries, in one file."""
    return tiny.write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of 4,000 tokens."""
    return tiny.write_text(tmp_path_factory.mktemp("texts") / "calibration.txt", 4000)


@pytest.fixture(scope="session")
def other_text(tmp_path_factory):
    """Another text of the same kind, to evaluate on."""
    return tiny.write_text(tmp_path_factory.mktemp("texts") / "evaluation.txt", 3000, seed=1)
