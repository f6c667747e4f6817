"""How long a run will take, foretold from its work and from how fast this machine multiplies.

Rough: the machine is timed for a moment, and what the solver does beside products is counted as products that take as
long, by the rates of `benchmarks/speed.py`.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.models import MoESpec
from alphaquant.pipeline.collect import widths
from alphaquant.pipeline.layer import follows_original
from alphaquant.pipeline.tuning import BATCH_TOKENS, PROBES
from alphaquant.solver import SPENDING, Backend, Method, backend_for, native

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.formats import Scheme
    from alphaquant.models import ModelSpec, Parameter
    from alphaquant.solver import Recipe

__all__ = ["foretell_seconds"]

_BACKWARD = 6.0  # a batch's forward and backward pass, relative to one without gradients
_MOVE = 500.0  # of a weight and its gradient in a step of tuning, in operations of an fp32 product
_READ_BYTES = 1e9  # a second, from a disk


class _Cost(NamedTuple):
    """Of a weight in operations of an fp32 product: search; walk, sweep beside their products; and one of these."""

    search: float
    walk: float
    sweep: float
    product: float = 1.0


_TORCH, _FASTER, _IN_TILES = _Cost(9e3, 9e3, 2e4), _Cost(3e3, 2e3, 4e3), _Cost(1.6e3, 2.3e3, 3e2, 0.35)


def foretell_seconds(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme | None],
    tokens: tuple[int, int] | None,
    dtype: torch.dtype,
    device: torch.device,
    recipe: Recipe,
    passes: float = 1.0,
) -> dict[str, float]:
    """Seconds by phase.

    Args:
        spec: the model.
        schemes: for every module its scheme.
        tokens: sequences and their length; None without calibration.
        dtype: of weights and activations while they are worked on.
        device: where they are worked on.
        recipe: settings of the method.
        passes: how often a half-layer is run to collect its Hessians.
    """
    rows = 0 if tokens is None else tokens[0] * tokens[1]
    forward = gram = solve = repair = moved = 0.0
    read = sum(math.prod(parameter.shape) for parameter in spec.outer_parameters())
    for layer in range(spec.num_layers):
        parameters = spec.parameters(layer)
        mlp = spec.layers[layer].mlp
        top_k = mlp.top_k / mlp.num_experts if isinstance(mlp, MoESpec) else 1.0
        for parameter in parameters:
            experts = parameter.num_experts or 1
            read += experts * math.prod(parameter.shape)
            seen = rows * (top_k if parameter.num_experts else 1.0) * experts
            forward += 2 * seen * math.prod(parameter.shape)
        wanted = []
        for parameter in parameters:
            quantized = sum(schemes.get(name) is not None for name in spec.module_names(layer, parameter))
            if parameter.source is not None and quantized:
                wanted.append(parameter)
                solve += quantized * _solve_work(parameter, recipe, device, calibrated=tokens is not None)
                moved += quantized * math.prod(parameter.shape)
        if isinstance(mlp, MoESpec) and recipe.repair_router:
            repair += rows * spec.hidden_size**2
        for experts, width in widths(wanted).values():
            # half of a Gram matrix is summed, and all of what pairs add
            gram += rows * width**2 * (experts * top_k if experts > 1 else 1.0) * (3 if recipe.pairs else 1)
            if tokens is not None and recipe.method is Method.GPTQ:
                solve += experts * width**3
        if tokens is not None:
            forward += 2 * rows * tokens[1] * spec.hidden_size  # scores and values, half of them masked
    products, solver = _rate(dtype, device), _rate(torch.float32, device)
    steps = recipe.tuning if rows else 0
    batches = (steps + PROBES) * max(BATCH_TOKENS, tokens[1]) / rows if tokens is not None and rows else 0.0
    tune = (_BACKWARD * batches + 1 / 4) * forward / products + (steps + PROBES) * moved * _MOVE / solver
    follows = 1 + follows_original(recipe, spec)
    return {
        "read": read * dtype.itemsize / _READ_BYTES,
        "calibrate": (passes * (1 + recipe.pairs) * forward + gram) / products,
        "solve": solve / solver,
        "propagate": follows * forward / products,
        **({"repair": repair / products} if repair else {}),
        **({"tune": tune} if steps else {}),
    }


def _solve_work(parameter: Parameter, recipe: Recipe, device: torch.device, *, calibrated: bool) -> float:
    in_features = parameter.shape[-1]
    spending = SPENDING[recipe.effort]
    cost = _cost(backend_for(device.type, recipe.backend))
    inputs = in_features * cost.product
    work = cost.search if spending.search else 0.0
    if calibrated and recipe.method is Method.GPTQ:
        work += spending.walks * (cost.walk + inputs) + spending.refits * (cost.sweep + 3 * inputs)
        work += 2 * inputs + spending.sweeps * (cost.sweep + 2 * inputs) + 4 * recipe.pairs * in_features
    return math.prod(parameter.shape) * work


def _cost(backend: Backend) -> _Cost:
    if backend is Backend.TORCH:
        return _TORCH
    return _IN_TILES if backend is Backend.NATIVE and native.has_tiles() else _FASTER


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product of moderate size."""
    size = 4096 if device.type == "cuda" else 768
    x = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
