"""Quantizing a model that is in memory already: its own tensors are read, and at the end replaced."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alphaquant.checkpoint import TensorInfo
from alphaquant.errors import CheckpointError, ConfigError, OutputError
from alphaquant.formats import QuantizedTensor, dequantize
from alphaquant.models import Decoder, detect, logical
from alphaquant.pipeline.convert import pick_layout, shard_names, shard_tensors
from alphaquant.pipeline.layer import LayerQuantizer
from alphaquant.pipeline.records import LayerRecord, ModuleRecord
from alphaquant.pipeline.repair import require_routers
from alphaquant.pipeline.rundir import RunDir, check_output
from alphaquant.pipeline.stream import Progress, silent
from alphaquant.pipeline.walk import quantize_shards

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from alphaquant.formats import Scheme
    from alphaquant.models import ModelSpec, TensorSource
    from alphaquant.solver import Recipe

__all__ = ["HeldModel", "QuantizedModule", "export_held", "hold", "quantize_held"]


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedModule(QuantizedTensor):
    """Codes and scales of one module, and the record of how they were chosen."""

    record: ModuleRecord

    @property
    def loss(self) -> float:
        """`tr(E H Eᵀ)` under the damped mean Hessian; the squared error without calibration."""
        return self.record.loss

    @property
    def tokens(self) -> int:
        """Tokens that its inputs' Hessian saw; 0 without calibration."""
        return self.record.tokens


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model in memory as the pipeline reads it.

    Attributes:
        name: its class, for messages.
        spec: what it is; its dtype is that of the weights, or of the checkpoint that a `Decoder` was read from.
        source: its tensors under the family's names; `read` gives the model's own memory.
        config: what its config.json would hold; None where it does not know.
    """

    name: str
    spec: ModelSpec
    source: TensorSource
    config: dict[str, Any] | None


class _Tensors:
    """A `TensorSource` over tensors in memory, which it shares."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(sorted(tensors.items()))

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self._tensors[name])


def hold(model: Any) -> HeldModel:
    """Look at a model: one of transformers (its `config` and `state_dict()` are read), or our `Decoder`.

    Raises:
        ConfigError: it is neither, or of no known family.
        CheckpointError: tensors are missing, unread, misshapen, quantized already, or not in memory.
    """
    name = type(model).__name__
    config: dict[str, Any] | None = None
    if isinstance(model, Decoder):
        spec, tensors = model.spec, _decoder_tensors(model)
    else:
        config, tensors = _config_of(model, name), model.state_dict()
        config = {"architectures": [name]} | {k: v for k, v in config.items() if v is not None} | _dtype_of(tensors)
        spec = detect(config, f"{name}.config")
    for key, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point():
            fault = "is not in memory (meta device)" if tensor.is_meta else f"holds {tensor.dtype}, no floats"
            raise CheckpointError(
                f"{key} {fault}",
                where=name,
                remedy="load the whole model, unquantized; or use the command, which reads layer by layer from disk",
            )
    return HeldModel(name, spec, logical(_Tensors(tensors), spec), config)


def _config_of(model: Any, name: str) -> dict[str, Any]:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not callable(to_dict) or not callable(getattr(model, "state_dict", None)):
        raise ConfigError(
            f"the model is a {name}, which has no config and state_dict of transformers",
            where="model",
            remedy="give a transformers …ForCausalLM, or what alphaquant.load returned",
        )
    config: dict[str, Any] = to_dict()
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"the {name} is quantized already",
            where="config.quantization_config",
            remedy="give the original model",
        )
    return config


def _dtype_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The type that the weights really have, as config.json spells it."""
    embedding = tensors.get("model.embed_tokens.weight")
    return {} if embedding is None else {"dtype": str(embedding.dtype).removeprefix("torch.")}


def _decoder_tensors(model: Decoder) -> dict[str, Tensor]:
    tensors = dict(model.outer)
    for layer, weights in enumerate(model.layers):
        for parameter in model.spec.parameters(layer):
            weight = weights[parameter.key]
            parts = weight.unbind() if parameter.num_experts else (weight,)
            tensors |= zip(model.spec.tensor_names(layer, parameter), parts, strict=True)
    return tensors


@torch.no_grad()
def quantize_held(
    held: HeldModel,
    schemes: Mapping[str, Scheme | None],
    recipe: Recipe,
    ids_NL: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict[str, QuantizedModule]:
    """Quantize a model in place: the walk of a run on disk, with the same codes.

    Weights are replaced only when every module is solved: an error, or an interrupt before, leaves the model as it was.

    Args:
        held: the model.
        schemes: for every module its scheme, None to leave it.
        recipe: settings of the method.
        ids_NL: tokens to calibrate on; None rounds to nearest without any.
        device: where to compute.
        dtype: of weights and activations while they are worked on.
        progress: is told what happens.

    Raises:
        NumericsError: weights, activations or a Hessian hold NaN or infinity.
    """
    require_routers(recipe, held.spec, calibrated=ids_NL is not None)
    quantizer = LayerQuantizer(held.spec, schemes, recipe, progress=progress)
    records: dict[str, ModuleRecord] = {}
    codes: dict[str, QuantizedTensor] = {}
    refitted: dict[str, Tensor] = {}
    for result, _ in quantize_shards(quantizer, held.source, ids_NL, device=device, dtype=dtype):
        records |= {record.name: record for record in result.record.modules}
        codes |= result.quantized
        refitted |= result.refitted
    for name, router in refitted.items():
        held.source.read(name).copy_(router)
    for name, quantized in codes.items():
        held.source.read(f"{name}.weight").copy_(dequantize(quantized))
    return {
        name: QuantizedModule(q.codes, q.scale, q.zero, q.global_scale, q.scheme, records[name])
        for name in schemes
        if (q := codes.get(name)) is not None
    }


def export_held(
    held: HeldModel,
    modules: Mapping[str, QuantizedModule],
    out: Path,
    *,
    original: Path | None = None,
    layout: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a quantized model as a run on disk would, shard by shard; returns the bytes of its shards.

    Args:
        held: the model, for all that is not quantized.
        modules: from `quantize_held`, of this model.
        out: directory to make; it appears only when it is complete.
        original: checkpoint directory that the model came from: its tokenizer goes along, and its config.json
            where the model has none.
        layout: a name of `LAYOUTS`; None for the most widely served one.
        overwrite: replace `out` if it holds something.

    Raises:
        OutputError: there is nothing to write, the layout cannot hold a scheme, or `out` cannot be written.
        CheckpointError: the modules are of another model.
    """
    spec = held.spec
    if not modules:
        raise OutputError("no module is quantized", remedy="give what gptq_quantize_model returned")
    shapes = {module.name: (module.out_features, module.in_features) for module in spec.modules()}
    for name, module in modules.items():
        if shapes.get(name) != tuple(module.codes.shape):
            raise CheckpointError(
                f"the model has no module {name} of shape {list(module.codes.shape)}",
                where=held.name,
                remedy="give the model that these modules were quantized from",
            )
    config = held.config if held.config is not None else _config_beside(original, held)
    schemes: dict[str, Scheme | None] = dict.fromkeys(shapes)
    schemes |= {name: module.scheme for name, module in modules.items()}
    chosen = pick_layout(layout, spec, schemes, shapes)
    check_output(out, original, overwrite=overwrite)

    every = [(layer, p) for layer in range(spec.num_layers) for p in spec.parameters(layer)]
    exact = {name for layer, p in every if p.dtype is not None for name in spec.tensor_names(layer, p)}

    def read(name: str) -> Tensor:
        tensor = held.source.read(name).cpu()
        return tensor.to(spec.dtype) if held.config is None and name not in exact else tensor

    with RunDir.create(out, spec.num_layers + 1) as run:
        for index, names in enumerate(shard_names(spec, held.source)):
            run.add_shard(shard_tensors(names, modules.get, chosen, read))
            layer = index if index < spec.num_layers else None
            found = (modules.get(name.removesuffix(".weight")) for name in names)
            record = LayerRecord(layer, [module.record for module in found if module is not None])
            run.write_note(f"records/{'outer' if layer is None else f'layer-{layer:05d}'}.json", record.to_dict())
        run.finish(config, original, spec, chosen, schemes)
    return run.num_bytes


def _config_beside(original: Path | None, held: HeldModel) -> dict[str, Any]:
    if original is None:
        raise ConfigError(
            f"a {held.name} does not keep its config.json",
            where="export",
            remedy="give original=DIR, the checkpoint directory that it was loaded from",
        )
    try:
        config: dict[str, Any] = json.loads((original / "config.json").read_text(encoding="utf-8"))
        spec = detect(config, str(original / "config.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"config.json cannot be read: {error}", where=str(original), remedy="give the model's own directory"
        ) from error
    if spec != held.spec:
        raise CheckpointError(
            "config.json is of another model", where=str(original), remedy="give the directory that it was loaded from"
        )
    return config
