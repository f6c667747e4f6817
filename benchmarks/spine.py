"""tiny-olmoe against the peers: quality at INT2-4 symmetric g64, and time of the INT4 run, interleaved.

    python benchmarks/spine.py --shared ../shared --llmcompressor LC/bin/python --gptqmodel GM/bin/python

Each peer is the Python of an environment of its own (`--shared` holds the scripts that run it); without one it is
left out. Everything runs with `--threads` threads. Seconds leave out start-up, loading the tokenizer's text and, for
the peers, reading and writing the model; for alphaquant they take reading and writing in. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ALPHAQUANT = "alphaquant"


def run(command: list[str], threads: int, cwd: Path | None = None) -> str:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GPTQMODEL_CPU_WORKERS": "2",
    }
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def ours(args: argparse.Namespace, bits: int, seed: int, effort: str, *, quality: bool) -> dict[str, float]:
    data, model = args.shared / "data" / "wikitext2", args.shared / "models" / "tiny-olmoe"
    command = [sys.executable, "-m", "alphaquant"]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        plan = ["--scheme", f"int{bits}:g64", "--effort", effort, "--seed", str(seed), "--json"]
        calibration = ["--calib", str(data / "train.txt"), "--nsamples", "128", "--seqlen", "256"]
        report = json.loads(run([*command, "quantize", str(model), *plan, *calibration, "-o", out], args.threads))
        seconds = report["seconds"]
        row = {"seconds": seconds["total"] - seconds["tokenize"], "seconds_with_tokens": seconds["total"]}
        if quality:
            text = ["--data", str(data / "valid.txt"), "--seqlen", "256", "--windows", "300"]
            row |= json.loads(run([*command, "eval", out, *text, "--against", str(model), "--json"], args.threads))
    return row


def peer(args: argparse.Namespace, tool: str, bits: int, seed: int) -> dict[str, float]:
    script = args.shared / "peers" / {"llmcompressor": "llmcompressor_gptq.py", "gptqmodel": "gptqmodel_gptq.py"}[tool]
    data, model = args.shared / "data" / "wikitext2", args.shared / "models" / "tiny-olmoe"
    options = ["--bits", str(bits), "--seed", str(seed), "--calib", str(data / "train.txt")]
    with tempfile.TemporaryDirectory() as folder:
        command = [getattr(args, tool), str(script), str(model), *options, "--data", str(data / "valid.txt")]
        output = run(command, args.threads, Path(folder))
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--llmcompressor", help="Python of an environment with llm-compressor")
    parser.add_argument("--gptqmodel", help="Python of an environment with GPTQModel")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--quality", action="store_true", help="measure perplexity and KL")
    parser.add_argument("--speed", action="store_true", help="measure time, interleaved")
    args = parser.parse_args()
    args.shared = args.shared.resolve()
    tools = [tool for tool in ("llmcompressor", "gptqmodel") if getattr(args, tool)]
    result: dict[str, object] = {}
    if args.quality:
        rows = []
        for bits, seeds in ((4, (0, 1, 2)), (3, (0,)), (2, (0,))):
            for seed in seeds:
                rows.append(
                    {"tool": ALPHAQUANT, "bits": bits, "seed": seed} | ours(args, bits, seed, "default", quality=True)
                )
                rows += [{"bits": bits, "seed": seed} | peer(args, tool, bits, seed) for tool in tools]
        result["quality"] = rows
    if args.speed:
        seconds: dict[str, list[float]] = {}
        for pair in range(args.pairs):
            for effort in ("fast", "default"):
                row = ours(args, 4, pair, effort, quality=False)
                seconds.setdefault(f"{ALPHAQUANT} --effort {effort}", []).append(row["seconds"])
                seconds.setdefault(f"{ALPHAQUANT} --effort {effort}, tokens", []).append(row["seconds_with_tokens"])
            for tool in tools:
                seconds.setdefault(tool, []).append(peer(args, tool, 4, pair)["seconds"])
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        result["seconds"] = seconds
        result["ratio"] = {
            f"{tool} / {name}": medians[tool] / medians[name]
            for tool in tools
            for name in medians
            if name.startswith(ALPHAQUANT)
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
