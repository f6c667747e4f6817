"""Run by a Python with transformers: greedy tokens of pairs of checkpoints in fp32, and how far logits are apart.

``python transformers_probe.py REQUEST ANSWER``, two JSON files as in ``vllm_probe.py``; nothing of alphaquant is
imported. The answer also has for every model `logits`: the largest difference to the first one's logits.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    """Answer one request."""
    import torch

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"engine": f"transformers {version('transformers')}", "notes": [], "pairs": []}
    with torch.no_grad():
        for pair in request["pairs"]:
            texts: list[list[int]] = []
            reference: list[Any] = []
            answer["pairs"].append([])
            for directory in pair:
                model = _load(directory, trust_remote_code=request["trust_remote_code"])
                tokens = [_greedy(model, prompt, request["new_tokens"]) for prompt in request["prompts"]]
                texts = texts or [p + t for p, t in zip(request["prompts"], tokens, strict=True)]
                logits = [model(torch.tensor([ids])).logits[0].float() for ids in texts]
                reference = reference or logits
                apart = max(float((a - b).abs().max()) for a, b in zip(logits, reference, strict=True))
                answer["pairs"][-1].append({"tokens": tokens, "logits": apart, **_scores(logits, texts)})
                Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _scores(logits: list[Any], texts: list[list[int]]) -> dict[str, Any]:
    logprobs = [each[:-1].log_softmax(-1) for each in logits]
    pairs = list(zip(logprobs, texts, strict=True))
    best = [each.topk(2).values for each in logprobs]
    return {
        "margin": [(each[:, 0] - each[:, 1]).tolist() for each in best],
        "scores": [each[range(len(each)), ids[1:]].tolist() for each, ids in pairs],
        "top": [each.argmax(-1).tolist() for each, _ in pairs],
    }


def _load(directory: str, *, trust_remote_code: bool) -> Any:
    import torch

    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    settings: dict[str, Any] = {}
    quantization = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if quantization is not None:  # all of it before the first product, which would else meet bf16 beside fp32
        settings["quantization_config"] = transformers.CompressedTensorsConfig(run_compressed=False)
    model = load(directory, dtype=torch.float32, trust_remote_code=trust_remote_code, **settings).eval()
    # what it de-quantizes of MX formats stays in bf16, whatever was asked for, and it refuses `model.float()`
    return torch.nn.Module.float(model)


def _greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
