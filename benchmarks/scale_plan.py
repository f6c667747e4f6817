"""What a model on many GPUs takes, from rates measured on one layer: seconds, memory and traffic, for each layer.

    python benchmarks/speed.py --shapes deepseek-v3 > speed.json
    python benchmarks/scale_plan.py speed.json --processes 1 8 16

A phase of a layer takes its work over (what one GPU can do × the fraction of its machine that `speed.py` measured for
this phase × processes). What the GPU can do is its data sheet's; bytes between processes and from the disk are those
that `pipeline/distributed.py` moves. Where `speed.json` was measured on a CPU, fractions are a CPU's: a plan, not a
measurement. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU and its surroundings, by their data sheets; bytes and operations a second."""

    bf16: float
    fp32: float
    copy: float  # read and written
    memory: float  # bytes
    link: float  # to the other GPUs of a machine, one way
    network: float  # to GPUs of another machine, one way
    disk: float  # of a machine


# NVIDIA H200 SXM: 989 TFLOP/s bf16 and 67 fp32 (dense), 4.8 TB/s, 141 GB, NVLink 900 GB/s both ways together;
# beside each a 400 Gb/s network card, and an array of disks of 12 GB/s a machine
H200 = Device(989e12, 67e12, 4.8e12, 141e9, 450e9, 50e9, 12e9)


@dataclass(frozen=True)
class Model:
    """Sizes of DeepSeek-V3 (its published config): layers with experts, their linears, and what a token reads."""

    layers: int = 58  # with experts; three dense ones before them take a twentieth of one of these each
    experts: int = 256
    shared: int = 1
    top_k: int = 8
    hidden: int = 7168
    inner: int = 2048
    attention: int = 187_107_328

    @property
    def expert_weights(self) -> int:
        """Of all experts of a layer."""
        return 3 * (self.experts + self.shared) * self.hidden * self.inner

    @property
    def layer_weights(self) -> int:
        """Of a layer."""
        return self.expert_weights + self.attention

    @property
    def active(self) -> int:
        """Weights of a layer that a token reads."""
        return 3 * (self.top_k + self.shared) * self.hidden * self.inner + self.attention


def seconds(
    model: Model, device: Device, speed: dict[str, Any], tokens: int, processes: int, local: int
) -> dict[str, float]:
    """Of one layer, phase by phase."""
    fraction = {phase["phase"]: phase["fraction"] for phase in speed["phases"]}
    routed = tokens * model.top_k
    up = model.experts * 2 * model.inner * model.hidden  # weights of gate and up
    down = model.experts * model.inner * model.hidden
    product = 2 * (up * model.hidden + down * model.inner + model.attention * model.hidden)  # weights × Hessian

    def spent(phase: str, work: float, ceiling: float) -> float:
        return work / (ceiling * fraction[phase] * processes)

    compute = {
        "forward, twice": spent("forward", 4 * tokens * model.active, device.bf16),
        "Hessians": spent("Hessian", routed * (model.hidden**2 + model.inner**2), device.bf16),
        "factor": spent("factor", model.experts * (model.hidden**3 + model.inner**3) / 3, device.fp32),
        "scales": spent("scales", 17 * 8 * model.layer_weights, device.fp32),
        "walk": spent("walk", product / 2, device.fp32),
        "more": spent("more", 6 * product, device.fp32),
    }
    # --- bytes: every machine reads every layer once (its processes find it cached); rows go to the experts' owners;
    # solved weights go to all
    away = 1 - 1 / processes
    rows = routed / processes * (model.hidden + model.inner) * 2 * away
    weights = model.layer_weights * 2 * away
    machines = -(-processes // local)
    link = device.link if machines == 1 else device.network
    packed, stream = model.layer_weights * 4.125 / 8, 2 * tokens * model.hidden
    moved = {
        "rows to owners": rows / link,
        "weights to all": weights / link,
        "codes and activations to the first": (packed + stream) * away / link,
        "read": model.layer_weights / device.disk,  # FP8: a byte a weight
        "write": (packed + stream) / device.disk,
    }
    return {**compute, **(moved if processes > 1 else {k: moved[k] for k in ("read", "write")})}


def memory(model: Model, tokens: int, processes: int) -> dict[str, float]:
    """Bytes of one process at its peak."""
    return {
        "layer, bf16": 2 * model.layer_weights,
        "next layer, read ahead": 2 * model.layer_weights,
        "Hessians of its experts": 4 * model.experts / processes * (model.hidden**2 + model.inner**2),
        "one chunk's rows": 8192 * model.top_k * (model.hidden + 3 * model.inner) * 2,
        "activations": 2 * tokens * model.hidden,
        "solver's workspace": 10 * 4 * 2**24 * 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speed", type=Path, help="what speed.py printed for deepseek-v3")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--local", type=int, default=8, help="GPUs of a machine")
    parser.add_argument("--tokens", type=int, default=512 * 2048)
    args = parser.parse_args()
    speed = next(s for s in json.loads(args.speed.read_text())["layers"] if s["shape"] == "deepseek-v3")
    model = Model()
    plans = []
    for processes in args.processes:
        layer = seconds(model, H200, speed, args.tokens, processes, args.local)
        held = memory(model, args.tokens, processes)
        plans.append(
            {
                "processes": processes,
                "seconds_a_layer": {k: round(v, 3) for k, v in layer.items()},
                "seconds_a_layer_total": round(sum(layer.values()), 2),
                "hours": round(sum(layer.values()) * model.layers / 3600, 2),
                "gib_a_process": {k: round(v / GIB, 1) for k, v in held.items()},
                "gib_a_process_total": round(sum(held.values()) / GIB, 1),
            }
        )
    print(json.dumps({"tokens": args.tokens, "layer_weights": model.layer_weights, "plans": plans}, indent=2))


if __name__ == "__main__":
    main()
