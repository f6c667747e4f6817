"""Quantize the bundled model from Python, compare it with the original, and generate with the result."""

from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import alphaquant
from alphaquant.calibration import load_tokenizer
from alphaquant.pipeline import Calibration, evaluate_checkpoint, prepare, quantize_checkpoint
from alphaquant.plan import Plan
from alphaquant.solver import Recipe

model = Path(str(files("alphaquant") / "data" / "demo-model"))
with TemporaryDirectory() as folder:
    out = Path(folder) / "int3"
    result = quantize_checkpoint(
        prepare(model, Plan.from_shorthand("int3:g64")),
        out,
        recipe=Recipe(),
        calibration=Calibration("bundled", num_samples=32, seqlen=256),
    )
    print(f"{result.report['sizes']['bits_per_weight']:.2f} bits a quantized weight")
    quality = evaluate_checkpoint(out, data="bundled", seqlen=256, max_windows=40, against=model)
    print(f"perplexity {quality.perplexity:.2f}, original {quality.agreement.original_perplexity:.2f}")

    tokenizer = load_tokenizer(out)
    prompt = torch.tensor([tokenizer.encode("The state of the Union is")])
    print(tokenizer.decode(alphaquant.load(out).generate(prompt, 24)[0].tolist()))
