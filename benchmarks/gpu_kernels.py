"""The Triton kernels on a GPU: against the torch code on the CPU from identical Hessians, and their time.

    python benchmarks/gpu_kernels.py --experts 4 --rows 1024 --columns 2048

For each format: the share of codes that equal the CPU's, the ratio of the losses, and seconds of the torch code and of
the kernels on the GPU. Then the grouped Hessian sums: largest error against float64 relative to the diagonal, seconds,
and FLOP/s. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.formats import FORMATS, ScaleKind, Scheme
from alphaquant.solver import Backend, HessianSum, damp, factorize, refine, search_scales, solve

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def schemes() -> list[Scheme]:
    found = []
    for fmt in FORMATS.values():
        group = 16 if fmt.scale is ScaleKind.E4M3 else 32 if fmt.scale is ScaleKind.E8M0 else 128
        found.append(Scheme(fmt, group))
        if fmt.name.startswith("int"):
            found.append(Scheme(fmt, group, symmetric=False))
    return found


def quantized(w: Tensor, h: Tensor, scheme: Scheme, backend: Backend) -> Any:
    factor = factorize(h, torch.full((w.shape[0],), 0.01))
    damped = damp(h, torch.full((w.shape[0],), 0.01))
    start = solve(w, factor, scheme, search_scales(w, scheme), backend=backend)
    return refine(w, damped, start, sweeps=1, backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=65536)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: nothing was measured")
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(args.columns, args.columns, generator=generator) * torch.arange(1, args.columns + 1) ** -0.5
    x = torch.randn(args.experts, 2 * args.columns, args.columns, generator=generator) @ mix
    h = x.transpose(1, 2) @ x / x.shape[1]
    w = torch.randn(args.experts, args.rows, args.columns, generator=generator) * 0.02
    rows = []
    for scheme in schemes():
        truth = quantized(w, h, scheme, Backend.TORCH)
        on_gpu = (w.cuda(), h.cuda(), scheme)
        found = quantized(*on_gpu, Backend.TRITON)
        rows.append(
            {
                "scheme": str(scheme),
                "equal_codes": (found.quantized.codes.cpu() == truth.quantized.codes).double().mean().item(),
                "loss_ratio": (found.loss_EO.sum().cpu() / truth.loss_EO.sum()).item(),
                "seconds_torch": seconds(lambda g=on_gpu: quantized(*g, Backend.TORCH)),
                "seconds_triton": seconds(lambda g=on_gpu: quantized(*g, Backend.TRITON)),
            }
        )
    x_RI = (torch.randn(args.tokens, args.columns, generator=generator) @ mix).bfloat16()
    score_R = torch.rand(args.tokens, generator=generator)
    counts = [args.tokens // args.experts] * args.experts
    grams: dict[str, Any] = {}
    for backend in (Backend.TORCH, Backend.TRITON):
        total = HessianSum(args.experts, args.columns, 1.0, "cuda", backend)
        took = seconds(lambda t=total: t.add(x_RI[: sum(counts)].cuda(), counts, score_R[: sum(counts)].cuda()))
        mean = total.normalized([0]).cpu()[0].double()
        part, weight = x_RI[: counts[0]].double(), score_R[: counts[0]].double()
        exact = (part * weight[:, None]).T @ part / weight.sum()
        grams[backend.value] = {
            "seconds": took,
            "flops": sum(counts) * args.columns**2 / took,
            "largest_error": ((mean - exact).abs().max() / exact.diagonal().mean()).item(),
        }
    print(json.dumps({"device": torch.cuda.get_device_name(), "formats": rows, "hessian": grams}, indent=2))


if __name__ == "__main__":
    main()
