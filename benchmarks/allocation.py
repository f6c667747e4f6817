"""Plans by budget side by side: KL of each strategy at each budget, and how good the predictions behind them are.

    python benchmarks/allocation.py MODEL --calib train.txt --held-out valid.txt --nsamples 64 --seqlen 256 \
        --windows 40 --budgets 2.5,3,3.5,4.5 --tables TABLES

Every plan is carried out by GPTQ at the default effort, in memory, and measured on held-out windows; bits are those of
all quantized weights, scales counted. `--methods` also takes files of plans, as peers/run_autoscheme.py writes them.
`--ranks` measures instead how predicted losses rank against those of GPTQ runs in one format, and α against measured
sensitivity; `--solver` times 50,000 pairs of module and format. Prints JSON lines. Tables are kept in `--tables` and
read again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch

from alphaquant.allocation import Budget, Limits, Means, Proposer, Strategy, error_table, parse_candidates
from alphaquant.allocation.solve import solve
from alphaquant.allocation.trial import try_plans
from alphaquant.calibration import evaluation_windows, load_tokenizer
from alphaquant.engines import profile_of
from alphaquant.pipeline import Calibration, Serving, prepare, quantize_checkpoint
from alphaquant.pipeline.run import draw_tokens
from alphaquant.plan import Plan
from alphaquant.solver import Recipe

INTEGERS = "int2:g64,int3:g64,int4:g64,int6:g64,int8:g64"


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def ranks(x: list[float]) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64).argsort().argsort().double()


def correlation(x: list[float], y: list[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


def compare(args: argparse.Namespace, table_of, prepared, candidates, means: Means) -> None:
    tokenizer = load_tokenizer(args.model)
    held_out = evaluation_windows(
        args.held_out,
        tokenizer,
        seqlen=args.seqlen,
        max_windows=args.windows,
        vocab_size=prepared.spec.vocab_size,
    ).ids
    calibration = draw_tokens(prepared, means.calibration).ids
    serving = None if args.engine is None else Serving(profile_of(args.engine))
    weights = {m.name: m.out_features * m.in_features for m in prepared.spec.modules() if m.quantizable_by_default}
    for budget in map(float, args.budgets.split(",")):
        for name in args.methods.split(","):
            if name.endswith(".json"):
                chosen, plan = None, prepare(args.model, Plan.load(Path(name)))
            else:
                strategy, _, seed = name.partition("-")
                table = table_of(Strategy(strategy))
                proposer = Proposer(prepared, table, candidates, serving=serving, limits=Limits())
                bits = Budget(budget).total(prepared)
                is_uniform = strategy == Strategy.UNIFORM.value
                chosen = proposer.uniform(bits, int(seed or 0)) if is_uniform else proposer.best(bits)
                plan = proposer.proposal(chosen)
            begin = time.process_time()
            (quality,) = try_plans([plan], calibration, held_out, means.recipe, device=means.device, dtype=means.dtype)
            say(
                budget=budget,
                method=name,
                engine=args.engine,
                bits=round(stored_bits(plan, weights) / sum(weights.values()), 4),
                predicted=None if chosen is None else chosen.cost,
                kl=quality.agreement.kl,
                kl_stderr=quality.agreement.kl_stderr,
                perplexity=quality.perplexity,
                seconds=round(time.process_time() - begin, 1),
            )


def stored_bits(plan, weights: dict[str, int]) -> float:
    """Bits of the modules that a budget counts, scales and zero points with them."""
    found = 0.0
    for module in plan.spec.modules():
        if module.name in weights:
            scheme = plan.schemes[module.name]
            each = 16 if scheme is None else scheme.bits_per_weight(module.out_features, module.in_features)
            found += each * weights[module.name]
    return found


def predictions(args: argparse.Namespace, table_of, candidates, means: Means) -> None:
    """Predicted against measured losses by format; α against what sensitivity measured."""
    table = table_of(Strategy.SENSITIVITY)
    for column, candidate in enumerate(candidates):
        if candidate.text.split(":")[0] not in args.ranks.split(","):
            continue
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            result = quantize_checkpoint(
                prepare(args.model, Plan.from_shorthand(candidate.text)),
                Path(folder) / "out",
                recipe=means.recipe,
                calibration=means.calibration,
                dtype=means.dtype,
            )
        loss = {m.name: m.loss for record in result.records for m in record.modules}
        predicted = [row.cost[column] / row.facts["slope"] / row.facts["share"] for row in table.rows]
        measured = [loss[row.name] for row in table.rows]
        say(
            format=candidate.text,
            modules=len(measured),
            rank_correlation=correlation(predicted, measured),
            gptq_seconds=round(time.process_time() - begin, 1),
        )
    alphas = {row.name: row.facts.get("alpha") for row in table_of(Strategy.ALPHA).rows}
    known = [row for row in table.rows if alphas[row.name] is not None]
    say(
        alpha_against="sensitivity a weight, in the first format",
        rank_correlation=correlation([alphas[r.name] for r in known], [r.cost[0] / r.num_weights for r in known]),
        modules=len(known),
    )


def solver() -> None:
    rng = random.Random(0)  # noqa: S311
    costs, sizes = [], []
    for _ in range(10_000):
        numel = rng.choice([1 << 20, 1 << 21, 2048 * 704])
        weight = numel * 10 ** rng.uniform(-3, 3)
        widths = (2.25, 3.25, 4.25, 6.25, 8.25)
        sizes.append([int(bits * numel) for bits in widths])
        costs.append([weight * 4**-bits * rng.uniform(0.8, 1.25) for bits in widths])
    for share in (1.1, 1.4, 1.9):
        begin = time.perf_counter()
        found = solve(costs, sizes, int(share * sum(size[0] for size in sizes)))
        say(pairs=50_000, seconds=round(time.perf_counter() - begin, 2), gap=found.gap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calib", default="wikitext2")
    parser.add_argument("--held-out", default="wikitext2")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--budgets", default="2.5,3,3.5,4.5")
    parser.add_argument("--formats", default=INTEGERS)
    parser.add_argument("--methods", default="uniform,sensitivity,alpha,utilization,random")
    parser.add_argument("--engine")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--ranks", help="formats whose predicted losses are held against a GPTQ run: int2,int3")
    parser.add_argument("--solver", action="store_true")
    args = parser.parse_args()
    if args.solver:
        solver()
        return
    args.tables.mkdir(parents=True, exist_ok=True)
    prepared = prepare(args.model, Plan.from_shorthand("bf16"))
    widths = {m.in_features for m in prepared.spec.modules() if m.quantizable_by_default}
    candidates = parse_candidates(args.formats, widths)
    means = Means(Calibration(args.calib, args.nsamples, args.seqlen), Recipe(), torch.device("cpu"), args.dtype)

    def table_of(strategy: Strategy):
        file = args.tables / f"{strategy.value}.json"
        is_new, begin = not file.exists(), time.process_time()
        table = error_table(prepared, strategy, candidates, means, file)
        if is_new:
            say(table=strategy.value, seconds=round(time.process_time() - begin, 1))
        return table

    if args.ranks:
        predictions(args, table_of, candidates, means)
    else:
        compare(args, table_of, prepared, candidates, means)


if __name__ == "__main__":
    main()
