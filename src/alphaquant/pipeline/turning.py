"""Rotating a model before it is quantized, and choosing by measurement how.

Shapes: N sequences, L positions, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from alphaquant.errors import ConfigError
from alphaquant.models import Rotation, RotationKind, as_served, read_layer, read_outer, rotated
from alphaquant.pipeline.layer import LayerQuantizer
from alphaquant.pipeline.run import compute_dtype, draw_tokens, resolve_plan
from alphaquant.pipeline.stream import CHUNK_TOKENS, Progress, attend, embed, feed, silent

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.pipeline.run import Calibration, Prepared
    from alphaquant.solver import Recipe

__all__ = ["AUTO", "ROTATIONS", "turned"]

AUTO = "auto"
ROTATIONS = (*(kind.value for kind in RotationKind), AUTO)
"""Names of what `turned` does."""
_MARGIN = 0.02  # by which a rotation's loss must be less than that of none


def turned(
    prepared: Prepared,
    name: str,
    *,
    seed: int,
    calibration: Calibration | None = None,
    recipe: Recipe | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> Prepared:
    """The model in rotated coordinates, with the plan resolved on it.

    Args:
        prepared: from `prepare`.
        name: of `ROTATIONS`; auto takes the one by which two layers lose least.
        seed: of the rotation.
        calibration: tokens for auto, of which a few are used.
        recipe: settings of the method for auto.
        device: where auto computes.
        dtype: `auto`, `bf16`, `fp16` or `fp32` for auto.
        progress: is told what auto does.

    Raises:
        ConfigError: there is no such rotation, the model has no such form, or auto has nothing to measure on.
        PlanError: the plan does not fit the rotated model, whose head is not its embedding.
    """
    if name not in ROTATIONS:
        raise ConfigError(f"rotation is {name!r}", where="--rotate", remedy=f"give one of {', '.join(ROTATIONS)}")
    if name != AUTO:
        return _turned(prepared, Rotation(RotationKind(name), seed))
    if calibration is None or recipe is None:
        raise ConfigError(
            "auto measures on calibration tokens, in a run", where="--rotate", remedy="give --calib, or name a rotation"
        )
    tokens = draw_tokens(prepared, calibration).ids
    tokens = tokens[: max(2, CHUNK_TOKENS // tokens.shape[1])]
    found: dict[str, float] = {}
    for kind in RotationKind:
        try:
            tried = _turned(prepared, Rotation(kind, seed))
        except ConfigError:
            if kind is RotationKind.HADAMARD:
                raise
            continue  # blocks do not divide
        found[kind.value] = _loss(tried, tokens, recipe, torch.device(device), dtype, progress)
    least = min(found, key=lambda kind: found[kind] * (1 - _MARGIN * (kind == RotationKind.NONE.value)))
    chosen = _turned(prepared, Rotation(RotationKind(least), seed))
    told = ", ".join(f"{kind} {loss:.4%}" for kind, loss in found.items())
    return replace(chosen, rotation_note=f"loss of two layers by rotation: {told}")


def _turned(prepared: Prepared, rotation: Rotation) -> Prepared:
    source, spec = rotated(prepared.source, prepared.spec, rotation)
    return replace(prepared, source=source, spec=spec, resolved=resolve_plan(prepared.plan, spec), rotation=rotation)


@torch.no_grad()
def _loss(
    prepared: Prepared, ids_NL: Tensor, recipe: Recipe, device: torch.device, dtype: str, progress: Progress
) -> float:
    """Squared error of what two layers add to the residual stream, relative to what they add, summed.

    Each is quantized on half of the sequences, behind layers as they are, and judged on the other half.
    """
    source, spec = prepared.source, prepared.spec
    work_dtype = compute_dtype(dtype, spec, device)
    x_NLD = embed(ids_NL, read_outer(source, spec, work_dtype, device)["model.embed_tokens.weight"])
    quantizer = LayerQuantizer(spec, prepared.schemes, recipe)
    places = {spec.num_layers // 3, 2 * spec.num_layers // 3}
    loss = 0.0
    for layer in range(max(places) + 1):
        progress("rotate", layer, spec.num_layers, ids_NL.numel())
        weights = read_layer(source, spec, layer, work_dtype, device)
        before_NLD = x_NLD[1::2].clone()
        calibration_NLD, found_NLD = x_NLD[::2].clone(), before_NLD.clone()
        own = {key: weight.clone() for key, weight in weights.items()}
        for half in (attend, feed):
            half(x_NLD, weights, spec, layer)
        if layer in places:
            quantizer.layer(layer, own, calibration_NLD)
            for half in (attend, feed):
                half(found_NLD, as_served(own, spec, layer, prepared.schemes), spec, layer)
            truth_NLD = x_NLD[1::2].float()
            loss += float((found_NLD.float() - truth_NLD).square().sum() / (truth_NLD - before_NLD).square().sum())
    return loss
