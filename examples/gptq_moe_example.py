"""Quantize a Mixture-of-Experts model in mixed precision, and look at what its experts saw and lost.

Without arguments it takes the small mixture that comes with alphaquant, and needs no network. With --transformers the
model is one of transformers, in memory, and stays usable there:

    python examples/gptq_moe_example.py
    python examples/gptq_moe_example.py --model allenai/OLMoE-1B-7B-0924 --config configs/gptq_olmoe_mixed.json
"""

import argparse
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import alphaquant
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.checkpoint import resolve_model
from alphaquant.gptq import GPTQConfig, detect_moe_architecture, gptq_quantize_model

MIXED = {
    "default": {"wq": "int4", "group_size": 64},
    "overrides": [
        {"pattern": "*.self_attn.*", "wq": "mxfp6"},
        {"pattern": "*.mlp.experts.*", "wq": "int3"},
        {"pattern": "*.mlp.experts.*.down_proj", "wq": "mxfp4"},
        {"pattern": "model.layers.0.mlp.experts.*", "wq": "int4", "group_size": 64},
    ],
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(files("alphaquant") / "data" / "demo-model"), help="directory or hub id")
parser.add_argument("--config", type=Path, help="a plan; by default one of this file")
parser.add_argument("--transformers", action="store_true", help="load the model with transformers")
parser.add_argument("--calib", default="bundled", help="wikitext2, c4, bundled, or a file")
parser.add_argument("--nsamples", type=int, default=32)
parser.add_argument("--seqlen", type=int, default=256)
parser.add_argument("--device", default="auto")
parser.add_argument("--out", type=Path, help="directory to keep; by default nothing is kept")
args = parser.parse_args()
directory = resolve_model(args.model)

if args.transformers:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    vocab_size = model.config.vocab_size
else:
    model = alphaquant.load(directory)
    vocab_size = model.spec.vocab_size
tokenizer = load_tokenizer(directory)
tokens = calibration_tokens(
    args.calib, tokenizer, num_samples=args.nsamples, seqlen=args.seqlen, seed=0, vocab_size=vocab_size
)
print(f"architecture: {detect_moe_architecture(model)}")
quantizers = gptq_quantize_model(
    model=model,
    dataloader=[{"input_ids": tokens.ids}],
    layer_config=args.config or MIXED,
    gptq_config=GPTQConfig(routing_power=1.0),
    device=args.device,
)

formats: dict[str, int] = {}
for quantized in quantizers.values():
    formats[str(quantized.scheme)] = formats.get(str(quantized.scheme), 0) + 1
print("modules by format:", ", ".join(f"{count} {name}" for name, count in sorted(formats.items())))
experts = {name: q for name, q in quantizers.items() if ".experts." in name and name.endswith("down_proj")}
for name, quantized in sorted(experts.items(), key=lambda item: item[1].tokens)[:3]:
    print(f"least seen: {name}: {quantized.tokens} tokens, relative loss {quantized.record.relative_loss:.4f}")

with TemporaryDirectory() as folder:
    out = args.out or Path(folder) / "quantized"
    alphaquant.export(quantizers, out, model=model, original=directory)
    quality = alphaquant.evaluate(out, data=args.calib, seqlen=args.seqlen, windows=40, against=directory)
    print(f"perplexity {quality.perplexity:.3f}, original {quality.agreement.original_perplexity:.3f}")
    prompt = torch.tensor([tokenizer.encode("The state of the Union is")])
    print(tokenizer.decode(alphaquant.load(out).generate(prompt, 24)[0].tolist()))
