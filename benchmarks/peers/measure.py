"""What every tool is given and how every result is measured: the same tokens, the same figures.

Runs in the environment of each tool, so it needs torch and transformers alone. As a program it measures a checkpoint
that transformers can load against its original: `python measure.py ORIGINAL DIR --text NAME=FILE=WINDOWS …`.

Shapes: L positions, V vocabulary, T tokens, E experts, K chosen experts.
"""

import argparse
import json
import math
import struct
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_LOGITS = 1 << 25  # of a batch of windows
ROUTERS = ("mlp.gate", "block_sparse_moe.gate", "mlp.router")


def arguments(description):
    """Options that all scripts beside this one take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory that the tool writes")
    parser.add_argument("--format", required=True, help="int3:g64, int4:g64:asym, mxfp4, nvfp4")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--nsamples", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="glob pattern of the modules to quantize")
    _measuring(parser)
    return parser.parse_args()


def _measuring(parser):
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE=WINDOWS")
    parser.add_argument("--seqlen", type=int, required=True)


def integer_format(name):
    """Bits, group size and symmetry of `int3:g64` or `int3:g64:asym`; None for a float format."""
    kind, *rest = name.split(":")
    if not kind.startswith("int"):
        return None
    groups = [int(part[1:]) for part in rest if part.startswith("g")]
    return int(kind[3:]), groups[0], "asym" not in rest


def tokenizer_of(model):
    """The tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(model)


def load(model):
    """A checkpoint in bf16."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)


def calibration(args, tokenizer):
    """Windows of the calibration text, as lists of ids: GPTQ's protocol, and the very windows that alphaquant draws."""
    ids = tokenizer(args.calib.read_text())["input_ids"]
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(0, len(ids) - args.seqlen, (args.nsamples,), generator=generator)
    return [ids[start : start + args.seqlen] for start in starts.tolist()]


@torch.no_grad()
def figures(quantized, original, args, tokenizer):
    """For each text: perplexity of both, KL(original ‖ quantized) in nats a token, what predictions and routers share.

    Windows lie side by side from the start of the text; in each, tokens 2 … L are predicted.
    """
    top_k = getattr(original.config, "num_experts_per_tok", None)
    seen = [_watch_routers(model) for model in (quantized, original)]
    result = {}
    for text in args.text:
        name, file, count = text.split("=")
        ids = torch.tensor(tokenizer(Path(file).read_text())["input_ids"])
        windows = ids[: len(ids) // args.seqlen * args.seqlen].view(-1, args.seqlen)[: int(count)]
        rows = []
        for x_BL in windows.split(max(1, _LOGITS // (args.seqlen * original.config.vocab_size))):
            for routers in seen:
                routers.clear()
            log_q, log_p = (
                model(input_ids=x_BL).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)
                for model in (quantized, original)
            )
            nll, target = torch.nn.functional.nll_loss, x_BL[:, 1:].flatten()
            row = [nll(log_q, target), nll(log_p, target), (log_p.exp() * (log_p - log_q)).sum(-1).mean()]
            row.append((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())
            row.append(_routing_agreement(*seen, top_k) if seen[1] else torch.tensor(torch.nan))
            rows.append(torch.stack(row).double() * len(x_BL) / len(windows))
        loss, base, kl, same, routing = torch.stack(rows).sum(0).tolist()
        result[name] = {
            "perplexity": math.exp(loss),
            "original": math.exp(base),
            "kl": kl,
            "top1_agreement": same,
            "routing_agreement": None if math.isnan(routing) else routing,
        }
    return result


def _watch_routers(model):
    """A dictionary that each forward pass fills: router's name → its logits `[T, E]`."""
    seen = {}

    def hook(name):
        def keep(_module, _inputs, output):
            logits = output[0] if isinstance(output, tuple) else output
            seen[name] = logits.flatten(0, -2)

        return keep

    for name, module in model.named_modules():
        if name.endswith(ROUTERS):
            module.register_forward_hook(hook(name[name.index("layers.") :]))
    return seen


def _routing_agreement(mine, theirs, top_k):
    """Mean share of a token's chosen experts that both models choose."""
    if mine.keys() != theirs.keys():
        return torch.tensor(torch.nan)
    shares = []
    for name, logits_TE in theirs.items():
        chosen = [torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(top_k, 1).indices, value=True)
                  for x in (mine[name], logits_TE)]  # fmt: skip
        shares.append((chosen[0] & chosen[1]).sum(1).float().mean() / top_k)
    return torch.stack(shares).mean()


def bits_per_weight(original, quantized):
    """Bits of everything that stands in for the weights that are gone, a weight: from the files' own headers."""
    before, after = _tensors(original), _tensors(quantized)
    kept = {name for name, what in after.items() if before.get(name) == what}
    weights = sum(math.prod(what[1]) for name, what in before.items() if name not in after)
    # a weight that stayed under its name, but in another type, is quantized as well
    weights += sum(math.prod(before[name][1]) for name in after if name in before and name not in kept)
    if weights == 0:
        return None
    return 8 * sum(what[2] for name, what in after.items() if name not in kept) / weights


def _tensors(directory):
    """Name → type, shape and bytes of every tensor of a directory of safetensors files."""
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = entry["dtype"], tuple(entry["shape"]), end - begin
    return found


def report(**values):
    """One line of JSON that `quality.py` reads."""
    print("RESULT", json.dumps(values), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original", type=Path)
    parser.add_argument("directory", type=Path)
    _measuring(parser)
    parser.add_argument("--files", type=Path, help="the packed form of DIR, whose bytes are counted")
    args = parser.parse_args()
    texts = figures(load(args.directory), load(args.original), args, tokenizer_of(args.original))
    report(texts=texts, bits_per_weight=bits_per_weight(args.original, args.files or args.directory))


if __name__ == "__main__":
    main()
