"""SmolLM2 as a mixture of experts: real weights, real routing, and experts that see very few tokens.

    python benchmarks/upcycle.py MODEL OUT --text ../shared/data/wikitext2/train.txt

Any dense Llama becomes a Mixtral with E identical copies of each feed-forward and top-2 routing whose scores are
renormalised: for any router the function is the dense model's (checked here, in fp32), while every expert sees other
tokens. A layer's router is made of the centroids of a spherical k-means over its inputs, less a share of the mean
input, which acts as a bias; the shares are fitted so that the experts get the tokens that `--shares` asks for.

Shapes: T tokens, D hidden, E experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import alphaquant
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.checkpoint import write_shard
from alphaquant.models import attention_half, mlp_half, rope_for
from alphaquant.models.attention import rms_norm

_TOLERANCE = 1e-3
_SHARPNESS = 4.0  # standard deviation of the logits of a router


def centroids(x_TD: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Directions `[E, D]` by a spherical k-means over centred inputs."""
    unit_TD = F.normalize(x_TD - x_TD.mean(0), dim=-1)
    center_ED = unit_TD[torch.randperm(len(unit_TD), generator=generator)[:num_experts]]
    for _ in range(20):
        nearest_T = (unit_TD @ center_ED.T).argmax(-1)
        sums = torch.zeros_like(center_ED).index_add_(0, nearest_T, unit_TD)
        center_ED = F.normalize(torch.where(sums.norm(dim=-1, keepdim=True) > 0, sums, center_ED), dim=-1)
    return center_ED


def router(x_TD: Tensor, shares_E: Tensor, generator: torch.Generator) -> Tensor:
    """Router `[E, D]` whose top-2 gives each expert its share of the tokens (shares sum to 2)."""
    center_ED = centroids(x_TD, len(shares_E), generator)
    center_ED = center_ED * (_SHARPNESS / (x_TD @ center_ED.T).std())
    mean_D = x_TD.mean(0)
    bias_D = mean_D / (x_TD @ mean_D).mean()  # its product with an input is 1 on average
    bias_E = torch.zeros(len(shares_E))
    step = 2.0
    for _ in range(300):
        chosen = (x_TD @ (center_ED + bias_E[:, None] * bias_D).T).topk(2).indices
        got_E = chosen.flatten().bincount(minlength=len(shares_E)) / len(x_TD)
        bias_E += step * (shares_E.log() - got_E.clamp_min(1e-5).log()).clamp(-1, 1)
        step *= 0.985
    return center_ED + bias_E[:, None] * bias_D


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.95, 0.7, 0.347, 0.003], help="they sum to 2")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    dense = alphaquant.load(args.model)
    spec, shares_E, generator = dense.spec, torch.tensor(args.shares), torch.Generator().manual_seed(0)
    ids_NL = calibration_tokens(
        args.text,
        load_tokenizer(args.model),
        num_samples=args.windows,
        seqlen=args.seqlen,
        seed=1,
        vocab_size=spec.vocab_size,
    ).ids
    x_NLD = F.embedding(ids_NL, dense.outer["model.embed_tokens.weight"])
    rope = rope_for(spec, args.seqlen, "cpu")
    tensors = {name: weight for name, weight in dense.outer.items() if name != "lm_head.weight"}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = dense.outer["lm_head.weight"]
    for layer, weights in enumerate(dense.layers):
        x_NLD = attention_half(x_NLD, weights, spec, layer, rope)
        x_TD = rms_norm(x_NLD, weights["post_attention_layernorm.weight"], spec.rms_norm_eps).flatten(0, 1).float()
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = router(x_TD, shares_E, generator).bfloat16()
        for name, weight in weights.items():
            kind = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(name.split(".")[1])
            if not name.startswith("mlp."):
                tensors[f"{prefix}.{name}"] = weight
                continue
            for expert in range(len(args.shares)):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{kind}.weight"] = weight.clone()
        x_NLD = mlp_half(x_NLD, weights, spec, layer)
        print(f"layer {layer}", flush=True)
    args.out.mkdir(parents=True)
    for file in args.model.glob("*token*"):
        shutil.copy(file, args.out)
    write_shard(args.out / "model.safetensors", tensors, {"format": "pt"})
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None}
    config |= {"num_local_experts": len(args.shares), "num_experts_per_tok": 2}
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(key, None)
    (args.out / "config.json").write_text(json.dumps(config, indent=2))
    ids = ids_NL[:2, :64]
    both = [alphaquant.load(path, dtype="fp32").logits(ids) for path in (args.model, args.out)]
    difference = float((both[0] - both[1]).abs().max())
    print(f"largest difference of logits: {difference:.2e}")
    if difference > _TOLERANCE:
        raise SystemExit("the mixture is not the dense model")


if __name__ == "__main__":
    main()
