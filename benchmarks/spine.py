"""tiny-olmoe against the peers: quality at INT2-4 symmetric g64, and time of the INT4 run, interleaved.

    python benchmarks/spine.py --shared ../shared --llmcompressor LC/bin/python --gptqmodel GM/bin/python --quality
    python benchmarks/spine.py --shared ../shared --llmcompressor LC/bin/python --batched 16 --speed --layer

Each peer is the Python of an environment of its own (`--shared` holds the scripts that run it); without one it is
left out. `--layer` takes the time of one layer of OLMoE's widths instead, with 8 experts of random weights and 32 × 256
tokens. Everything runs with `--threads` threads. Seconds leave out start-up, loading the tokenizer's text and, for
the peers, reading and writing the model; for alphaquant they take reading and writing in, but for figures that say so.
`--solver` compares the seconds of Hessians and solver alone, ours and llm-compressor's. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import alphaquant
from alphaquant.numerics import keep_freed_memory
from alphaquant.pipeline import Calibration
from alphaquant.solver import HessianSum

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


def write_layer(folder: Path, source: Path) -> Path:
    """One OLMoE layer at its full widths with 8 experts, of which a token takes 2, and the source's vocabulary."""
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    config |= {"num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.0.self_attn.{name}_proj": (2048, 2048) for name in "qkvo"}
    for expert in range(8):
        shapes |= {f"model.layers.0.mlp.experts.{expert}.{name}_proj": (1024, 2048) for name in ("gate", "up")}
        shapes[f"model.layers.0.mlp.experts.{expert}.down_proj"] = (2048, 1024)
    shapes |= {"model.layers.0.mlp.gate": (8, 2048)}
    shapes |= dict.fromkeys(("model.embed_tokens", "lm_head"), (config["vocab_size"], 2048))
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    norms += ("layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm")
    tensors |= {f"model.{name}": torch.ones(2048) for name in norms}
    save_file({f"{name}.weight": x.bfloat16() for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def ours(args: argparse.Namespace, bits: int, seed: int, effort: str, *, quality: bool) -> dict[str, float]:
    data, model = args.shared / "data" / "wikitext2", args.model
    command = [sys.executable, "-m", "alphaquant"]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        plan = ["--scheme", f"int{bits}:g64", "--effort", effort, "--seed", str(seed), "--json"]
        calibration = ["--calib", str(data / "train.txt"), "--nsamples", str(args.nsamples), "--seqlen", "256"]
        report = json.loads(run([*command, "quantize", str(model), *plan, *calibration, "-o", out], args.threads))
        seconds = report["seconds"]
        whole = seconds["total"] - seconds["tokenize"]
        row = {"seconds": whole, "seconds_with_tokens": seconds["total"]}
        row["seconds_without_files"] = whole - seconds["read"] - seconds["write"]
        if quality:
            text = ["--data", str(data / "valid.txt"), "--seqlen", "256", "--windows", "300"]
            row |= json.loads(run([*command, "eval", out, *text, "--against", str(model), "--json"], args.threads))
    return row


def solver_seconds(args: argparse.Namespace, effort: str) -> dict[str, float]:
    """Of a run in this process, what Hessians took and what factors, scales, walks and refinement did."""
    spent, add = 0.0, HessianSum.add

    def timed(*rows: object) -> None:
        nonlocal spent
        begin = time.perf_counter()
        add(*rows)
        spent += time.perf_counter() - begin

    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command does
    calibration = Calibration(str(args.shared / "data" / "wikitext2" / "train.txt"), args.nsamples, 256)
    plan = {"default": {"wq": "int4", "group_size": 64}}
    HessianSum.add = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = alphaquant.GPTQConfig(effort=effort)
            run = alphaquant.quantize(args.model, f"{folder}/out", plan, gptq_config=config, calibration=calibration)
    finally:
        HessianSum.add = add
    return {"hessian": spent, "solve": run.report["seconds"]["solve"]}


def peer(args: argparse.Namespace, tool: str, bits: int, seed: int, *, batched: int = 0) -> dict[str, Any]:
    script = args.shared / "peers" / {"llmcompressor": "llmcompressor_gptq.py", "gptqmodel": "gptqmodel_gptq.py"}[tool]
    data = args.shared / "data" / "wikitext2"
    options = ["--bits", str(bits), "--seed", str(seed), "--calib", str(data / "train.txt")]
    options += ["--nsamples", str(args.nsamples), "--windows", str(300 if args.quality else 1)]
    options += ["--batched", str(batched)] if batched else []
    with tempfile.TemporaryDirectory() as folder:
        timer = [str(Path(__file__).parent / "peers" / "time_llmcompressor.py")] if args.solver else []
        command = [
            getattr(args, tool),
            *timer,
            str(script),
            str(args.model),
            *options,
            "--data",
            str(data / "valid.txt"),
        ]
        output = run(command, args.threads, Path(folder))
    lines = dict(line.split(" ", 1) for line in output.splitlines() if line.startswith(("RESULT ", "SOLVER ")))
    return json.loads(lines["RESULT"]) | ({"solver": json.loads(lines["SOLVER"])} if args.solver else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--llmcompressor", help="Python of an environment with llm-compressor")
    parser.add_argument("--gptqmodel", help="Python of an environment with GPTQModel")
    parser.add_argument("--batched", type=int, help="time llm-compressor with batched_quantization too, of this size")
    parser.add_argument("--layer", action="store_true", help="time one layer of OLMoE's widths")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--quality", action="store_true", help="measure perplexity and KL")
    parser.add_argument("--speed", action="store_true", help="measure time, interleaved")
    parser.add_argument("--solver", action="store_true", help="measure Hessians and solver alone, in turn")
    args = parser.parse_args()
    args.shared = args.shared.resolve()
    args.model, args.nsamples = args.shared / "models" / "tiny-olmoe", 128
    with tempfile.TemporaryDirectory() as folder:
        if args.layer:
            args.model, args.nsamples = write_layer(Path(folder), args.model), 32
        print(json.dumps(results(args), indent=2))


def results(args: argparse.Namespace) -> dict[str, object]:
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
                files = f"{ALPHAQUANT} --effort {effort}, neither read nor written"
                seconds.setdefault(files, []).append(row["seconds_without_files"])
            for tool in tools:
                seconds.setdefault(tool, []).append(peer(args, tool, 4, pair)["seconds"])
            if args.batched and args.llmcompressor:
                took = peer(args, "llmcompressor", 4, pair, batched=args.batched)["seconds"]
                seconds.setdefault(f"llmcompressor, batched {args.batched}", []).append(took)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        result["seconds"] = seconds
        result["ratio"] = {
            f"{tool} / {name}": medians[tool] / medians[name]
            for tool in medians
            for name in medians
            if name.startswith(ALPHAQUANT) and not tool.startswith(ALPHAQUANT)
        }
    if args.solver:
        parts: dict[str, list[dict[str, float]]] = {}
        for pair in range(args.pairs):
            for effort in ("fast", "default"):
                parts.setdefault(f"{ALPHAQUANT} --effort {effort}", []).append(solver_seconds(args, effort))
            for batched in {0, args.batched or 0} if args.llmcompressor else ():
                took = peer(args, "llmcompressor", 4, pair, batched=batched)["solver"]
                parts.setdefault(f"llmcompressor, batched {batched}" if batched else "llmcompressor", []).append(took)
        result["solver"] = parts
    return result


if __name__ == "__main__":
    main()
