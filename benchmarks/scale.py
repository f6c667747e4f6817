"""How a run scales with processes: time by phase of one process and of several, one thread each, in turn.

    python benchmarks/scale.py                                   a layer of 16 experts of 512 × 1,024, 1 and 2 processes
    python benchmarks/scale.py --experts 64 --tokens 65536 --processes 1 2 4

Weights and tokens are random. Between two exchanges a process counts its own seconds of CPU, phase by phase; those of
the one that has most to do between two exchanges, added up, are the critical path: what a phase takes where nothing
else works on the machine. So there are two figures for each phase:

wall         seconds of one process / (processes × seconds of the slowest), by the clock: for a machine that is idle
critical     CPU of one process / (processes × critical path): other work on the machine does not touch it
of_critical  shares of processes × critical path: `work` that one process does too, `exchange`, `more_work` than one
             process has, and `imbalance`, which is waiting for the one that has most to do
of_wall      shares of processes × seconds: `waiting` for others, whatever they do, and `exchange`

`two at once` are two runs of one process beside each other: what the machine loses when both cores work.

Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import distributed as dist

from alphaquant.models import detect
from alphaquant.numerics import keep_freed_memory
from alphaquant.pipeline import Calibration, Team, join, prepare, quantize_checkpoint, stream
from alphaquant.pipeline import run as run_module
from alphaquant.plan import Plan
from alphaquant.solver import Effort, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = 512
Run = list[dict[str, Any]]  # of each process what it spent
PHASES = ("calibrate", "solve", "share", "propagate")


# --- one process of a run


class Meter:
    """What a process spent: seconds by phase, and CPU by phase between exchanges and in them, which take turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.steps: list[dict[str, float]] = [defaultdict(float)]
        self._phase = "other"
        self._cpu = time.process_time()
        self._is_exchanging = False

    def _mark(self) -> None:
        """Count the CPU since the last mark."""
        now = time.process_time()
        self.steps[-1][self._phase] += now - self._cpu
        self.seconds[self._phase]["cpu"] += now - self._cpu
        self._cpu = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count a block to a phase."""
        self._mark()
        before, self._phase = self._phase, name
        wall = time.perf_counter()
        try:
            yield
        finally:
            self._mark()
            self.seconds[name]["wall"] += time.perf_counter() - wall
            self._phase = before

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """One exchange, whatever it is made of: first all wait for the last, then it is made."""
        if self._is_exchanging or not dist.is_initialized():
            yield
            return
        self._mark()
        self.steps.append(defaultdict(float))
        self._is_exchanging, begin = True, time.perf_counter()
        dist.barrier()
        met = time.perf_counter()
        try:
            yield
        finally:
            self._mark()
            self.steps.append(defaultdict(float))
            self._is_exchanging = False
            self.seconds[self._phase]["waiting"] += met - begin
            self.seconds[self._phase]["exchange"] += time.perf_counter() - met


METER = Meter()


class MeteredClock(stream.Clock):
    """The run's clock, which tells the meter too."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """See `Clock`."""
        with METER.phase(phase), super().__call__(phase):
            yield


@dataclass(frozen=True)
class MeteredTeam(Team):
    """A team whose exchanges are timed."""

    METERED: ClassVar = ("exchange", "spread", "tell", "tell_tensors", "gather", "gather_turns")

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in MeteredTeam.METERED:
            return found

        def call(*args, **options):
            with METER.exchange():
                return found(*args, **options)

        return call


def work(folder: Path, out: Path, threads: int, chunk: int, effort: Effort) -> None:
    """Quantize, as one process of a team or alone; leave the seconds beside the output."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the command does
    stream.CHUNK_TOKENS = chunk
    run_module.Clock = MeteredClock
    rows = json.loads((folder / "tokens.json").read_text())
    with join(torch.device("cpu")) as (team, device):
        quantize_checkpoint(
            prepare(folder / "model", Plan.from_shorthand("int4:g128")),
            out,
            recipe=Recipe(effort=effort),
            calibration=Calibration(str(folder / "tokens.json"), len(rows), len(rows[0])),
            device=device,
            team=MeteredTeam(team.rank, team.size),
        )
    out.with_name(f"{out.name}-{team.rank}.json").write_text(
        json.dumps({"seconds": METER.seconds, "steps": METER.steps})
    )


# --- runs of so many processes, and what they took


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """One layer, its embedding and head, and the tokens."""
    config = {
        "model_type": "olmoe",
        "hidden_act": "silu",
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": args.seqlen,
        "dtype": args.dtype,
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "num_attention_heads": args.hidden // 64,
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
    }
    spec, generator = detect(config), torch.Generator().manual_seed(0)
    shapes = {f"{p.role}.{p.leaf}": p.shape for p in spec.outer_parameters()}
    shapes |= {name: p.shape for p in spec.parameters(0) for name in spec.tensor_names(0, p)}

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=spec.dtype)
        return torch.empty(shape, dtype=spec.dtype).normal_(0, shape[-1] ** -0.5, generator=generator)

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    save_file({name: random(shape) for name, shape in shapes.items()}, model / "model.safetensors")
    ids = torch.randint(0, VOCABULARY, (args.tokens // args.seqlen, args.seqlen), generator=generator)
    (folder / "tokens.json").write_text(json.dumps(ids.tolist()))


def start(folder: Path, name: str, processes: int, args: argparse.Namespace) -> subprocess.Popen:
    """A run under way."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", str(folder / name)]
    options = ["--chunk", str(args.chunk), "--threads", str(args.threads), "--effort", args.effort]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(run: subprocess.Popen, folder: Path, name: str, processes: int) -> Run:
    """The seconds of each of its processes."""
    said = run.communicate()[0]
    if run.returncode:
        raise SystemExit(said)
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]


def measured(folder: Path, args: argparse.Namespace) -> dict[str, list[Run]]:
    """For each kind of run its repetitions, of each all processes; the kinds take turns."""
    kinds = [*map(str, args.processes), *(["two at once"] if args.ceiling else [])]
    found: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for repeat in range(args.repeats):
        for kind in kinds:
            # the runs that are made beside each other
            names = [f"{kind}-{repeat}-{i}".replace(" ", "-") for i in range(2 if kind == "two at once" else 1)]
            processes = 1 if kind == "two at once" else int(kind)
            runs = [start(folder, name, processes, args) for name in names]
            pairs = zip(runs, names, strict=True)
            found[kind].append([rank for run, name in pairs for rank in end(run, folder, name, processes)])
    return found


def wall(run: Run, phases: tuple[str, ...], what: str = "wall") -> list[float]:
    """Seconds of each process."""
    return [sum(rank["seconds"].get(phase, {}).get(what, 0.0) for phase in phases) for rank in run]


def critical(run: Run, phases: tuple[str, ...], start: int = 0, step: int = 1) -> float:
    """CPU of the process that has most to do, step by step: `start` 1 and `step` 2 for those of exchanges alone."""
    total = 0.0
    for ranks in list(zip(*(rank["steps"] for rank in run), strict=True))[start::step]:
        busiest = max(ranks, key=lambda parts: sum(parts.values()))
        total += sum(busiest.get(phase, 0.0) for phase in phases)
    return total


def compared(one: list[Run], many: list[Run], phases: tuple[str, ...]) -> dict[str, Any]:
    """Runs of several processes against those of one, in some phases; medians of the repetitions."""
    median, size = statistics.median, len(many[0])
    alone = median(max(wall(run, phases)) for run in one)
    together = median(max(wall(run, phases)) for run in many)
    each = median(statistics.mean(wall(run, phases)) for run in many)
    work = median(sum(wall(run, phases, "cpu")) for run in one)
    all_cpu = median(sum(wall(run, phases, "cpu")) for run in many)
    path = median(critical(run, phases) for run in many)
    exchange = median(critical(run, phases, 1, 2) for run in many)
    of_wall = {
        what: median(statistics.mean(wall(run, phases, what)) for run in many) / each
        for what in ("waiting", "exchange")
    }
    of_critical = {
        "work": work / (size * path),
        "exchange": exchange / path,
        "more_work": (all_cpu - size * exchange - work) / (size * path),
        "imbalance": 1 - all_cpu / (size * path),
    }
    return {
        "seconds": {"wall": [alone, together], "critical": [work, path]},
        "efficiency": {"wall": alone / (size * together), "critical": work / (size * path)},
        "of_critical": of_critical,
        "of_wall": of_wall,
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 3) if isinstance(value, float) else value


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="1 and others, which are compared to it"
    )
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument(
        "--chunk", type=int, default=2048, help="tokens that one process works on at a time (a run: 8,192)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--effort", default="default", choices=[effort.value for effort in Effort])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-ceiling", dest="ceiling", action="store_false", help="leave two at once out")
    parser.add_argument("--scratch", type=Path, help="where to make the temporary directory")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args.worker.parent, args.worker, args.threads, args.chunk, Effort(args.effort))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        write_model(folder, args)
        found = measured(folder, args)
    one = found.pop("1")
    chosen = [*((phase,) for phase in PHASES), ("calibrate", "solve"), PHASES, (*PHASES, "pack", "write")]
    result = {
        "machine": cpu_name(),
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(args).items() if k not in ("worker", "scratch", "processes")},
        "compared": {
            kind: {" + ".join(phases): compared(one, runs, phases) for phases in chosen}
            for kind, runs in found.items()
            if kind != "two at once"
        },
    }
    if args.ceiling:
        median = statistics.median
        result["two at once"] = {
            " + ".join(phases): {
                what: median(max(wall(run, phases, what)) for run in one)
                / median(max(wall(run, phases, what)) for run in found["two at once"])
                for what in ("wall", "cpu")
            }
            for phases in chosen
            if phases != ("share",)
        }
    print(json.dumps(rounded(result), indent=2))


if __name__ == "__main__":
    main()
