"""Plans tried out: quantized layer by layer, measured on tokens that they were not calibrated on, nothing written.

Shapes: N sequences, L positions, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.evaluation import WindowScores, score_windows
from alphaquant.models import head_input, head_weight, read_layer, read_outer
from alphaquant.pipeline.layer import LayerQuantizer
from alphaquant.pipeline.run import compute_dtype
from alphaquant.pipeline.stream import attend, embed, feed, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from alphaquant.evaluation import Quality
    from alphaquant.models import LayerWeights, ModelSpec
    from alphaquant.pipeline import Prepared, Progress
    from alphaquant.solver import Recipe

__all__ = ["try_plans"]


class _Trial(NamedTuple):
    """One plan on its way through the layers: its quantizer, its own ends, and its streams."""

    quantizer: LayerQuantizer
    outer: LayerWeights
    calibration_NLD: Tensor
    held_out_NLD: Tensor


@torch.no_grad()
def try_plans(
    plans: Sequence[Prepared],
    calibration_NL: Tensor,
    held_out_NL: Tensor,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress = silent,
) -> list[Quality]:
    """Quality of each plan, and its divergence from the original; all go through the layers in one pass.

    Args:
        plans: of one model.
        calibration_NL: token ids to calibrate on.
        held_out_NL: token ids to measure on.
        recipe: settings of the method.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.
    """
    source, spec = plans[0].source, plans[0].spec
    work_dtype = compute_dtype(dtype, spec, device)
    outer = read_outer(source, spec, work_dtype, device)
    original_NLD = embed(held_out_NL, outer["model.embed_tokens.weight"])
    trials = []
    for prepared in plans:
        quantizer, own = LayerQuantizer(spec, prepared.schemes, recipe), dict(outer)
        if prepared.schemes.get("lm_head") is not None:  # the head is quantized in place, the embedding is not
            own["lm_head.weight"] = own["lm_head.weight"].clone()
        quantizer.embedding(own)
        embedding = own["model.embed_tokens.weight"]
        trials.append(_Trial(quantizer, own, embed(calibration_NL, embedding), embed(held_out_NL, embedding)))
    for layer in range(spec.num_layers):
        progress("validate", layer, spec.num_layers, len(plans) * calibration_NL.numel())
        weights = read_layer(source, spec, layer, work_dtype, device)
        for trial in trials:
            own = {key: tensor.clone() for key, tensor in weights.items()}
            trial.quantizer.layer(layer, own, trial.calibration_NLD)
            _pass(trial.held_out_NLD, own, spec, layer)
        _pass(original_NLD, weights, spec, layer)
    scores = []
    for trial in trials:
        trial.quantizer.head(trial.outer, trial.calibration_NLD)
        score = WindowScores()
        for n in range(len(held_out_NL)):
            window = slice(n, n + 1)
            logits = [
                F.linear(head_input(x_NLD[window], ends, spec), head_weight(ends))
                for x_NLD, ends in ((trial.held_out_NLD, trial.outer), (original_NLD, outer))
            ]
            score_windows(logits[0], held_out_NL[window], logits[1], score)
        scores.append(score.quality(held_out_NL.shape[1] - 1))
    return scores


def _pass(x_NLD: Tensor, weights: LayerWeights, spec: ModelSpec, layer: int) -> None:
    attend(x_NLD, weights, spec, layer)
    feed(x_NLD, weights, spec, layer)
