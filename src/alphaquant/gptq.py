"""Quantizing a model that is in memory: GPTQ or rounding, in place, with the codes that the command would choose.

The model's tensors are read through its family's descriptor and run by our own decoder; nothing of it is hooked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphaquant.calibration import loader_tokens
from alphaquant.errors import ConfigError, PlanError
from alphaquant.pipeline import (
    QuantizedModule,
    compute_dtype,
    export_held,
    hold,
    quantize_held,
    resolve_plan,
    silent,
    torch_device,
)
from alphaquant.plan import Plan
from alphaquant.solver import Method, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from alphaquant.models import ModelSpec
    from alphaquant.pipeline import Progress

__all__ = [
    "GPTQConfig",
    "QuantizedModule",
    "detect_moe_architecture",
    "export",
    "gptq_quantize_model",
    "rtn_quantize_model",
]

_PLAN_KEYS = {"default", "overrides", "comment", "$schema"}
_LEAST = {"block_size": 1, "tune_steps": 0}  # of settings that count


@dataclass(frozen=True, slots=True)
class GPTQConfig(Recipe):
    """Settings of the method, those of `Recipe`, each checked; formats and groups are the plan's.

    Enumerations may be given by their values: `GPTQConfig(effort="best")`.

    Raises:
        ConfigError: names the value that is not possible.
    """

    def __post_init__(self) -> None:
        """Check every value by the kind of its default."""
        for setting in fields(self):
            value, default = getattr(self, setting.name), setting.default
            if isinstance(default, Enum):
                object.__setattr__(self, setting.name, _member(type(default), value, setting.name))
            elif isinstance(default, bool):
                _require(isinstance(value, bool), setting.name, value, "True or False")
            elif value is None and default is None:
                pass
            elif setting.name in _LEAST:
                least = _LEAST[setting.name]
                is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
                _require(is_count, setting.name, value, f"an integer from {least} on")
            else:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                is_share = setting.name == "asymmetric_target"
                is_possible = is_number and 0 <= value < math.inf and (value <= 1 or not is_share)
                _require(is_possible, setting.name, value, f"a number from 0 {'to 1' if is_share else 'on'}")


def _member(kind: type[Enum], value: object, name: str) -> Enum:
    values = [member.value for member in kind]
    _require(isinstance(value, kind) or value in values, name, value, f"one of {', '.join(values)}")
    return kind(value)


def _require(possible: bool, name: str, value: object, expected: str) -> None:  # noqa: FBT001  (what is asserted)
    if not possible:
        raise ConfigError(f"{name} is {value!r}", where="GPTQConfig", remedy=f"give {expected}")


def detect_moe_architecture(model: Any) -> str:
    """`olmoe`, `qwen`, `mixtral`, `deepseek` …; `standard` for a dense model.

    Args:
        model: a transformers model, or our `Decoder`.

    Raises:
        ConfigError: it is neither, or of no known family.
        CheckpointError: its tensors are not those of its config.
    """
    return hold(model).spec.architecture


def gptq_quantize_model(
    model: Any,
    dataloader: Iterable[Any],
    layer_config: Mapping[str, Any] | Plan | str | Path,
    gptq_config: GPTQConfig | None = None,
    device: str | torch.device = "auto",
    *,
    dtype: str = "auto",
    progress: Progress = silent,
) -> dict[str, QuantizedModule]:
    """Quantize a model in place with GPTQ (Frantar et al., arXiv:2210.17323), calibrated layer by layer.

    Its weights are replaced by their de-quantized values once every module is solved. Codes are bit for bit those of
    `alphaquant quantize` on the same checkpoint and tokens.

    Args:
        model: a transformers causal LM, experts fused or one by one, or what `alphaquant.load` returned.
        dataloader: yields token ids `[B, L]` or `[L]`, or mappings with `input_ids`; all rows of one length.
        layer_config: a plan (as an object, a file, or shorthand such as `int4:g128`), or `{module: shorthand}` for
            single modules, all others being left.
        gptq_config: settings of the method.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; where to compute, wherever the model is.
        dtype: of weights and activations while they are worked on: `auto` (the checkpoint's), `bf16`, `fp16`, `fp32`.
        progress: is told what happens.

    Returns:
        For every quantized module, by checkpoint name, its codes, scale, zero, scheme, loss and tokens.

    Raises:
        AlphaQuantError: what is wrong with model, data, plan or device. The model is then as it was.
    """
    return _quantize(model, dataloader, layer_config, _config(gptq_config), device, dtype, progress)


def rtn_quantize_model(
    model: Any,
    layer_config: Mapping[str, Any] | Plan | str | Path,
    dataloader: Iterable[Any] | None = None,
    gptq_config: GPTQConfig | None = None,
    device: str | torch.device = "auto",
    *,
    dtype: str = "auto",
    progress: Progress = silent,
) -> dict[str, QuantizedModule]:
    """Round a model to nearest, in place; with a `dataloader` scales are searched by what the inputs weigh.

    Arguments, result and errors as of `gptq_quantize_model`.
    """
    recipe = replace(_config(gptq_config), method=Method.RTN)
    return _quantize(model, dataloader, layer_config, recipe, device, dtype, progress)


def export(
    quantizers: Mapping[str, QuantizedModule],
    out: str | Path,
    *,
    model: Any,
    original: str | Path | None = None,
    layout: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a model that was quantized in memory as a checkpoint directory that engines load.

    Args:
        quantizers: what `gptq_quantize_model` or `rtn_quantize_model` returned.
        out: directory to make; it appears only when it is complete.
        model: the model that was quantized: what is not quantized comes from it.
        original: checkpoint directory that the model came from. Its tokenizer goes along; a `Decoder` needs it, for
            its config.json.
        layout: `compressed-tensors`, `humming` or `dense`; None for the most widely served one.
        overwrite: replace `out` if it holds something.

    Returns:
        Bytes of the weights that were written.

    Raises:
        AlphaQuantError: what is wrong; nothing is left on disk.
    """
    beside = None if original is None else Path(original)
    return export_held(hold(model), quantizers, Path(out), original=beside, layout=layout, overwrite=overwrite)


def _config(given: GPTQConfig | None) -> GPTQConfig:
    if given is not None and not isinstance(given, GPTQConfig):
        raise ConfigError(f"gptq_config is a {type(given).__name__}", remedy="give a GPTQConfig")
    return given or GPTQConfig()


def _quantize(
    model: Any,
    dataloader: Iterable[Any] | None,
    layer_config: Mapping[str, Any] | Plan | str | Path,
    recipe: Recipe,
    device: str | torch.device,
    dtype: str,
    progress: Progress,
) -> dict[str, QuantizedModule]:
    """All checks, then the work."""
    run_device = torch_device(device)
    held = hold(model)
    spec = held.spec
    work_dtype = compute_dtype(dtype, spec, run_device)
    schemes = resolve_plan(as_plan(layer_config, spec), spec).schemes
    ids_NL = None
    if dataloader is not None or recipe.method is Method.GPTQ:
        loader = () if dataloader is None else dataloader
        ids_NL = loader_tokens(loader, vocab_size=spec.vocab_size, max_length=spec.max_positions)
    return quantize_held(held, schemes, recipe, ids_NL, device=run_device, dtype=work_dtype, progress=progress)


def as_plan(
    given: Mapping[str, Any] | Plan | str | Path, spec: ModelSpec | None = None, name: str = "layer_config"
) -> Plan:
    """The plan that an object, a mapping, a file or shorthand stands for; for a known model also a table of modules.

    `name` is what the caller calls it, for messages.

    Raises:
        PlanError: it is none, or names modules that the model lacks.
    """
    if isinstance(given, Plan):
        return given
    if isinstance(given, str) and not given.endswith(".json") and not Path(given).is_file():
        return Plan.from_shorthand(given)
    if isinstance(given, str | Path):
        return Plan.load(given)
    if not hasattr(given, "keys") or not given:
        what = "is empty" if hasattr(given, "keys") else f"is a {type(given).__name__}"
        or_table = "" if spec is None else ", or {module: 'int4:g128', …}"
        raise PlanError(f"{name} {what}", remedy=f"give a plan, its file, shorthand such as 'int4:g128'{or_table}")
    if spec is None or given.keys() & _PLAN_KEYS:
        return Plan.from_dict(dict(given), name)
    return _table(given, spec)


def _table(given: Mapping[str, Any], spec: ModelSpec) -> Plan:
    """A plan of one rule for each named module."""
    known = {name for module in spec.modules() for name in (module.name, module.alias)}
    lacking = [str(name) for name in given if name not in known]
    if lacking:
        some = ", ".join(lacking[:4]) + (f" … and {len(lacking) - 4} more" if len(lacking) > 4 else "")
        raise PlanError(
            f"layer_config names {len(lacking)} modules that the model lacks: {some}",
            where="layer_config",
            remedy=f"give checkpoint names without .weight, such as {next(iter(known))}, or a plan with patterns",
        )
    rules = []
    for name, scheme in given.items():
        if not isinstance(scheme, str):
            raise PlanError(
                f"the scheme of {name} is {scheme!r}", where="layer_config", remedy="give shorthand such as 'int4:g128'"
            )
        rules.append({"pattern": name, **Plan.from_shorthand(scheme).default.settings()})
    return Plan.from_dict({"default": {"wq": "bf16"}, "overrides": rules}, "layer_config")
