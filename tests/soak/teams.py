"""Holds runs of several processes against a run of one: every byte of shards and records.

python tests/soak/teams.py [FAMILY ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alphaquant.errors import NumericsError
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline import run_status, stream
from alphaquant.solver import Permute, Recipe
from pipeline import tiny
from soak.forks import OWN_ERROR, result_of, start, wait

if TYPE_CHECKING:
    from alphaquant.pipeline.distributed import Team

# what differs between the cases: kinds of layers, types, formats, what is left out, what is not calibrated
CASES = {
    "olmoe": {
        "plan": tiny.SERVED_PLAN,
        "recipe": Recipe(repair_router=True, tune_steps=4, asymmetric_target=0.5),
    },
    "llama": {"plan": tiny.HUMMING_PLAN, "dtype": "bfloat16"},
    "deepseek": {"plan": tiny.SERVED_PLAN | {"overrides": [{"pattern": "lm_head", "wq": "int4", "group_size": 32}]}},
    "qwen2_moe": {
        "plan": {
            "default": {"wq": "int3"},
            "overrides": [
                {"pattern": "*.experts.*", "skip": True},
                {"pattern": "*.experts.[1-3].*", "skip": False, "wq": "int8", "aq": "int8"},
                {"pattern": "*.experts.[4-5].*", "skip": False, "wq": "fp8", "aq": "fp8", "group_size": -1},
            ],
        },
        "recipe": Recipe(asymmetric_target=1.0, permute=Permute.RANGE),
    },
    "mixtral": {"plan": tiny.HUMMING_PLAN, "calibrated": False, "num_local_experts": 3},
}
_PLAN_DEFAULT = {"group_size": 32}


def stop_in_layer(index: int) -> None:
    """Let a run end with one of our errors when it comes to a layer."""
    original = layer_module.LayerQuantizer.layer

    def layer(quantizer, number, *args):
        if number == index:
            raise NumericsError("enough")
        return original(quantizer, number, *args)

    layer_module.LayerQuantizer.layer = layer


def main(families: list[str]) -> dict[str, int]:
    """Compare; returns how many files were equal, by family.

    Raises:
        AssertionError: a byte differs.
    """
    stream.CHUNK_TOKENS = 128  # so that there are turns to take
    equal = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = tiny.write_text(folder / "text", 4000)
        for family in families:
            case = dict(CASES[family])
            plan, calibrated, recipe = case.pop("plan"), case.pop("calibrated", True), case.pop("recipe", Recipe())
            plan = plan | {"default": _PLAN_DEFAULT | plan["default"]}
            model = tiny.write_model(folder / family, family, **case)

            call = partial(tiny.quantize, model, plan=plan, text=text if calibrated else None, recipe=recipe)

            def work(out: Path, team: Team, stop: int | None = None, call=call) -> None:
                if stop is not None:
                    stop_in_layer(stop)
                call(out, team=team)

            results = {}
            for size in (1, 2, 4):
                out = folder / f"{family}-{size}"
                assert not any(wait(start(lambda team, out=out: work(out, team), size)))
                results[size] = result_of(out)
            out = folder / f"{family}-4-1-3"
            for size, stop in ((4, 1), (1, 1), (3, None)):
                codes = wait(start(lambda team, out=out, stop=stop: work(out, team, stop), size))
                assert codes == [0 if stop is None else OWN_ERROR] * size
                assert stop is None or run_status(out).done == 1
            results[3] = result_of(out)
            for size, found in results.items():
                assert found.keys() == results[1].keys()
                differing = [name for name in found if found[name] != results[1][name]]
                assert not differing, f"{family}, {size} processes: {differing}"
            equal[family] = len(results[1])
    return equal


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:] or list(CASES))) + "\n")
