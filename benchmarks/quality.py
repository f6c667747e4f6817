"""Quality at equal bits: tool × model × format, on the same tokens, by the same measurement.

    python benchmarks/quality.py --shared ../shared --model tiny-olmoe=../shared/models/tiny-olmoe \
        --peer llm-compressor=LC/bin/python --peer gptqmodel=GM/bin/python --format int3:g64 --cache DIR -o quality.json

Each peer runs in an environment of its own (`benchmarks/peers/run_*.py`) with its defaults, ours by the command with
its defaults; ours is measured as its dense export, by the same code as the peers (`benchmarks/peers/measure.py`).
A result is kept in the cache under everything that made it, so that a table is made in parts: peers by their version,
ours by the digest of the sources. Bits are those of the files, by the same count for all: every byte of what stands in
for the quantized weights. Seconds are those of quantizing: ours take reading and writing in.
Writes JSON, and prints a markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from alphaquant.plan import Plan

PEERS = Path(__file__).parent / "peers"
SOURCES = Path(__file__).parents[1] / "src" / "alphaquant"
OURS = "alphaquant"


class Setup(NamedTuple):
    """Tokens of a model: calibration windows, their length, and of each evaluation text the file and its windows."""

    nsamples: int
    seqlen: int
    texts: dict[str, tuple[str, int]]


_JOINED = "wikitext2/test.joined.txt"
SETUPS = {
    "tiny-olmoe": Setup(128, 256, {"wikitext2": ("wikitext2/valid.txt", 300), "c4": ("domains/c4.txt", 100)}),
    "smollm2": Setup(64, 512, {"wikitext2": (_JOINED, 40), "c4": ("domains/c4.txt", 16)}),
    "smollm2-moe": Setup(64, 512, {"wikitext2": (_JOINED, 40), "c4": ("domains/c4.txt", 16)}),
}
# what a peer is called: the script that runs it, and the distribution whose version names its results
SCRIPTS = {
    "llm-compressor": ("run_llmcompressor.py", "llmcompressor"),
    "gptqmodel": ("run_gptqmodel.py", "gptqmodel"),
    "autoround": ("run_autoround.py", "auto-round"),
}


def run(command: list[str], threads: int, cwd: str | None = None) -> str:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GPTQMODEL_CPU_WORKERS": "2",  # it does not start on two cores without
    }
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def result_of(output: str) -> dict[str, Any]:
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def measuring(args: argparse.Namespace, setup: Setup) -> list[str]:
    texts = [f"{name}={args.shared / 'data' / file}={windows}" for name, (file, windows) in setup.texts.items()]
    return ["--seqlen", str(setup.seqlen), *(word for text in texts for word in ("--text", text))]


def ours(args: argparse.Namespace, model: Path, setup: Setup, fmt: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", OURS]
    plan = ["--scheme", fmt]
    if args.only:
        file = Path(folder, "plan.json")
        rule = Plan.from_shorthand(fmt).default.model_dump(exclude_none=True)
        file.write_text(json.dumps({"default": {"wq": "bf16"}, "overrides": [rule | {"pattern": args.only}]}))
        plan = ["--config", str(file)]
    calibration = ["--calib", str(args.shared / "data/wikitext2/train.txt"), "--nsamples", str(setup.nsamples)]
    options = ["--seqlen", str(setup.seqlen), "--seed", str(args.seed), "--effort", args.effort]
    options += [word for option in args.option for word in option.split()]
    quantize = [*command, "quantize", str(model), *plan, *calibration, *options]
    report = json.loads(run([*quantize, "-o", f"{folder}/out", "--json"], args.threads))
    run([*command, "export", f"{folder}/out", "-o", f"{folder}/dense", "--format", "dense"], args.threads)
    measure = [sys.executable, str(PEERS / "measure.py"), str(model), f"{folder}/dense", "--files", f"{folder}/out"]
    found = result_of(run([*measure, *measuring(args, setup)], args.threads))
    seconds = report["seconds"]
    return found | {"seconds": seconds["total"] - seconds["tokenize"]}


def peer(args: argparse.Namespace, tool: str, model: Path, setup: Setup, fmt: str, folder: str) -> dict[str, Any]:
    calibration = ["--calib", str(args.shared / "data/wikitext2/train.txt"), "--nsamples", str(setup.nsamples)]
    command = [args.peers[tool], str(PEERS / SCRIPTS[tool][0]), str(model), "--out", f"{folder}/out", "--format", fmt]
    command += ["--only", args.only] if args.only else []
    return result_of(
        run([*command, *calibration, "--seed", str(args.seed), *measuring(args, setup)], args.threads, folder)
    )


def version_of(args: argparse.Namespace, tool: str) -> str:
    if tool == OURS:
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.py"))))
        return f"{digest.hexdigest()[:12]}-{args.effort}" + "".join(args.option).replace(" ", "")
    program = f"from importlib.metadata import version; print(version({SCRIPTS[tool][1]!r}))"
    return run([args.peers[tool], "-c", program], 1).strip()


def cell(args: argparse.Namespace, tool: str, name: str, fmt: str) -> dict[str, Any]:
    model, setup = args.models[name], SETUPS[name]
    key = {"tool": tool, "version": version_of(args, tool), "model": name, "format": fmt, "seed": args.seed}
    key |= {"threads": args.threads} | ({"only": args.only} if args.only else {})
    cached = args.cache / ("_".join(re.sub(r"[:*]", "-", str(value)) for value in key.values()) + ".json")
    if cached.exists():
        return dict(json.loads(cached.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        try:
            if tool == OURS:
                found = ours(args, model, setup, fmt, folder)
            else:
                found = peer(args, tool, model, setup, fmt, folder)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return key | {"failed": str(error).strip().splitlines()[-1]}
    row = key | found
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(row, indent=2))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each cell: perplexity (KL) of each text, agreements on the first."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("texts", {})))
    head = ["model", "format", "tool", *(f"{name} (KL)" for name in names), "top-1", "routing", "bits", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        start = [row["model"], row["format"], row["tool"]]
        if "failed" in row:
            lines.append(f"| {' | '.join([*start, row['failed'][:80]])} |" + " |" * (len(head) - 4))
            continue
        texts = [row["texts"][name] for name in names]
        first, routing, bits = texts[0], texts[0]["routing_agreement"], row["bits_per_weight"]
        figures = [f"{text['perplexity']:.3f} ({text['kl']:.5f})" for text in texts]
        figures += [f"{first['top1_agreement']:.2%}", "–" if routing is None else f"{routing:.2%}"]
        figures += ["–" if bits is None else f"{bits:.3f}", f"{row['seconds']:.1f}"]
        lines.append(f"| {' | '.join([*start, *figures])} |")
    return "\n".join(lines)


def pairs(values: list[str]) -> dict[str, str]:
    return dict(value.split("=", 1) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/wikitext2 and data/domains")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help=", ".join(SETUPS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(SCRIPTS))
    parser.add_argument("--format", action="append", required=True, help="int3:g64, int4:g64:asym, mxfp4, nvfp4")
    parser.add_argument("--cache", type=Path, required=True, help="folder of results that are kept")
    parser.add_argument("-o", "--output", type=Path, help="JSON file of all rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", default="default", help="of ours")
    parser.add_argument("--option", action="append", default=[], help="more options of ours, each with its value")
    parser.add_argument("--only", help="quantize the modules of this glob pattern alone: *.experts.3.*")
    parser.add_argument("--peers-only", action="store_true", help="leave ours out")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.shared, args.peers = args.shared.resolve(), pairs(args.peer)
    args.models = {name: Path(path).resolve() for name, path in pairs(args.model).items()}
    tools = list(args.peers) if args.peers_only else [OURS, *args.peers]
    rows = [cell(args, tool, name, fmt) for name in args.models for fmt in args.format for tool in tools]
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
