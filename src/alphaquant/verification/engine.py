"""A checkpoint loaded by the engine that is to serve it, beside its dense twin: do both say the same?

The engine lives in a Python of its own, which a script of `probes/` is given to; nothing of it is imported here.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import ConfigError, EngineError
from alphaquant.layouts import DenseLayout, QuantizedCheckpoint
from alphaquant.models import detect
from alphaquant.pipeline import export_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PROBES", "TIE", "Likeness", "ask", "compare", "compare_with_dense", "likenesses", "random_prompts"]

PROBES = {name: Path(__file__).parent / "probes" / f"{name}_probe.py" for name in ("vllm", "transformers")}
"""For every engine that can be asked, the script that its Python runs."""

TIE = 0.05
"""Nats between the two likeliest tokens below which rounding in the engine may choose either."""

# Where vLLM rounds the inputs of experts to 8 bits some 0.95 and 0.03 were measured (tests_engines/test_vllm.py).
_AGREEMENT, _NATS = 0.9, 0.1

_SETTINGS = (
    "HF_HUB_OFFLINE=1",
    "TOKENIZERS_PARALLELISM=false",
    "TORCHDYNAMO_DISABLE=1",  # one short text does not earn a compilation
    "VLLM_CPU_INT4_W4A8=0",  # its AMX kernel for linears would round inputs that the checkpoint leaves in bf16
    "VLLM_CPU_KVCACHE_SPACE=1",
    "VLLM_ENABLE_V1_MULTIPROCESSING=0",
    "VLLM_LOGGING_LEVEL=ERROR",
    "VLLM_NO_USAGE_STATS=1",
)


@dataclass(frozen=True, slots=True)
class Likeness:
    """How a checkpoint compares with its dense twin in an engine.

    Attributes:
        engine: name and version.
        same_tokens: the share of prompts whose greedy continuations are the same, or part where the twin itself was
            within `TIE` nats of saying something else.
        agreement: over the twin's continuations, the share of positions with the same likeliest token.
        mean_difference: of the log-probability of the token that stands there, in nats.
        largest_difference: the same, at worst.
        logits: the largest difference of two logits, where the engine shows them.
        notes: what the engine was allowed, or lacks.
    """

    engine: str
    same_tokens: float
    agreement: float
    mean_difference: float
    largest_difference: float
    logits: float | None
    notes: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether they differ by no more than an engine's own rounding explains."""
        return self.agreement >= _AGREEMENT and self.mean_difference <= _NATS


def random_prompts(vocab_size: int, count: int = 4, length: int = 12, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = torch.randint(0, vocab_size, (count, length), generator=generator).tolist()
    return drawn


def compare(
    engine: str,
    python: str,
    pairs: Sequence[tuple[Path, Path]],
    prompts: list[list[int]],
    *,
    new_tokens: int = 12,
    trust_remote_code: bool = False,
    timeout: float | None = None,
) -> list[Likeness]:
    """How checkpoints compare with their dense twins in an engine; see `ask`."""
    answer = ask(
        engine, python, pairs, prompts, new_tokens=new_tokens, trust_remote_code=trust_remote_code, timeout=timeout
    )
    return likenesses(answer)


def ask(
    engine: str,
    python: str,
    pairs: Sequence[tuple[Path, Path]],
    prompts: list[list[int]],
    *,
    new_tokens: int = 12,
    trust_remote_code: bool = False,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Let one process of an engine load checkpoints and their dense twins, one after the other; what its probe answers.

    Args:
        engine: a name of `PROBES`.
        python: an interpreter that has the engine.
        pairs: dense twin and checkpoint.
        prompts: token ids.
        new_tokens: greedy tokens after each prompt.
        trust_remote_code: let the engine run code that lies in the checkpoints.
        timeout: seconds for all of them.

    Raises:
        ConfigError: there is no such interpreter.
        EngineError: the engine does not load or run a checkpoint.
    """
    request = {
        "pairs": [[str(path.resolve()) for path in pair] for pair in pairs],
        "prompts": prompts,
        "new_tokens": new_tokens,
        "trust_remote_code": trust_remote_code,
    }
    return _run(engine, python, request, timeout)


def likenesses(answer: dict[str, Any]) -> list[Likeness]:
    """What an answer says of each pair."""
    return [_likeness(answer, twin, other) for twin, other in answer["pairs"]]


def compare_with_dense(
    directory: Path, engine: str, python: str, *, trust_remote_code: bool = False, timeout: float | None = None
) -> Likeness:
    """How a quantized directory compares with its dense export, which is made for this and removed.

    Raises:
        CheckpointError: the directory keeps no codes.
        ConfigError, EngineError: the engine cannot be started, or does not load it.
    """
    source = QuantizedCheckpoint.open(directory)
    vocab_size = detect(source.config, str(directory / "config.json")).vocab_size
    with tempfile.TemporaryDirectory(prefix="alphaquant-dense-") as folder:
        twin = Path(folder) / "dense"
        export_checkpoint(directory, twin, DenseLayout.name)
        prompts = random_prompts(vocab_size)
        (found,) = compare(
            engine, python, [(twin, directory)], prompts, trust_remote_code=trust_remote_code, timeout=timeout
        )
    return found


def _run(engine: str, python: str, request: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="alphaquant-verify-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = ["env", *_SETTINGS, python, str(PROBES[engine]), str(asked), str(answered)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"{engine} did not answer within {timeout:.0f} s", remedy="give it more time") from error
        except OSError as error:
            raise ConfigError(f"{engine} cannot be started: {error.strerror}", where=python) from error
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8")) if answered.exists() else {}
        if done.returncode != 0:
            raise _failure(engine, python, request, answer, done)
    return answer


def _failure(
    engine: str, python: str, request: dict[str, Any], answer: dict[str, Any], done: subprocess.CompletedProcess[bytes]
) -> EngineError | ConfigError:
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"it ended with code {done.returncode} and said nothing"
    if done.returncode == 127 or f"No module named '{engine}'" in last:
        return ConfigError(
            f"{engine} cannot be started: {last}", where=python, remedy="give --python PATH of an interpreter with it"
        )
    seen = sum(map(len, answer.get("pairs", [])))
    at = [path for pair in request["pairs"] for path in pair][seen]
    return EngineError(
        f"{engine} does not serve it: {last}",
        where=at,
        remedy="`alphaquant plan MODEL --engine NAME` shows what an engine takes; the engine's own output ends with:\n"
        + "\n".join(lines[-12:]),
    )


def _likeness(answer: dict[str, Any], first: dict[str, Any], other: dict[str, Any]) -> Likeness:
    def flat(model: dict[str, Any], key: str) -> list[Any]:
        return [item for row in model[key] for item in row]

    pairs = zip(flat(first, "scores"), flat(other, "scores"), strict=True)
    # where the engine gives no number the difference is as large as can be
    apart = [abs(a - b) if math.isfinite(a - b) else math.inf for a, b in pairs]
    return Likeness(
        engine=answer["engine"],
        same_tokens=fmean(
            _same(a, b, margin) for a, b, margin in zip(first["tokens"], other["tokens"], first["margin"], strict=True)
        ),
        agreement=fmean(a == b for a, b in zip(flat(first, "top"), flat(other, "top"), strict=True)),
        mean_difference=fmean(apart),
        largest_difference=max(apart),
        logits=other.get("logits"),
        notes=tuple(answer["notes"]),
    )


def _same(ours: list[int], theirs: list[int], margin: list[float]) -> bool:
    """Two continuations; `margin` is the first one's at every position of prompt and continuation but the first."""
    parted = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    return parted is None or margin[len(margin) - len(ours) + parted] < TIE
