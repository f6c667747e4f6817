"""One linear, computed as it is served: with its inputs rounded token by token where its scheme says so.

Shapes: R rows, E experts, O out, I in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from alphaquant.formats import Inputs, round_inputs
from alphaquant.models import native

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.formats import Scheme
    from alphaquant.models.spec import ModelSpec

__all__ = ["LayerWeights", "as_served", "expert_linear", "linear"]

_GROUPED = (torch.bfloat16, torch.float16, torch.float32)
_EXACT_ROWS, _ROWS = 256, 64  # so many numbers of rows are computed as they are; beyond, multiples

_UNROUNDED = Inputs()

LayerWeights = dict[str, Tensor]
"""A layer's weights by `Parameter.key`."""


class _ServedWeights(dict[str, Tensor]):
    """A layer's weights, and for each linear that rounds its inputs, by key, how: an entry for each expert."""

    def __init__(self, weights: LayerWeights, inputs: Mapping[str, tuple[Inputs, ...]]) -> None:
        super().__init__(weights)
        self.inputs = inputs


def as_served(weights: LayerWeights, spec: ModelSpec, layer: int, schemes: Mapping[str, Scheme | None]) -> LayerWeights:
    """The same tensors, of which linears round their inputs as their modules' schemes say; for any half-layer."""
    inputs: dict[str, tuple[Inputs, ...]] = {}
    for parameter in spec.parameters(layer):
        if parameter.source is None:
            continue
        found = (schemes.get(name) for name in spec.module_names(layer, parameter))
        own = tuple(_UNROUNDED if scheme is None else scheme.inputs for scheme in found)
        if any(each != _UNROUNDED for each in own):
            inputs[parameter.key] = own
    return _ServedWeights(weights, inputs) if inputs else weights


def linear(x_RI: Tensor, weights: Mapping[str, Tensor], module: str) -> Tensor:
    """`x Wᵀ + b` of a module by its role, such as `self_attn.q_proj`."""
    key = f"{module}.weight"
    return _product(x_RI, weights[key], weights.get(f"{module}.bias"), _inputs(weights, key)[0])


def expert_linear(x_RI: Tensor, counts_E: Tensor, weights: Mapping[str, Tensor], module: str) -> Tensor:
    """`x Wᵀ` of stacked weights such as `mlp.experts.up_proj`, each row by its expert; rows are sorted by expert."""
    key = f"{module}.weight"
    inputs_E = _inputs(weights, key)
    rounded = {inputs for inputs in inputs_E if inputs != _UNROUNDED}
    if not rounded:
        return _by_expert(x_RI, counts_E, weights[key])
    grid_RI, scale_R1 = x_RI.detach(), x_RI.new_ones(x_RI.shape[0], 1, dtype=torch.float32)
    for inputs in rounded:
        is_E = torch.tensor([own == inputs for own in inputs_E], device=x_RI.device)
        is_R1 = is_E.repeat_interleave(counts_E)[:, None]
        values_RI, steps_R1 = round_inputs(x_RI.detach(), *inputs)
        grid_RI, scale_R1 = torch.where(is_R1, values_RI, grid_RI), torch.where(is_R1, steps_R1, scale_R1)
    if torch.is_grad_enabled():
        return _by_expert(_straight_through(x_RI, grid_RI, scale_R1), counts_E, weights[key])
    return (_by_expert(grid_RI, counts_E, weights[key]).float() * scale_R1).to(x_RI.dtype)


def _inputs(weights: Mapping[str, Tensor], key: str) -> tuple[Inputs, ...]:
    unrounded = (_UNROUNDED,)
    return weights.inputs.get(key, unrounded) if isinstance(weights, _ServedWeights) else unrounded


def _product(x_RI: Tensor, w_OI: Tensor, bias_O: Tensor | None, inputs: Inputs) -> Tensor:
    if inputs == _UNROUNDED:
        return F.linear(x_RI, w_OI, bias_O)
    # grid values are exact in any dtype, so nothing is lost before the product, as in an engine's kernel
    grid_RI, scale_R1 = round_inputs(x_RI.detach(), *inputs)
    if torch.is_grad_enabled():
        return F.linear(_straight_through(x_RI, grid_RI, scale_R1), w_OI, bias_O)
    out_RO = (F.linear(grid_RI, w_OI).float() * scale_R1).to(x_RI.dtype)
    return out_RO if bias_O is None else out_RO + bias_O


def _straight_through(x_RI: Tensor, grid_RI: Tensor, scale_R1: Tensor) -> Tensor:
    """Rounded inputs whose gradient is that of the inputs."""
    return (grid_RI.float() * scale_R1).to(x_RI.dtype) + (x_RI - x_RI.detach())


def _by_expert(x_RI: Tensor, counts_E: Tensor, w_EOI: Tensor) -> Tensor:
    """Each row times the weight of its expert `[R, O]`; rows are sorted by expert.

    On a CPU an expert is given a few rows of its neighbours along, and what it makes of them is dropped: the library
    compiles and keeps a kernel for each new number of rows, which costs more time and memory than the rows do.
    """
    if _can_group(x_RI, w_EOI):
        return F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=counts_E.cumsum(0, dtype=torch.int32))
    if native.multiplies(x_RI, w_EOI):
        return native.expert_products(x_RI, counts_E, w_EOI)
    if torch.is_grad_enabled():
        return _by_expert_with_gradients(x_RI, counts_E, w_EOI)
    stop, out_RO = 0, x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])
    for count, w_OI in zip(counts_E.tolist(), w_EOI.unbind(), strict=True):
        start, stop = stop, stop + count
        rows = count if count <= _EXACT_ROWS else -(-count // _ROWS) * _ROWS
        if start + rows <= len(out_RO):  # what is too much is written over by the experts to come
            torch.mm(x_RI[start : start + rows], w_OI.T, out=out_RO[start : start + rows])
        else:
            begin = max(0, stop - rows)
            out_RO[start:stop] = F.linear(x_RI[begin:stop], w_OI)[start - begin :]
    return out_RO


def _by_expert_with_gradients(x_RI: Tensor, counts_E: Tensor, w_EOI: Tensor) -> Tensor:
    """The same where it is differentiated; on a CPU experts get rows of zeros along, for the same reason."""
    if x_RI.device.type != "cpu":
        parts = zip(x_RI.split(counts_E.tolist()), w_EOI.unbind(), strict=True)
        return torch.cat([F.linear(part, w_OI) for part, w_OI in parts])
    padded_E = -(-counts_E // _ROWS) * _ROWS
    moved_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
    place_R = torch.arange(len(x_RI)) + moved_E.repeat_interleave(counts_E)
    x_PI = x_RI.new_zeros(int(padded_E.sum()), x_RI.shape[1]).index_copy(0, place_R, x_RI)
    parts = zip(x_PI.split(padded_E.tolist()), w_EOI.unbind(), strict=True)
    return torch.cat([F.linear(part, w_OI) for part, w_OI in parts]).index_select(0, place_R)


def _can_group(x_RI: Tensor, w_EOI: Tensor) -> bool:
    """Whether a GPU has one product for all experts (torch 2.10), for these types, sizes and places."""
    if not hasattr(F, "grouped_mm") or x_RI.dtype not in _GROUPED or not len(x_RI) or x_RI.device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(x_RI.device) < (8, 0):
        return False
    places = (x_RI.data_ptr(), w_EOI.data_ptr(), *(size * x_RI.itemsize for size in w_EOI.shape[1:]))
    return all(place % 16 == 0 for place in places)
