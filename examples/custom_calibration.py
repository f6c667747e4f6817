"""Calibrate on a text of your own, and see what that is worth on more of its kind.

Here the texts are Python's own modules, written as JSON lines with a "text" each; lines with "messages" (a list of
role and content, put through the model's chat template) work in the same way. On the command line the file goes to
`alphaquant quantize MODEL --calib FILE`.

    python examples/custom_calibration.py
    python examples/custom_calibration.py --model allenai/OLMoE-1B-7B-0924 --nsamples 128 --seqlen 2048
"""

import argparse
import json
import sysconfig
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import alphaquant

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(files("alphaquant") / "data" / "demo-model"), help="directory or hub id")
parser.add_argument("--scheme", default="int3:g64")
parser.add_argument("--nsamples", type=int, default=64)
parser.add_argument("--seqlen", type=int, default=256)
args = parser.parse_args()

with TemporaryDirectory() as scratch:
    folder = Path(scratch)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in modules if path.stat().st_size > 20_000][:40]
    for name, part in (("own", texts[::2]), ("held-out", texts[1::2])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, source in (("the bundled text", "bundled"), ("text of its own kind", str(folder / "own.jsonl"))):
        out = folder / Path(source).stem
        calibration = alphaquant.Calibration(source, num_samples=args.nsamples, seqlen=args.seqlen)
        alphaquant.quantize(args.model, out, args.scheme, calibration=calibration)
        held_out = str(folder / "held-out.jsonl")
        quality = alphaquant.evaluate(out, data=held_out, seqlen=args.seqlen, windows=40, against=args.model)
        agreement = quality.agreement
        print(f"calibrated on {name}: perplexity {quality.perplexity:.2f}", end=", ")
        print(f"original {agreement.original_perplexity:.2f}, KL {agreement.kl:.4f} ± {agreement.kl_stderr:.4f}")
