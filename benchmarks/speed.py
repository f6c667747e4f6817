"""Time by phase of one layer at full width, against what the machine can do; and the solver's share of a whole run.

    python benchmarks/speed.py --shapes olmoe qwen --threads 1
    python benchmarks/speed.py --shapes all --device cuda --experts 64 --tokens 262144

Weights are random, activations correlated. On a CPU a few experts and few tokens are measured, and what a whole layer
takes on `--whole-tokens` is the measured rates times its work. Ceilings (products and copies) are measured in between.
Work is counted by formula: forward 2 a weight and token that reads it, Hessian I² a row, factor I³/3, walk O·I²;
`more` is what the default effort does beyond one search and one walk: two walks of O·I², a refit of 3·O·I², two
sweeps of refinement, which with the gradient that they start from take 5·O·I², and the row's energy, 2·O·I².
A step of tuning, beside its passes, reads places three times, writes them once, and weights and gradients go from fp32
to bf16 and back; it is no part of the layer's time. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.checkpoint import Checkpoint, write_shard
from alphaquant.formats import FORMATS, QuantizedTensor, Scheme
from alphaquant.layouts import LAYOUTS
from alphaquant.models import MoESpec
from alphaquant.models.moe import feed_forward
from alphaquant.numerics import keep_freed_memory
from alphaquant.solver import (
    WORKSPACE_WEIGHTS,
    HessianSum,
    Places,
    Recipe,
    experts_a_part,
    factorize,
    quantize_stack,
    search_scales,
    solve,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One kind of linear in a layer: `experts` of `[out, in]`, of which a token reads `top_k`."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    attention: int  # weights of q, k, v and o
    attention_widths: tuple[int, ...]  # inputs of their Hessians


SHAPES = {
    "olmoe": Shape(64, 8, 2048, 1024, 4 * 2048**2, (2048, 2048)),
    "qwen": Shape(60, 4, 2048, 1408, 4 * 2048**2, (2048, 2048)),
    "mixtral": Shape(8, 2, 4096, 14336, 2 * 4096**2 + 2 * 4096 * 1024, (4096, 4096)),
    "deepseek-v3": Shape(256, 8, 7168, 2048, 187_107_328, (7168, 16384)),
}
MEASURED_EXPERTS = {"olmoe": 4, "qwen": 4, "mixtral": 1, "deepseek-v3": 4}
STEP_BYTES = 16 + 10 + 14  # places; weights written, read and rounded; gradients widened, then read twice
SOLVER = ("factor", "scales", "walk", "more")
REPEATS = 3


def synchronized(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(
    run: Callable[[], Any],
    device: torch.device,
    repeats: int = REPEATS,
    middle: Callable[[list[float]], float] = median,
) -> float:
    """Median time of a call; the first, which compiles and fills caches, is not counted where there are several.

    One thread of a CPU is timed by what it has worked, which other work beside it disturbs less.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats + (repeats > 1)):
        synchronized(device)
        begin = clock()
        run()
        synchronized(device)
        times.append(clock() - begin)
    return middle(times[repeats > 1 :])


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s of large products in bf16 and fp32, and bytes/s of a copy (read and written): the best of several."""
    size = 8192 if device.type == "cuda" else 1536
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(size, size, device=device, dtype=dtype)
        found[name] = 2 * size**3 / seconds(lambda a=a: a @ a, device, 9, min)
    block = torch.empty(1 << 26, dtype=torch.float32, device=device).normal_()
    found["copy"] = 2 * block.nbytes / seconds(block.clone, device, 9, min)
    return found


def correlated(rows: int, width: int, device: torch.device) -> Tensor:
    """Rows with a falling spectrum, as activations have."""
    generator = torch.Generator(device).manual_seed(0)
    rank = min(width, 512)
    mix = torch.randn(rank, width, generator=generator, device=device)
    mix *= torch.arange(1, rank + 1, device=device)[:, None] ** -0.5
    x = torch.randn(rows, rank, generator=generator, device=device) @ mix
    return (x + 0.1 * torch.randn(rows, width, generator=generator, device=device)).bfloat16()


@dataclass(frozen=True)
class Phase:
    """One phase, measured on a part, and what it comes to for the whole layer."""

    phase: str
    seconds: float
    rate: float  # FLOP/s, or bytes/s
    ceiling: str
    fraction: float
    whole_seconds: float


def measured(name: str, shape: Shape, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All phases of one layer."""
    limits = ceilings(device)
    scheme = Scheme(FORMATS[args.format], args.group)
    experts = min(args.experts or MEASURED_EXPERTS[name], shape.experts)
    tokens, whole = args.tokens, args.whole_tokens
    phases: list[Phase] = []

    def note(phase: str, took: float, work: float, ceiling: str, whole_work: float) -> None:
        rate = work / took
        phases.append(Phase(phase, took, rate, ceiling, rate / limits[ceiling], whole_work / rate))

    matrices = {"up": (2 * shape.inner, shape.hidden), "down": (shape.hidden, shape.inner)}  # gate and up are one
    layer_weights = 3 * shape.experts * shape.hidden * shape.inner + shape.attention
    weights = {key: (torch.randn(experts, *size, device=device) * 0.02).bfloat16() for key, size in matrices.items()}

    # --- read and write
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        path = Path(folder)
        stored = {f"{key}.{e}": w for key, stack in weights.items() for e, w in enumerate(stack.cpu())}
        num_bytes = sum(w.nbytes for w in stored.values())
        took = seconds(lambda: write_shard(path / "model.safetensors", stored, {}), device, 1)
        packed_bits = scheme.bits_per_weight(shape.inner, shape.hidden)
        note("write", took, num_bytes, "copy", layer_weights * packed_bits / 8)
        (path / "config.json").write_text("{}")
        checkpoint = Checkpoint.open(path)
        took = seconds(lambda: [checkpoint.read(key).to(device) for key in stored], device)
        note("read", took, num_bytes, "copy", 2 * layer_weights)

    # --- forward: experts and attention's products; twice over a run, once to collect and once to go on
    x = correlated(tokens, shape.hidden, device)
    moe = MoESpec(experts, min(shape.top_k, experts), shape.inner, normalize_top_k=True)
    layer = {
        "mlp.gate.weight": torch.randn(experts, shape.hidden, device=device).bfloat16() * 0.02,
        "mlp.experts.gate_proj.weight": weights["up"][:, : shape.inner],
        "mlp.experts.up_proj.weight": weights["up"][:, shape.inner :],
        "mlp.experts.down_proj.weight": weights["down"],
    }
    with torch.no_grad():
        took = seconds(lambda: feed_forward(x[None], layer, moe), device)
    a_token = 6 * shape.hidden * shape.inner
    whole_forward = 2 * whole * (shape.top_k * a_token + 2 * shape.attention)
    note("forward", took, tokens * moe.top_k * a_token, "bf16", whole_forward)

    # --- Hessians: rows of the experts, and of attention
    rows = tokens * moe.top_k
    flops = whole_flops = took = 0.0
    for width in (shape.hidden, shape.inner):
        x_RI = correlated(rows, width, device)
        counts = [rows // experts] * experts
        counts[0] += rows - sum(counts)
        score_R = torch.rand(rows, device=device)
        total = HessianSum(experts, width, 1.0, device)
        took += seconds(lambda t=total, x=x_RI, c=counts, s=score_R: t.add(x, c, s), device)
        flops += rows * width**2
        whole_flops += whole * shape.top_k * width**2
        if width == shape.hidden:
            h_up = total.normalized()
        else:
            h_down = total.normalized()
    whole_flops += whole * sum(width**2 for width in shape.attention_widths)
    note("Hessian", took, flops, "bf16", whole_flops)

    # --- the solver, in parts of its workspace as a run does it
    solver: dict[str, float] = {}
    for key, mean_EII in (("up", h_up), ("down", h_down)):
        out_features, in_features = matrices[key]
        at_once = min(experts, experts_a_part(out_features, in_features, WORKSPACE_WEIGHTS))
        w, h = weights[key][:at_once].float(), mean_EII[:at_once]
        damping = torch.full((at_once,), 0.01)
        times = {}
        factor = factorize(h, damping)
        times["factor"] = seconds(lambda h=h, d=damping: factorize(h, d), device, 1)
        scales = search_scales(w, scheme)
        times["scales"] = seconds(lambda w=w: search_scales(w, scheme), device, 1)
        start = solve(w, factor, scheme, scales)
        times["walk"] = seconds(lambda w=w, f=factor, s=scales: solve(w, f, scheme, s), device, 1)
        evidence_E = torch.full((at_once,), float(rows), device=device)
        method = seconds(lambda w=w, h=h, e=evidence_E: quantize_stack(w, h, e, scheme, Recipe()), device, 1)
        times["more"] = method - sum(times.values())
        for phase, value in times.items():
            solver[f"{phase} {key}"] = value * shape.experts / at_once
    attention_share = shape.attention / (3 * shape.hidden * shape.inner * shape.experts)
    for phase in SOLVER:
        whole_seconds = sum(v for k, v in solver.items() if k.startswith(phase)) * (1 + attention_share)
        work = 0.0
        for out_features, in_features in matrices.values():
            each = {
                "factor": in_features**3 / 3,
                "scales": (17 if args.format.startswith("int") else 41) * 8 * out_features * in_features,
                "walk": out_features * in_features**2,
                "more": (2 + 3 + 5 + 2) * out_features * in_features**2,
            }[phase]
            work += shape.experts * each * (1 + attention_share)
        rate = work / whole_seconds
        phases.append(Phase(phase, whole_seconds, rate, "fp32", rate / limits["fp32"], whole_seconds))

    # --- pack
    codes = start.quantized
    one = QuantizedTensor(codes.codes[0].cpu(), codes.scale[0].cpu(), None, None, scheme)
    took = seconds(lambda: LAYOUTS[args.layout].tensors("m", one), torch.device("cpu"))
    note("pack", took, one.codes.numel(), "copy", layer_weights)

    # --- a step of tuning, without its forward and backward pass; by default there are none
    places, w = Places.of(codes, torch.zeros(codes.codes.shape, device=device)), weights["down"][: len(codes.codes)]

    def step() -> None:
        w.copy_(places.weights())
        places.move(w, 1.0)  # as the gradient, which is of the weights' type

    took = seconds(step, device)
    tuning = {
        "nanoseconds_a_weight": took / w.numel() * 1e9,
        "of_a_copy": STEP_BYTES * w.numel() / took / limits["copy"],
    }

    total = sum(p.whole_seconds for p in phases)
    by_name = {p.phase: p.whole_seconds for p in phases}
    share = sum(by_name[p] for p in SOLVER) / total
    return {
        "shape": name,
        "measured": {"experts": experts, "tokens": tokens, "format": args.format, "group": args.group},
        "ceilings": limits,
        "phases": [asdict(p) for p in phases],
        "nanoseconds_a_weight": {phase: by_name[phase] * 1e9 / layer_weights for phase in SOLVER},
        "step_of_tuning": tuning,
        "whole_layer": {"tokens": whole, "seconds": total, "solver_share": share},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["olmoe"], choices=[*SHAPES, "all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the measured forward pass and Hessians")
    parser.add_argument("--whole-tokens", type=int, default=128 * 2048, help="tokens of the run that is extrapolated")
    parser.add_argument("--experts", type=int, help="experts to measure; 1 to 4 by default")
    parser.add_argument("--format", default="int4", choices=sorted(FORMATS), help="a format with scales of 16 bits")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--layout", default="humming", choices=sorted(LAYOUTS))
    parser.add_argument("--scratch", type=Path, help="where to make the temporary directory")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command does
    device = torch.device(args.device)
    names = list(SHAPES) if "all" in args.shapes else args.shapes
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "layers": [measured(name, SHAPES[name], args, device) for name in names],
    }
    print(json.dumps(result, indent=2))


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    main()
