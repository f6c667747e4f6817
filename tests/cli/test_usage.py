"""The command line itself: help, errors of usage, completion, colours, and progress that does not lie."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.cli import app
from alphaquant.terminal import Meter

COMMAND = [sys.executable, "-m", "alphaquant"]


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_fits_a_screen_and_begins_with_what_matters(works, monkeypatch, args):
    monkeypatch.setenv("COLUMNS", "80")
    lines = works(*args).out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    commands = [line.split()[1] for line in lines if line.startswith("  alphaquant ")]
    assert commands == ["quantize", "eval", "report"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("quantise", "m"), ("there is no command 'quantise'", 'did you mean "quantize"?')),
        (("zzz",), ("there is no command 'zzz'", "`alphaquant --help` lists")),
        (("quantize", "m", "--formt", "dense"), ("alphaquant quantize has no option --formt", '"--format"')),
        (("quantize", "m", "--zzz"), ("has no option --zzz", "`alphaquant quantize --help` lists")),
        (("quantize", "m", "--format", "dens"), ("--format: 'dens' is not one of 'auto'", 'did you mean "dense"?')),
        (("eval", "m", "--dtype", "bf15"), ("--dtype: 'bf15' is not one of", '"bf16"')),
        (("quantize", "m", "--nsamples", "0"), ("--nsamples: ", "--help")),
        (("quantize", "m", "--nsamples", "many"), ("--nsamples: ", "--help")),
        (("quantize",), ("MODEL is missing", "`alphaquant quantize --help`")),
        (("eval", "m", "--data"), ("'--data' requires an argument", "--help")),
        (("eval", "a", "b"), ("unexpected extra argument", "`alphaquant eval --help`")),
        (("report", "a", "b", "--quality", "q.json"), ("--quality with several directories", "alphaquant eval")),
    ],
)
def test_errors_of_usage_have_the_shape_of_all_others(fails, args, says):
    fails(*args, says=says)


def test_every_verb_says_what_it_does_in_a_line():
    for command in app.registered_commands:
        assert command.short_help
        assert len(command.short_help) < 65
        assert command.short_help.endswith(".")


@pytest.mark.parametrize(
    ("words", "position", "found"), [("alphaquant qu", 1, "quantize"), ("alphaquant eval --ag", 2, "--against")]
)
def test_shells_complete(words, position, found):
    asked = {"_ALPHAQUANT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    done = subprocess.run(COMMAND, env=os.environ | asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_only_where_they_are_wanted(no_color):
    leader, follower = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color"} | ({"NO_COLOR": "1"} if no_color else {})
    done = subprocess.run([*COMMAND, "zzz"], env=environment, stderr=follower, check=False)
    os.close(follower)
    shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert done.returncode == 2
    assert "error: " in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)) != no_color


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_pass(meter: Meter, clock: Clock, seconds: list[float]) -> list[float | None]:
    """Two phases a layer; what remains is asked as each layer begins."""
    found = []
    for layer, duration in enumerate(seconds):
        meter.begin(layer, len(seconds), 0)
        found.append(meter.remaining())
        clock.now += duration / 4
        meter.begin(layer, len(seconds), 300)
        clock.now += 3 * duration / 4
    return found


@given(st.floats(0.01, 1e4), st.integers(2, 60), st.floats(0, 1e6))
def test_time_left_is_exact_where_layers_take_equally_long(duration, layers, before):
    clock = Clock()
    meter = Meter(clock)
    clock.now += before  # tokenising is no measure of layers
    found = run_pass(meter, clock, [duration] * layers)
    assert found[0] is None
    assert found[1:] == pytest.approx([duration * (layers - i) for i in range(1, layers)], rel=1e-6, abs=1e-6)
    assert meter.remaining() == pytest.approx(0, abs=1e-6 * duration * layers + 1e-6)


def test_time_left_begins_anew_with_another_pass():
    clock = Clock()
    meter = Meter(clock)
    run_pass(meter, clock, [1.0] * 5)
    assert run_pass(meter, clock, [50.0] * 3) == [None, pytest.approx(100), pytest.approx(50)]
    assert run_pass(meter, clock, [2.0] * 4)[0] is None


def test_time_left_shrinks_within_a_layer_and_is_never_negative():
    clock = Clock()
    meter = Meter(clock)
    run_pass(meter, clock, [10.0])
    meter.begin(1, 1, 0)  # a run that goes on behind its last layer
    meter.begin(0, 3, 0)
    clock.now += 10
    meter.begin(1, 3, 0)
    assert meter.remaining() == pytest.approx(20)
    clock.now += 5
    assert meter.remaining() == pytest.approx(15)
    clock.now += 500
    assert meter.remaining() == 0


def test_tokens_a_second_are_those_of_the_phase_that_is_over():
    clock = Clock()
    meter = Meter(clock)
    meter.begin(0, 2, 800)
    assert meter.rate is None
    clock.now += 4
    meter.begin(0, 2, 0)
    assert meter.rate == pytest.approx(200)
    clock.now += 100
    meter.begin(1, 2, 600)
    assert meter.rate == pytest.approx(200)
