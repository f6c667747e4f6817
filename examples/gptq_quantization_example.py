"""Quantize a model in memory with GPTQ, beside plain rounding, and measure both against the original.

Without arguments it takes the small model that comes with alphaquant, and needs no network:

    python examples/gptq_quantization_example.py
    python examples/gptq_quantization_example.py --model allenai/OLMoE-1B-7B-0924 --scheme int4:g128 --calib wikitext2
"""

import argparse
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import alphaquant
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.checkpoint import resolve_model
from alphaquant.gptq import GPTQConfig, gptq_quantize_model, rtn_quantize_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(files("alphaquant") / "data" / "demo-model"), help="directory or hub id")
parser.add_argument("--scheme", default="int3:g64", help="format of every linear: int4:g128, mxfp4, nvfp4 …")
parser.add_argument("--calib", default="bundled", help="wikitext2, c4, bundled, or a file")
parser.add_argument("--nsamples", type=int, default=32)
parser.add_argument("--seqlen", type=int, default=256)
parser.add_argument("--device", default="auto")
args = parser.parse_args()
directory = resolve_model(args.model)

original = alphaquant.load(directory)
tokens = calibration_tokens(
    args.calib,
    load_tokenizer(directory),
    num_samples=args.nsamples,
    seqlen=args.seqlen,
    seed=0,
    vocab_size=original.spec.vocab_size,
)
with TemporaryDirectory() as folder:
    for name in ("rtn", "gptq"):
        model = alphaquant.load(directory)  # it is quantized in place
        if name == "rtn":
            quantizers = rtn_quantize_model(model, args.scheme, device=args.device)
        else:
            quantizers = gptq_quantize_model(
                model=model,
                dataloader=tokens.ids.split(8),  # any iterable of [B, L] token ids, such as a DataLoader
                layer_config=args.scheme,
                gptq_config=GPTQConfig(damping=0.01, routing_power=1.0),
                device=args.device,
            )
        out = Path(folder) / name
        alphaquant.export(quantizers, out, model=model, original=directory)
        quality = alphaquant.evaluate(
            out, data=args.calib, seqlen=args.seqlen, windows=40, against=directory, device="cpu"
        )
        print(f"{name}: perplexity {quality.perplexity:.3f}, original {quality.agreement.original_perplexity:.3f}")
