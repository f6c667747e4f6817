"""A whole run at the size of OLMoE-1B-7B on one GPU: random weights, 128 × 2048 tokens, INT4 g128.

    python benchmarks/gpu_run.py --scratch /tmp

Writes 13.8 GB of random bf16 weights, quantizes them by the command in a process of its own, prints JSON: seconds by
phase, peak memory, and the floor by operations and bytes at the rates measured in the same run, with the ratio to it.
`--layers 2 --device cpu --samples 2` is a small run of the same, for trying the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alphaquant.models import detect

CONFIG = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_model(path: Path, layers: int, device: str) -> None:
    """Random weights of the published shapes, a shard a layer."""
    config = CONFIG | {"num_hidden_layers": layers}
    spec = detect(config)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return x.normal_(0, shape[-1] ** -0.5, generator=generator).cpu()

    shards: dict[str, dict[str, tuple[int, ...]]] = {
        f"layer-{i}.safetensors": {n: p.shape for p in spec.parameters(i) for n in spec.tensor_names(i, p)}
        for i in range(layers)
    }
    shards["outer.safetensors"] = {f"{p.role}.{p.leaf}": p.shape for p in spec.outer_parameters()}
    for file, shapes in shards.items():
        save_file({name: random(shape) for name, shape in shapes.items()}, path / file)
        weight_map |= dict.fromkeys(shapes, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def floor(layers: int, tokens: int, length: int, device: str) -> dict[str, float]:
    """Seconds of two forward passes and the Hessians' products, and of reading and writing once, at measured rates."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    (a @ a)[0, 0].item()
    begin = time.perf_counter()
    (a @ a)[0, 0].item()
    rate = 2 * size**3 / (time.perf_counter() - begin)
    attention, expert = 4 * 2048**2, 3 * 2048 * 1024
    forward = 2 * tokens * layers * (attention + 8 * expert + length * 2048)
    hessian = tokens * layers * (2 * 2048**2 + 8 * (2048**2 + 1024**2))
    return {"flops_a_second": rate, "seconds": (2 * forward + hessian) / rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="where to make the temporary directory")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: nothing was measured")
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        root = Path(folder)
        write_model(root / "model", args.layers, args.device)
        ids = torch.randint(0, CONFIG["vocab_size"], (args.samples, args.length))
        (root / "tokens.json").write_text(json.dumps(ids.tolist()))
        options = ["--scheme", "int4:g128", "--calib", root / "tokens.json", "--device", args.device, "--json"]
        sizes = ["--nsamples", args.samples, "--seqlen", args.length]
        command = [sys.executable, "-m", "alphaquant", "quantize", root / "model", "-o", root / "out"]
        begin = time.perf_counter()
        done = subprocess.run([*map(str, [*command, *options, *sizes])], capture_output=True, text=True, check=False)
        took = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(done.stderr)
        report: dict[str, Any] = json.loads(done.stdout)
    least = floor(args.layers, args.samples * args.length, args.length, args.device)
    facts = {key: report[key] for key in ("seconds", "peak_memory_bytes", "sizes", "memory_plan")}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        json.dumps(
            {"device": name, "wall_seconds": took, "floor": least, "ratio": took / least["seconds"], **facts}, indent=2
        )
    )


if __name__ == "__main__":
    main()
