"""Each step of the method off, one at a time: what it is worth.

    python benchmarks/ablation.py MODEL --calib ../shared/data/wikitext2/train.txt \
        --held-out ../shared/data/wikitext2/valid.txt --scheme int3:g64 --seqlen 256 -o ablation.json

Every row is one whole run with the defaults but for one step, judged by its KL to the original on held-out text, in
nats a token, and by how much more that is than with the step: what the step gains, with the standard error of the
paired windows. `plain GPTQ` is scale search and one walk. Rows that the JSON file has of the same sources are kept.
Seconds are CPU time of the whole run, reading and writing included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import alphaquant
from alphaquant.calibration import evaluation_windows, load_tokenizer
from alphaquant.evaluation import WindowScores, score_windows
from alphaquant.pipeline import Calibration
from alphaquant.solver import SPENDING, Effort, Spending

if TYPE_CHECKING:
    from torch import Tensor


SOURCES = Path(__file__).parents[1] / "src" / "alphaquant"
USUAL = SPENDING[Effort.DEFAULT]


@dataclass(frozen=True)
class Variant:
    """What a row changes of the defaults: settings of the method, what an effort spends, calibration, coordinates."""

    settings: dict[str, Any] = field(default_factory=dict)
    spending: Spending = USUAL
    calibration: dict[str, Any] = field(default_factory=dict)
    rotate: str = "none"


VARIANTS = {
    "default": Variant(),
    "no scale search": Variant(spending=replace(USUAL, search=False)),
    "one walk": Variant(spending=replace(USUAL, shifts=(), refits=0)),
    "no refinement": Variant(spending=replace(USUAL, sweeps=0)),
    "plain GPTQ": Variant(spending=Spending()),
    "no equalization": Variant({"equalize": False}),
    "--permute range": Variant({"permute": "range"}),
    "--permute importance": Variant({"permute": "importance"}),
    "--permute range, no equalization": Variant({"permute": "range", "equalize": False}),
    "--permute importance, no equalization": Variant({"permute": "importance", "equalize": False}),
    "--asymmetric-target .2": Variant({"asymmetric_target": 0.2}),
    "--asymmetric-target 1": Variant({"asymmetric_target": 1.0}),
    "--effort best --asymmetric-target .2": Variant({"effort": "best", "asymmetric_target": 0.2}),
    "--tune-steps 96": Variant({"tune_steps": 96}),
    "--effort best --tune-steps 0": Variant({"effort": "best", "tune_steps": 0}),
    "natural order": Variant({"act_order": False}),
    "damping .01 for all": Variant({"damping_evidence": 0.0}),
    "shrinkage I/16": Variant({"shrinkage": 1 / 16}),
    "routing weight 0": Variant({"routing_power": 0.0}),
    "routing weight 2": Variant({"routing_power": 2.0}),
    "balanced windows": Variant(calibration={"balance": True}),
    "--repair-router": Variant({"repair_router": True}),
    "--rotate hadamard": Variant(rotate="hadamard"),
    "hadamard, no equalization": Variant({"equalize": False}, rotate="hadamard"),
    "--rotate block": Variant(rotate="block"),
    "--effort best": Variant({"effort": "best"}),
    "--effort fast": Variant({"effort": "fast"}),
}


def measured(args: argparse.Namespace, variant: Variant, ids_NL: Tensor, original_NLV: Tensor) -> dict[str, Any]:
    """Quantize with one step changed, and compare with the original window by window."""
    calibration = Calibration(args.calib, args.nsamples, args.seqlen, args.seed)
    SPENDING[Effort.DEFAULT] = variant.spending
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        alphaquant.quantize(
            args.model,
            f"{folder}/out",
            args.scheme,
            gptq_config=alphaquant.GPTQConfig(**variant.settings),
            calibration=replace(calibration, **variant.calibration),
            rotate=variant.rotate,
        )
        seconds = time.process_time() - begin
        model = alphaquant.load(f"{folder}/out")
    SPENDING[Effort.DEFAULT] = USUAL
    scores = WindowScores()
    for ids, original in zip(ids_NL.split(8), original_NLV.split(8), strict=True):
        score_windows(model.logits(ids), ids, original, scores)
    quality = scores.quality(ids_NL.shape[1] - 1)
    return {
        "perplexity": quality.perplexity,
        "kl": [round(value, 7) for value in scores.kl],
        "seconds": seconds,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line for each row: perplexity, KL, and its change relative to the defaults' with the paired standard error."""
    usual = torch.tensor(rows["default"]["kl"], dtype=torch.float64)
    lines = ["| | perplexity | KL | change | CPU seconds |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        kl = torch.tensor(row["kl"], dtype=torch.float64)
        change = (kl - usual) / usual.mean()
        error = change.std() / math.sqrt(len(change))
        told = "" if name == "default" else f"{change.mean():+.1%} ± {error:.1%}"
        lines.append(f"| {name} | {row['perplexity']:.3f} | {kl.mean():.5f} | {told} | {row['seconds']:.1f} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--scheme", default="int3:g64")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="rows to make: " + ", ".join(VARIANTS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.py")))).hexdigest()[:12]
    key = f"{args.model.name} {args.scheme} {args.nsamples}×{args.seqlen} {args.windows} {args.seed} {digest}"
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    rows = found.setdefault(key, {})
    original = alphaquant.load(args.model)
    ids_NL = evaluation_windows(
        args.held_out,
        load_tokenizer(args.model),
        seqlen=args.seqlen,
        max_windows=args.windows,
        vocab_size=original.spec.vocab_size,
    ).ids
    original_NLV = torch.cat([original.logits(part) for part in ids_NL.split(8)])
    for name in args.only or VARIANTS:
        if name not in rows:
            rows[name] = measured(args, VARIANTS[name], ids_NL, original_NLV)
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
