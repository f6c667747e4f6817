"""What an estimator gives, and the table that it becomes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alphaquant.allocation.table import ErrorTable, Row
from alphaquant.formats import dequantize, quantize_with
from alphaquant.solver import search_scales

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from alphaquant.allocation.candidates import Candidate
    from alphaquant.pipeline import Prepared
    from alphaquant.plan import Module

__all__ = ["Costs", "fill_table", "flat_costs", "random_costs", "relative_errors", "scale_dtype", "subjects"]

_SAMPLE = (64, 1024)


class Costs(NamedTuple):
    """Costs of each module in each candidate, by checkpoint name; what else was found; how."""

    cost: Mapping[str, Sequence[float]]
    facts: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any]


def subjects(prepared: Prepared) -> list[Module]:
    """The modules whose bits a budget counts: all that can be quantized without being named."""
    return [module for module in prepared.spec.modules() if module.quantizable_by_default]


def scale_dtype(prepared: Prepared) -> torch.dtype:
    """Storage type of scales that are floats of the model."""
    return torch.float16 if prepared.spec.dtype is torch.float16 else torch.bfloat16


def fill_table(prepared: Prepared, candidates: Sequence[Candidate], method: str, found: Costs) -> ErrorTable:
    """The table of all subjects: costs as found, sizes as stored."""
    rows = []
    for module in subjects(prepared):
        size = module.out_features * module.in_features
        bits: list[int | None] = []
        cost: list[float | None] = []
        for candidate, value in zip(candidates, found.cost[module.name], strict=True):
            try:
                scheme = candidate.scheme(module.in_features, scale_dtype(prepared))
            except ValueError:
                bits.append(None)
                cost.append(None)
                continue
            stored = 8 * prepared.spec.dtype.itemsize
            if scheme is not None:
                bits.append(round(scheme.bits_per_weight(module.out_features, module.in_features) * size))
            else:
                bits.append(stored * size)
            cost.append(float(value))
        facts = dict(found.facts.get(module.name, {}))
        rows.append(Row(module.name, module.kind.value, size, tuple(bits), tuple(cost), facts))
    digest, names = prepared.checkpoint.header_digest(), tuple(candidate.text for candidate in candidates)
    return ErrorTable(method, digest, names, tuple(rows), dict(found.settings))


def relative_errors(candidates: Sequence[Candidate]) -> list[float]:
    """Squared error of each candidate relative to the weight's variance, on Gaussian weights, scales searched."""
    w_EOI = torch.randn(1, *_SAMPLE, generator=torch.Generator().manual_seed(0))
    found = []
    for candidate in candidates:
        width = _SAMPLE[1] if candidate.group_size == -1 else _SAMPLE[1] // candidate.group_size * candidate.group_size
        w = w_EOI[..., : max(width, 1)]
        scheme = candidate.scheme(w.shape[-1], torch.bfloat16)
        if scheme is None:
            found.append(0.0)
            continue
        scales = search_scales(w, scheme)
        rounded = dequantize(quantize_with(w, scheme, scales.scale, scales.zero, scales.global_scale))
        found.append(float((rounded - w).square().mean() / w.square().mean()))
    return found


def flat_costs(prepared: Prepared, candidates: Sequence[Candidate]) -> Costs:
    """What each module would cost if all weights were alike: their number times the format's relative error."""
    errors = relative_errors(candidates)
    sizes = {module.name: module.out_features * module.in_features for module in subjects(prepared)}
    return Costs({name: tuple(size * error for error in errors) for name, size in sizes.items()}, {}, {})


def random_costs(prepared: Prepared, candidates: Sequence[Candidate], seed: int) -> Costs:
    """Flat costs, each module's times a random weight, log-uniform over four bits' worth."""
    generator = random.Random(seed)  # noqa: S311  (no secret: a plan that can be made again)
    cost = {}
    for name, values in flat_costs(prepared, candidates).cost.items():
        weight = 256 ** generator.random()
        cost[name] = tuple(weight * value for value in values)
    return Costs(cost, {}, {"seed": seed})
