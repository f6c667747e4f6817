"""Quantize the bundled model from Python, compare it with the original, and generate with the result."""

from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import alphaquant
from alphaquant.calibration import load_tokenizer

model = files("alphaquant") / "data" / "demo-model"
with TemporaryDirectory() as folder:
    out = Path(folder) / "int3"
    calibration = alphaquant.Calibration("bundled", num_samples=32, seqlen=256)
    result = alphaquant.quantize(model, out, "int3:g64", calibration=calibration)
    print(f"{result.report['sizes']['bits_per_weight']:.2f} bits a quantized weight")
    quality = alphaquant.evaluate(out, data="bundled", seqlen=256, windows=40, against=model)
    print(f"perplexity {quality.perplexity:.2f}, original {quality.agreement.original_perplexity:.2f}")

    tokenizer = load_tokenizer(out)
    prompt = torch.tensor([tokenizer.encode("The state of the Union is")])
    print(tokenizer.decode(alphaquant.load(out).generate(prompt, 24)[0].tolist()))
