"""How much memory a run takes, foretold from shapes, and what is done in parts so that it stays within a limit.

Bytes are upper estimates of what lies in memory together; see `docs/architecture.md` for what they leave out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import ConfigError
from alphaquant.models import MoESpec
from alphaquant.pipeline.collect import Reading, collection_passes, widths
from alphaquant.pipeline.layer import ATTENTION_SOURCES, Limits, follows_original
from alphaquant.pipeline.stream import CHUNK_TOKENS, resident_memory
from alphaquant.pipeline.tuning import BATCH_TOKENS
from alphaquant.solver import WORKSPACE_WEIGHTS, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from alphaquant.formats import Scheme
    from alphaquant.models import ModelSpec, Parameter
    from alphaquant.pipeline.distributed import Team

__all__ = ["MemoryPlan", "common_limits", "free_memory", "parse_bytes", "plan_memory"]

_COPIES = 14  # fp32 arrays of the weights being solved that are alive together: measured, benchmarks/memory.py
_HESSIAN_COPIES = 6  # of the Hessians being factorised
_WORKSPACES = tuple(WORKSPACE_WEIGHTS >> shift for shift in (0, 2, 4))
_KERNEL_BYTES = 160 << 20  # what a CPU's library keeps of kernels compiled for each size: measured, tiny-olmoe
_TUNED_BYTES = 12  # of a weight's place, its codes and leaning as a module's and stacked, and a sign or new code
_TUNED_COPIES = 6  # fp32 arrays of the weights that are moved together
_SHARE_OF_FREE = 0.9
_SLACK = 0.1  # of the parts' sum: what the allocator keeps between them


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What lies in memory at the peak, and what is done in parts for it.

    Attributes:
        limits: for `LayerQuantizer`.
        passes: forward passes that collect Hessians, over all layers.
        least_passes: how many there would be if memory were ample.
        parts: bytes at the peak, by what takes them.
    """

    limits: Limits
    passes: int
    least_passes: int
    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def reading_ahead(self, max_bytes: int) -> MemoryPlan:
        """The same with the next layer read while one is worked on, where there is room for both."""
        one = self.parts["weights of a layer"]
        if self.peak_bytes + one > max_bytes:
            return self
        parts = self.parts | {"weights of a layer": 2 * one}
        return replace(self, limits=replace(self.limits, reads_ahead=True), parts=parts)

    def notes(self) -> list[str]:
        """What is done for want of memory."""
        notes = []
        if self.passes > self.least_passes:
            notes.append(f"Hessians are collected in {self.passes} passes, not {self.least_passes}: memory is short")
        if self.limits.holds_stream:
            notes.append("activations are kept out of memory between the chunks that are worked on: memory is short")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"peak_bytes": self.peak_bytes, **asdict(self)}


def plan_memory(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme | None],
    tokens: tuple[int, int] | None,
    dtype: torch.dtype,
    device: torch.device,
    max_bytes: int | None = None,
    processes: int = 1,
    recipe: Recipe = Recipe(),  # noqa: B008  (it cannot be changed)
) -> MemoryPlan:
    """The plan of fewest forward passes that stays in memory, and among those the one that keeps most there.

    On a GPU it is the device's memory that is planned; what does not stay there lies in the host's.

    Args:
        spec: the model.
        schemes: for every module its scheme.
        tokens: sequences and their length; None without calibration.
        dtype: of weights and activations while they are worked on.
        device: where they are worked on.
        max_bytes: what may be taken by each process; None for most of what is free, or more where the run takes more.
        processes: that share what a machine has of main memory. Each is planned as if it worked alone.
        recipe: settings of the method: some let the original's activations go along.

    Raises:
        ConfigError: no plan is within `max_bytes`; says how much the smallest takes.
    """
    if device.type == "cpu":
        base, free = resident_memory(), free_memory()
    else:
        base, free = 0, torch.cuda.mem_get_info(device)[0]
        processes = 1  # each has a device of its own
    allowed = base + int(_SHARE_OF_FREE * free / processes) if max_bytes is None else max_bytes
    found = [
        _plan(
            spec,
            schemes,
            tokens,
            dtype,
            allowed,
            base,
            recipe,
            holds_stream=holds_stream,
            workspace=workspace,
        )
        for holds_stream in ((False, True) if tokens is not None else (False,))
        for workspace in _WORKSPACES
    ]
    fitting = [plan for plan in found if plan.peak_bytes <= allowed]
    if fitting:
        chosen = min(fitting, key=lambda plan: plan.passes)
        return chosen.reading_ahead(allowed)
    least = min(found, key=lambda plan: plan.peak_bytes)
    if max_bytes is None:
        return least
    largest = max(least.parts, key=lambda part: least.parts[part])
    raise ConfigError(
        f"the run takes {_gib(least.peak_bytes)} at the least, {_gib(least.parts[largest])} of it for {largest}, "
        f"and may take {_gib(max_bytes)}",
        where="--max-memory",
        remedy=f"give at least {_gib(least.peak_bytes)}, or fewer --nsamples",
    )


def common_limits(team: Team, limits: Limits) -> Limits:
    """Limits that hold for every process of a team, which go through the same passes together."""
    told = [Limits(**one) for one in team.tell(asdict(limits))]
    return Limits(
        min(one.hessian_bytes for one in told),
        min(one.workspace_weights for one in told),
        any(one.holds_stream for one in told),
        all(one.reads_ahead for one in told),
    )


def _plan(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme | None],
    tokens: tuple[int, int] | None,
    dtype: torch.dtype,
    max_bytes: int,
    base_bytes: int,
    recipe: Recipe,
    *,
    holds_stream: bool,
    workspace: int,
) -> MemoryPlan:
    kinds = _distinct_layers(spec, schemes)
    outer = _layer_weights(spec.outer_parameters())
    parts = {"imports and buffers": base_bytes, "embedding and head": outer * dtype.itemsize}
    if tokens is not None and base_bytes:  # on a CPU
        parts["compiled kernels"] = _KERNEL_BYTES
    if tokens is not None and not holds_stream:
        # a target needs what the original had before a half-layer, too, once it is behind it
        streams = 1 + follows_original(recipe, spec) + recipe.pairs
        parts["activations between layers"] = streams * tokens[0] * tokens[1] * spec.hidden_size * dtype.itemsize
    parts["weights of a layer"] = max(_layer_weights(kind) for kind, _ in kinds) * dtype.itemsize
    parts["codes of a layer"] = max(_code_bytes(spec, schemes, layers[0]) for _, layers in kinds)
    solving = max(_solve_bytes(kind, workspace, recipe, calibrated=tokens is not None) for kind, _ in kinds)
    forward = 0 if tokens is None else max(_forward_bytes(spec, layers[0], tokens, dtype) for _, layers in kinds)
    forward *= 1 + recipe.pairs
    parts["solving" if solving > forward else "a chunk's forward pass"] = max(solving, forward)
    parts["what the allocator keeps"] = int(_SLACK * (sum(parts.values()) - base_bytes))
    halves = [(half, layers) for kind, layers in kinds for half in _halves(spec, schemes, kind, layers[0])]
    hessian_bytes = passes = least_passes = 0
    if tokens is not None:
        least = max((4 * width**2 for half, _ in halves for _, width in half.values()), default=0)
        sums = 1 + recipe.pairs
        room = int((max_bytes - sum(parts.values())) / (1 + _SLACK)) // sums
        most = max((sum(4 * e * width**2 for e, width in half.values()) for half, _ in halves), default=0)
        hessian_bytes = min(most, max(least, room))
        passes = sum(len(collection_passes(half, hessian_bytes)) * len(layers) for half, layers in halves)
        least_passes = sum(len(layers) for _, layers in halves)
        parts["Hessians"] = int(sums * hessian_bytes * (1 + _SLACK))
        if recipe.tuning:
            # when it begins, solving is over and Hessians are gone
            tuning = max(_tuning_bytes(spec, schemes, layers[0], tokens, dtype, workspace) for _, layers in kinds)
            beyond = int(tuning * (1 + _SLACK)) - max(solving, forward) - parts["Hessians"]
            parts |= {"tuning, beyond that": beyond} if beyond > 0 else {}
    limits = Limits(max(1, hessian_bytes), workspace, holds_stream)
    return MemoryPlan(limits, passes, least_passes, parts)


def _distinct_layers(
    spec: ModelSpec, schemes: Mapping[str, Scheme | None]
) -> list[tuple[tuple[Parameter, ...], list[int]]]:
    """Layers of one make and one set of quantized modules, and which they are."""
    found: dict[tuple[object, ...], tuple[tuple[Parameter, ...], list[int]]] = {}
    for layer in range(spec.num_layers):
        parameters = spec.parameters(layer)
        choices = ([schemes.get(n) for n in spec.module_names(layer, p)] for p in parameters)
        quantized = tuple(tuple(Counter(s.inputs for s in some if s is not None).items()) for some in choices)
        found.setdefault((parameters, quantized), (parameters, []))[1].append(layer)
    return list(found.values())


def _halves(
    spec: ModelSpec, schemes: Mapping[str, Scheme | None], parameters: Iterable[Parameter], layer: int
) -> list[dict[Reading, tuple[int, int]]]:
    """What the quantized linears in each half-layer read."""
    attention: dict[Reading, tuple[int, int]] = {}
    others: dict[Reading, tuple[int, int]] = {}
    for parameter in parameters:
        found = [schemes.get(name) for name in spec.module_names(layer, parameter)]
        half = attention if parameter.source in ATTENTION_SOURCES else others
        for source, size in widths([parameter]).items():
            half |= {Reading(source, scheme.inputs): size for scheme in found if scheme is not None}
    return [attention, others]


def _layer_weights(parameters: Iterable[Parameter]) -> int:
    return sum((parameter.num_experts or 1) * math.prod(parameter.shape) for parameter in parameters)


def _code_bytes(spec: ModelSpec, schemes: Mapping[str, Scheme | None], layer: int) -> int:
    """A byte a code, and fp32 scales (and zero points) while they are held."""
    total = 0.0
    for parameter in spec.parameters(layer):
        for name in spec.module_names(layer, parameter) if parameter.source is not None else ():
            scheme = schemes.get(name)
            if scheme is not None:
                rows, columns = parameter.shape
                total += rows * (columns + 5 * scheme.num_groups(columns))
    return int(total)


def _solve_bytes(parameters: Iterable[Parameter], workspace: int, recipe: Recipe, *, calibrated: bool) -> int:
    """The widest linear's arrays: at most a workspace of weights, at least one matrix's rows and one Hessian."""
    most = 0
    for parameter in parameters:
        if parameter.source is None:
            continue
        rows, columns = parameter.shape
        at_once = min(parameter.num_experts or 1, max(1, workspace // (max(rows, columns) * columns)))
        weights = min(workspace, 2 * at_once * rows * columns)  # gate and up are solved as one
        hessian = at_once * columns**2 if calibrated else 0
        copies, hessian_copies = _COPIES + 2 * recipe.pairs, _HESSIAN_COPIES + recipe.pairs
        most = max(most, 4 * (copies * max(weights, columns) + hessian_copies * hessian))
    return most


def _forward_bytes(spec: ModelSpec, layer: int, tokens: tuple[int, int], dtype: torch.dtype) -> int:
    """Activations of one chunk in one half-layer."""
    rows = min(tokens[0] * tokens[1], max(CHUNK_TOKENS, tokens[1]))
    hidden, mlp = spec.hidden_size, spec.layers[layer].mlp
    width = sum(p.shape[0] for p in spec.parameters(layer) if p.source in ATTENTION_SOURCES and len(p.shape) == 2)
    attention = rows * (3 * dtype.itemsize * (hidden + width) + 8 * hidden)
    if not isinstance(mlp, MoESpec):
        return max(attention, rows * (3 * dtype.itemsize * mlp.intermediate_size + 12 * hidden))
    routed = rows * mlp.top_k
    inner = mlp.intermediate_size + (0 if mlp.shared is None else mlp.shared.intermediate_size)
    return max(attention, routed * dtype.itemsize * (3 * hidden + 2 * inner) + 12 * rows * hidden)


def _tuning_bytes(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme | None],
    layer: int,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    workspace: int,
) -> int:
    """What is kept of each weight of a half-layer, some at a time in fp32, and a batch's activations and gradients."""
    halves = {True: 0, False: 0}
    for parameter in spec.parameters(layer):
        quantized = sum(schemes.get(name) is not None for name in spec.module_names(layer, parameter))
        if parameter.source is not None and quantized:
            halves[parameter.source in ATTENTION_SOURCES] += quantized * math.prod(parameter.shape)
    most = max(halves.values())
    batch = _forward_bytes(spec, layer, (1, min(tokens[0] * tokens[1], max(BATCH_TOKENS, tokens[1]))), dtype)
    return most * (_TUNED_BYTES + 2 * dtype.itemsize) + 4 * _TUNED_COPIES * min(workspace, most) + 3 * batch


def free_memory() -> int:
    """Bytes that this process could still take, of the machine and of its control group; a large number if unknown."""
    found = [1 << 50]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))
        found += [int(available[1]) * 1024] if available else []
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists():
        text = limit.read_text(encoding="ascii").strip()
        found += [int(text) - int(used.read_text(encoding="ascii"))] if text.isdigit() else []
    return min(found)


def parse_bytes(text: str, where: str) -> int:
    """Bytes of a size such as `10GiB`, `512MiB` or `4e9`.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]{1,2})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is no size", where=where, remedy="give one such as 4GiB, 512MiB or 16GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}GiB"
