"""Tasks of lm-eval on our decoder: an adapter, since the harness asks a model only for log-likelihoods and text.

Shapes: B requests, L positions, V vocabulary.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.calibration import load_tokenizer
from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import ConfigError
from alphaquant.models.attention import KeyValueCache
from alphaquant.patterns import did_you_mean
from alphaquant.pipeline.evaluate import load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from alphaquant.calibration import Tokenizer
    from alphaquant.models import Decoder

__all__ = ["Metric", "TaskModel", "evaluate_tasks"]

_BATCH_TOKENS = 2048  # whose logits are alive together
_MAX_NEW = 256  # tokens of an answer where the task does not say


class Metric(NamedTuple):
    """A figure of a task; the standard error is None where the harness has none."""

    task: str
    metric: str
    value: float
    stderr: float | None


class TaskModel:
    """What a harness asks of a language model: how likely texts are, and how they go on.

    Args:
        decoder: the model in memory.
        tokenizer: its own.
        prefix: token that stands before a text without context; None: there is none, and its first token is free.
        stops: tokens that end an answer.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, prefix: int | None, stops: frozenset[int]) -> None:
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.prefix = prefix
        self._stops = stops
        self._limit = decoder.spec.max_positions

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each context and continuation, both in tokens: the log-likelihood, and whether greedy search agrees.

        What is too long for the model loses tokens at its beginning. Requests of like length share a batch; they are
        padded at their ends, where no position that counts can look.
        """
        rows = [[*context, *continuation][-(self._limit + 1) :] for context, continuation in pairs]
        wanted = [min(len(continuation), len(row) - 1) for row, (_, continuation) in zip(rows, pairs, strict=True)]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        waiting = sorted((i for i in range(len(rows)) if wanted[i] > 0), key=lambda i: -len(rows[i]))
        while waiting:
            size = max(1, _BATCH_TOKENS // len(rows[waiting[0]]))
            batch, waiting = waiting[:size], waiting[size:]
            width = len(rows[batch[0]]) - 1
            ids_BL = torch.zeros(len(batch), width, dtype=torch.int64, device=self._decoder.device)
            for position, i in enumerate(batch):
                ids_BL[position, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
            logits_BLV = self._decoder.logits(ids_BL)
            for position, i in enumerate(batch):
                end, count = len(rows[i]) - 1, wanted[i]
                found[i] = _likelihood(logits_BLV[position, end - count : end], rows[i][-count:])
        return found

    def score_text(self, text: str) -> float:
        """Log-likelihood of a whole text, in windows that do not overlap, every token once."""
        ids = self.tokenizer.encode_batch([text], special_tokens=False)[0]
        windows = []
        for start in range(0, len(ids), self._limit):
            before = ids[start - 1 : start] or ([] if self.prefix is None else [self.prefix])
            windows.append((before, ids[start : start + self._limit]))
        return sum(likelihood for likelihood, _ in self.score(windows))

    @torch.no_grad()
    def answer(self, prompt: str, max_new: int, until: Sequence[str]) -> str:
        """The greedy continuation of a prompt, up to and without the first of the strings `until`."""
        ids = self.tokenizer.encode_batch([prompt], special_tokens=False)[0]
        ids = ids[-max(1, self._limit - max_new) :] or ([] if self.prefix is None else [self.prefix])
        caches = [KeyValueCache() for _ in self._decoder.layers]
        step = torch.tensor([ids], dtype=torch.int64, device=self._decoder.device)
        out: list[int] = []
        text = ""
        for _ in range(min(max_new, self._limit - len(ids) + 1)):
            token = int(self._decoder.logits(step, caches)[0, -1].argmax())
            if token in self._stops:
                break
            out.append(token)
            text = self.tokenizer.decode(out)
            if any(stop in text for stop in until):
                break
            step = step.new_tensor([[token]])
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


def _likelihood(logits_LV: Tensor, targets: Sequence[int]) -> tuple[float, bool]:
    ids_L = torch.tensor(list(targets), device=logits_LV.device)
    log_L = -F.cross_entropy(logits_LV.float(), ids_L, reduction="none")
    return float(log_L.sum()), bool((logits_LV.argmax(-1) == ids_L).all())


def evaluate_tasks(
    path: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    task_path: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
) -> list[Metric]:
    """Run tasks of lm-eval on a checkpoint directory, original or quantized by us.

    Args:
        path: checkpoint directory.
        tasks: names as lm-eval knows them.
        limit: at most so many examples of each task.
        fewshot: solved examples in each prompt; None: as many as the task says.
        task_path: directory of task files of one's own.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.

    Raises:
        ConfigError: lm-eval is not installed, or knows no such task.
        CheckpointError: the directory is not a checkpoint of a known family.
    """
    try:
        import lm_eval  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-eval, which cannot be imported: {error}",
            remedy="pip install 'alphaquant-moe[eval]'",
        ) from error
    if task_path is not None and not task_path.is_dir():
        raise ConfigError(f"--task-path {task_path} is no directory", remedy="give the directory of the task files")
    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    for task in tasks:
        if task not in manager.all_tasks:
            close = did_you_mean(difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.6))
            remedy = close or "see https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks"
            raise ConfigError(f"lm-eval knows no task {task!r}", remedy=remedy)
    model = _open(path, device, dtype)
    results = lm_eval.simple_evaluate(
        model=_adapter(model), tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager
    )
    return _metrics(results["results"])


def _open(path: Path, device: torch.device | str, dtype: str) -> TaskModel:
    config = Checkpoint.open(path).config
    ends = config.get("eos_token_id")
    stops = frozenset(e for e in (ends if isinstance(ends, list) else [ends]) if isinstance(e, int))
    prefix = config.get("bos_token_id")
    if not isinstance(prefix, int):
        prefix = min(stops, default=None)
    return TaskModel(load(path, dtype=dtype, device=device), load_tokenizer(path), prefix, stops)


def _adapter(model: TaskModel) -> Any:
    """The model in the harness's own clothes; made here since its base class is in an optional package."""
    from lm_eval.api.model import TemplateLM  # noqa: PLC0415

    class Adapter(TemplateLM):  # type: ignore[misc,unused-ignore]  # untyped where lm-eval is missing
        @property
        def eot_token_id(self) -> int | None:
            return model.prefix

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return model.tokenizer.encode_batch([string], special_tokens=False)[0]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return model.score([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            return [model.score_text(request.args[0]) for request in requests]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            return [_answer(model, *request.args) for request in requests]

    return Adapter()


def _answer(model: TaskModel, prompt: str, settings: dict[str, Any]) -> str:
    if settings.get("do_sample") and settings.get("temperature", 1.0):
        raise ConfigError("a task asks for sampled answers", remedy="choose one that is answered greedily")
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    return model.answer(prompt, int(settings.get("max_gen_toks", _MAX_NEW)), stops)


def _metrics(results: dict[str, dict[str, Any]]) -> list[Metric]:
    found = []
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, rule = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or not rule or metric.endswith("_stderr"):
                continue
            stderr = figures.get(f"{metric}_stderr,{rule}")
            name = metric if rule == "none" else f"{metric} ({rule})"
            found.append(Metric(task, name, float(value), float(stderr) if isinstance(stderr, int | float) else None))
    return found
