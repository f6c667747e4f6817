"""Converting between layouts: speed, memory, and a same-layout export beside a plain copy.

    python benchmarks/convert.py --layer-mib 256 --layers 3

Random bf16 weights in a temporary directory are rounded to each format, and the result is exported into every layout
that holds it, each time by a process of its own with one thread. Prints JSON: for each pair MB of shards a second of
CPU and of the clock, and bytes resident at the peak above the imports, also relative to a layer in bf16; for exports
into the same layout the time relative to a copy of the same files, synced, taken in turn, the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import resident_bytes, write_models

TARGETS = ("compressed-tensors", "humming", "gptq_v2", "dense")
SCHEMES = ("int4:g128", "int3:g128", "int2:g64", "int8:channel", "mxfp4", "mxfp6", "nvfp4", "fp8:channel", "fp6:g64")


def export(source: str, out: str, layout: str) -> None:
    """One export in this process; prints what it took."""
    import torch  # noqa: PLC0415

    from alphaquant.numerics import give_back_freed_memory  # noqa: PLC0415
    from alphaquant.pipeline import export_checkpoint  # noqa: PLC0415

    torch.set_num_threads(1)
    give_back_freed_memory()  # as the command does
    baseline, _ = resident_bytes()
    clock, cpu = time.perf_counter(), time.process_time()
    num_bytes = export_checkpoint(Path(source), Path(out), layout)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    _, peak = resident_bytes()
    print(json.dumps({"bytes": num_bytes, "seconds": clock, "cpu_seconds": cpu, "above": peak - baseline}))


def exported(source: Path, out: Path, layout: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--export", str(source), str(out), layout]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def copied(source: Path, out: Path) -> float:
    """Seconds to copy the shards with read and write, each synced as an export does."""
    out.mkdir()
    begin = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as read, (out / path.name).open("wb", buffering=0) as write:
            while piece := read.read(16 << 20):
                write.write(piece)
            os.fsync(write.fileno())
    return time.perf_counter() - begin


def remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()


def same_layout(source: Path, scratch: Path, layout: str, repeats: int) -> float:
    """How much longer an export into the same layout takes than a copy."""
    ratios = []
    for _ in range(repeats):
        seconds = copied(source, scratch / "copy")
        ratios.append(exported(source, scratch / "out", layout)["seconds"] / seconds)
        remove(scratch / "copy")
        remove(scratch / "out")
    return statistics.median(ratios)


def main() -> None:
    if sys.argv[1:2] == ["--export"]:
        export(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("llama", "olmoe"), default="llama", help="dense, or of many experts")
    parser.add_argument("--layer-mib", type=float, default=256, help="size of a layer in bf16")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to make the temporary directory")
    args = parser.parse_args()

    from alphaquant.errors import AlphaQuantError  # noqa: PLC0415
    from alphaquant.pipeline import prepare, quantize_checkpoint  # noqa: PLC0415
    from alphaquant.plan import Plan  # noqa: PLC0415
    from alphaquant.solver import Effort, Method, Recipe  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        root = Path(name)
        layer_bytes = write_models(root, args.family, args.layer_mib, [args.layers])["layer_bytes"]
        for scheme in args.schemes:
            prepared = prepare(root / f"model-{args.layers}", Plan.from_shorthand(scheme))
            source, recipe = root / "source", Recipe(method=Method.RTN, effort=Effort.FAST)
            layout = quantize_checkpoint(prepared, source, recipe=recipe, calibration=None).report["layout"]
            for target in TARGETS:
                try:
                    found = exported(source, root / "out", target)
                except SystemExit as error:
                    if AlphaQuantError.__name__ not in str(error) and "cannot hold" not in str(error):
                        raise
                    continue
                remove(root / "out")
                rows.append(
                    {
                        "scheme": scheme,
                        "from": layout,
                        "to": target,
                        "bytes": found["bytes"],
                        "mb_per_cpu_second": round(found["bytes"] / found["cpu_seconds"] / 1e6, 1),
                        "mb_per_second": round(found["bytes"] / found["seconds"] / 1e6, 1),
                        "above_imports": found["above"],
                        "of_a_layer": round(found["above"] / layer_bytes, 2),
                    }
                )
                if target == layout:
                    rows[-1]["of_a_copy"] = round(same_layout(source, root, layout, args.repeats), 2)
                print(json.dumps(rows[-1]), file=sys.stderr)
            remove(source)
    print(json.dumps({"layer_bytes": layer_bytes, "exports": rows}, indent=2))


if __name__ == "__main__":
    main()
