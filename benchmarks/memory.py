"""Peak memory of a run against the number of layers: what is above the import baseline must not grow with it.

    python benchmarks/memory.py --layer-mib 256 --layers 2 8
    python benchmarks/memory.py --layer-mib 256 --layers 48 --effort fast --max-memory 4GiB

Random bf16 weights are written layer by layer into a temporary directory (the largest model's size, and a third of that
for the results), quantized by the command itself in a process of its own for each number of layers. Prints JSON: bytes
resident after the imports, at the peak, the difference, and its ratio between the most and the fewest layers.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = 512
EXPERT_WIDTH = 512
TOKENS = (8, 256)  # windows and their length: few, but enough that no linear of a layer of 256 MiB is rounded


def shape(family: str, layer_mib: float) -> dict[str, int]:
    """Sizes of a model whose layers have about so many MiB in bf16."""
    weights = layer_mib * 2**20 / 2
    if family == "olmoe":
        hidden = EXPERT_WIDTH
        experts = max(2, round((weights - 4 * hidden**2) / (3 * hidden * EXPERT_WIDTH)))
        sizes = {"intermediate_size": EXPERT_WIDTH, "num_experts": experts, "num_experts_per_tok": 2}
    else:
        hidden = max(128, round(math.sqrt(weights / 10) / 128) * 128)
        inner = max(128, round((weights - 4 * hidden**2) / (3 * hidden) / 128) * 128)
        sizes = {"intermediate_size": inner}
    return {"hidden_size": hidden, "num_attention_heads": hidden // 64, **sizes}


def write_models(root: Path, family: str, layer_mib: float, counts: list[int]) -> dict[str, Any]:
    """Write the largest model, and the others as links to its first layers; returns the config."""
    import torch  # noqa: PLC0415  (the measured process must not share what is imported here)
    from safetensors.torch import save_file  # noqa: PLC0415

    from alphaquant.models import detect  # noqa: PLC0415

    config: dict[str, Any] = {
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": max(counts),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": TOKENS[1],
        "dtype": "bfloat16",
        **shape(family, layer_mib),
    }
    spec = detect(config)
    generator = torch.Generator().manual_seed(0)

    def random(size: tuple[int, ...]) -> Any:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, size[-1] ** -0.5, generator=generator)

    store = root / "store"
    store.mkdir()
    shards: dict[str, dict[str, tuple[int, ...]]] = {
        "outer": {f"{p.role}.{p.leaf}": p.shape for p in spec.outer_parameters()}
    }
    for layer in range(spec.num_layers):
        shards[f"layer-{layer}"] = {
            name: p.shape for p in spec.parameters(layer) for name in spec.tensor_names(layer, p)
        }
    for file, shapes in shards.items():
        save_file({name: random(size) for name, size in shapes.items()}, store / f"{file}.safetensors")
    for count in counts:
        model = root / f"model-{count}"
        model.mkdir()
        used = ["outer", *(f"layer-{layer}" for layer in range(count))]
        for file in used:
            (model / f"{file}.safetensors").hardlink_to(store / f"{file}.safetensors")
        weight_map = {name: f"{file}.safetensors" for file in used for name in shards[file]}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    rows = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    (root / "tokens.json").write_text(json.dumps(rows.tolist()))
    config["layer_bytes"] = (store / "layer-0.safetensors").stat().st_size
    return config


def resident_bytes() -> tuple[int, int]:
    """Resident size now and at its peak; on Linux that of this program alone, not of the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def measured(arguments: list[str]) -> None:
    """Run the command in this process, and print what it took."""
    from alphaquant.cli import main as command  # noqa: PLC0415

    baseline, _ = resident_bytes()
    sys.argv = ["alphaquant", *arguments]
    try:
        command()
    except SystemExit as stop:
        if stop.code:
            raise
    _, peak = resident_bytes()
    print(json.dumps({"baseline": baseline, "peak": peak, "above": peak - baseline}))


def run(root: Path, count: int, scheme: str, effort: str, max_memory: str | None) -> dict[str, Any]:
    """Quantize the model of so many layers in a process of its own."""
    options = f"--scheme {scheme} --effort {effort} --nsamples {TOKENS[0]} --seqlen {TOKENS[1]} --device cpu --json"
    arguments = ["quantize", root / f"model-{count}", "-o", root / f"out-{count}", "--calib", root / "tokens.json"]
    options += f" --max-memory {max_memory}" if max_memory else ""
    command = [sys.executable, __file__, "--measured", *map(str, arguments), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    report, _, figures = done.stdout.strip().rpartition("\n")
    content = json.loads(report)
    return {
        "layers": count,
        "model_bytes": content["sizes"]["before_bytes"],
        **json.loads(figures),
        "foretold": content["memory_plan"]["peak_bytes"],
        "passes": content["memory_plan"]["passes"],
        "events": len(content["events"]),
        "seconds": content["seconds"]["total"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--measured"]:
        measured(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("llama", "olmoe"), default="llama", help="dense, or of many experts")
    parser.add_argument("--layer-mib", type=float, default=256, help="size of a layer in bf16")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8], help="models to compare")
    parser.add_argument("--scheme", default="int4:g128")
    parser.add_argument("--effort", default="default", choices=("fast", "default", "best"))
    parser.add_argument("--max-memory", help="limit of the run, such as 4GiB")
    parser.add_argument("--scratch", type=Path, help="where to make the temporary directory")
    args = parser.parse_args()
    counts = sorted(set(args.layers))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        root = Path(scratch)
        config = write_models(root, args.family, args.layer_mib, counts)
        runs = [run(root, count, args.scheme, args.effort, args.max_memory) for count in counts]
    keys = ("hidden_size", "intermediate_size", "num_experts")
    model = {key: config[key] for key in ("model_type", "layer_bytes", *keys) if key in config}
    settings = {"scheme": args.scheme, "effort": args.effort}
    ratio = round(runs[-1]["above"] / runs[0]["above"], 4)
    print(json.dumps({"model": model, **settings, "runs": runs, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()
