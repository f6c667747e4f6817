"""Read what a run wrote down, from Python: everything in OUT/alphaquant/ is JSON.

python examples/read_report.py OUT
python examples/read_report.py            # quantizes the model that comes with alphaquant first
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import alphaquant

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", nargs="?", type=Path, help="directory that `alphaquant quantize` made")
parser.add_argument("--nsamples", type=int, default=32, help="calibration windows of the bundled run")
args = parser.parse_args()


def bundled_run(out: Path) -> None:
    """Quantize the bundled model into `out`, and measure it."""
    model = str(files("alphaquant") / "data" / "demo-model")
    calibration = alphaquant.Calibration("bundled", num_samples=args.nsamples, seqlen=256)
    alphaquant.quantize(model, out, "int3:g64", calibration=calibration)
    alphaquant.evaluate(out, data="bundled", seqlen=256, windows=20, against=model)  # which keeps it beside the records


with TemporaryDirectory() as scratch:
    out = args.out or Path(scratch) / "out"
    if args.out is None:
        bundled_run(out)
    notes = out / "alphaquant"
    report = json.loads((notes / "report.json").read_text())
    sizes = report["sizes"]
    print(f"{report['model']['family']}: {sizes['before_bytes']:,} → {sizes['after_bytes']:,} bytes")
    for row in report["summary"]:
        print(f"{row['kind']:>14} {row['scheme']:<12} {row['modules']:>6} modules, loss {row['relative_loss']:.3%}")
    print(f"{len(report['events'])} events, {report['seconds']['total']:.1f} s")

    records = [json.loads(path.read_text()) for path in sorted((notes / "records").glob("*.json"))]
    modules = [module for record in records for module in record["modules"]]
    for module in sorted(modules, key=lambda m: -m["relative_loss"])[:5]:
        print(f"worst: {module['name']}: loss {module['relative_loss']:.3%}, {module['tokens']:,} tokens")
    for record in records:
        if record["routing"] is not None:
            tokens = record["routing"]["tokens"]
            print(f"layer {record['layer']}: an expert saw {min(tokens):,} to {max(tokens):,} tokens")

    for path in sorted((notes / "quality").glob("*.json")):
        quality = json.loads(path.read_text())
        print(f"{path.stem}: perplexity {quality['perplexity']:.3f} ± {quality['stderr']:.3f}, KL {quality['kl']:.4f}")
    print("drawn:", ", ".join(path.name for path in alphaquant.report(out, output=scratch)))
