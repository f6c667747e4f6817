"""Experts that saw few tokens: from how many samples on GPTQ is worth it, and what shrinkage gains.

    python benchmarks/starved.py MODEL --text ../shared/data/wikitext2/train.txt --layer 1 --scheme int3:g64

Inputs are those of a layer of the original model. Of the experts that see most of them, half are set aside; Hessians
of samples drawn from the other half are given to the solver, and its codes are judged by the Hessian of what was set
aside. Prints, for each number of samples as a share of the inputs, the loss relative to rounding to nearest with
searched scales: geometric means over experts.

Shapes: R rows, I inputs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

import alphaquant
from alphaquant.allocation import parse_candidates
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.formats import dequantize
from alphaquant.models import Source, attention_half, mlp_half, rope_for
from alphaquant.solver import Effort, HessianSum, Method, Recipe, hessian_loss, quantize_stack

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.models import Routing

SHARES = (0.01, 0.03, 0.1, 0.25, 0.5, 1.0)
RECIPES = {
    "as is": Recipe(damping_evidence=0, shrinkage=0, rtn_below=0),
    "damped": Recipe(shrinkage=0, rtn_below=0),
    "shrunk, I/16": Recipe(shrinkage=1 / 16, rtn_below=0),
    "shrunk, I/8": Recipe(shrinkage=1 / 8, rtn_below=0),
    "shrunk, I/4": Recipe(shrinkage=1 / 4, rtn_below=0),
    "shrunk, I/2": Recipe(shrinkage=1 / 2, rtn_below=0),
}


class Seen:
    """A tap that keeps what each expert reads."""

    def __init__(self) -> None:
        self.rows: dict[Source, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, source: Source, x: Tensor, routing: Routing | None = None) -> None:
        """See `alphaquant.models.Tap`."""
        if source in (Source.EXPERT_IN, Source.EXPERT_HIDDEN) and routing is not None:
            counts = routing.counts_E.tolist()
            self.rows[source] = list(zip(x.split(counts), routing.score_R.split(counts), strict=True))


def losses(x_RI: Tensor, score_R: Tensor, w_OI: Tensor, args: argparse.Namespace) -> dict[tuple[str, float], float]:
    """Loss of each recipe relative to rounding, by the share of samples."""
    scheme = parse_candidates(args.scheme, {64})[0].scheme(w_OI.shape[1], w_OI.dtype)
    order = torch.randperm(len(x_RI), generator=torch.Generator().manual_seed(0))
    x_RI, score_R = x_RI[order], score_R[order]
    half = len(x_RI) // 2

    def hessian(rows: slice) -> tuple[Tensor, Tensor]:
        total = HessianSum(1, x_RI.shape[1], 1.0)
        total.add(x_RI[rows], None, score_R[rows])
        return total.normalized(), total.evidence.effective_E

    held_out, _ = hessian(slice(half, None))
    found = {}
    for share in SHARES:
        samples = math.ceil(share * x_RI.shape[1])
        if samples > half:
            continue
        h_EII, effective_E = hessian(slice(samples))

        def loss(recipe: Recipe, h_EII: Tensor = h_EII, effective_E: Tensor = effective_E) -> float:
            outcome = quantize_stack(w_OI[None], h_EII, effective_E, scheme, recipe)
            return float(hessian_loss(w_OI[None].float() - dequantize(outcome.quantized), held_out).sum())

        rounded = loss(Recipe(method=Method.RTN))
        for name, recipe in RECIPES.items():
            found[name, share] = loss(replace(recipe, effort=args.effort)) / rounded
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--scheme", default="int3:g64")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--experts", type=int, default=4, help="those with most tokens")
    args = parser.parse_args()
    args.effort = Effort(args.effort)
    model, tokenizer = alphaquant.load(args.model), load_tokenizer(args.model)
    spec, weights = model.spec, model.layers[args.layer]
    ids = calibration_tokens(
        args.text, tokenizer, num_samples=args.nsamples, seqlen=args.seqlen, seed=0, vocab_size=spec.vocab_size
    ).ids
    rope, seen = rope_for(spec, args.seqlen, "cpu"), Seen()
    x_NLD = F.embedding(ids, model.outer["model.embed_tokens.weight"])
    for layer in range(args.layer):
        x_NLD = mlp_half(
            attention_half(x_NLD, model.layers[layer], spec, layer, rope), model.layers[layer], spec, layer
        )
    mlp_half(attention_half(x_NLD, weights, spec, args.layer, rope), weights, spec, args.layer, tap=seen)
    for source, leaf in ((Source.EXPERT_IN, "gate"), (Source.EXPERT_HIDDEN, "down")):
        rows = seen.rows[source]
        most = sorted(range(len(rows)), key=lambda e: -len(rows[e][0]))[: args.experts]
        found = [losses(*rows[e], weights[f"mlp.experts.{leaf}_proj.weight"][e], args) for e in most]
        print(f"{leaf}_proj, {args.scheme}, layer {args.layer}, {len(most)} experts")
        print("| samples / inputs |", " | ".join(RECIPES), "|")
        for share in SHARES:
            means = [
                math.exp(sum(math.log(part[name, share]) for part in found if (name, share) in part) / len(found))
                for name in RECIPES
            ]
            print(f"| {share} |", " | ".join(f"{mean:.3f}" for mean in means), "|")


if __name__ == "__main__":
    main()
