"""A forward pass of our decoder against transformers' with its grouped experts, on the same batch of one model.

    python benchmarks/forward.py --model ../shared/models/tiny-olmoe --threads 1

Both hold the model in memory in the same type and compute logits of the same random tokens; nothing is read, nothing
is generated. Passes are interleaved, and the sides take turns in going first: CPU libraries compile a kernel for each
new number of rows, from which the second side gains. The first pass of each is left out.
Prints JSON: the seconds of every pass, their medians, the sum of ours by that of theirs, and how far the logits of the
median token lie apart (a few tokens change an expert by rounding).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.pipeline import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def theirs(model: str, dtype: torch.dtype, experts: str) -> Callable[[Tensor], Tensor]:
    import transformers  # noqa: PLC0415  (slow)

    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, experts_implementation=experts, attn_implementation="sdpa"
    ).eval()
    return lambda ids: loaded(ids, use_cache=False).logits


@torch.no_grad()
def compare(
    model: str, dtype: str, batch: tuple[int, int], passes: int, experts: str, clock: Callable[[], float]
) -> dict[str, Any]:
    """Seconds of each side in turn, on batches that differ from pass to pass, so that routing does too."""
    sides = {"alphaquant": load(model, dtype=dtype).logits, "transformers": theirs(model, DTYPES[dtype], experts)}
    vocab, generator = load(model).spec.vocab_size, torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    apart = 0.0
    for index in range(passes + 1):
        ids = torch.randint(vocab, batch, generator=generator)
        logits = {}
        for name in sorted(sides, reverse=bool(index % 2)):
            begin = clock()
            logits[name] = sides[name](ids)
            if index:
                seconds[name].append(round(clock() - begin, 5))
        ours, others = (logits[name].float().flatten(0, 1) for name in sides)
        apart = max(apart, float((ours - others).abs().amax(-1).median()))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = sum(seconds["alphaquant"]) / sum(seconds["transformers"])
    return {
        "dtype": dtype,
        "batch": list(batch),
        "experts": experts,
        "seconds": seconds,
        "median": medians,
        "ours_by_theirs": round(ratio, 3),
        "logits_apart_at_the_median_token": apart,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=8, help="even: each side goes first as often")
    parser.add_argument("--batches", nargs="+", default=["1x256", "8x256", "32x256"], help="sequences x tokens")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts implementation")
    parser.add_argument("--clock", default="cpu", choices=CLOCKS, help="cpu: of all threads, whatever else runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = []
    for dtype in args.dtypes:
        for batch in args.batches:
            sequences, tokens = map(int, batch.split("x"))
            runs.append(compare(args.model, dtype, (sequences, tokens), args.passes, args.experts, CLOCKS[args.clock]))
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers")}
    print(
        json.dumps(
            {"model": args.model, "threads": args.threads, "clock": args.clock, **versions, "runs": runs}, indent=2
        )
    )


if __name__ == "__main__":
    main()
