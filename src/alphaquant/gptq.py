"""Quantizing a model that is in memory: GPTQ or rounding, in place, with the codes that the command would choose.

The model's tensors are read through its family's descriptor and run by our own decoder; nothing of it is hooked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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
from alphaquant.solver import Effort, Method, Recipe

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

_DTYPES = ("auto", "bf16", "fp16", "fp32")
_PLAN_KEYS = {"default", "overrides", "comment", "$schema"}


@dataclass(frozen=True, slots=True)
class GPTQConfig:
    """Settings of the method; formats and groups are the plan's.

    Attributes:
        effort: `fast` (absmax scales and the walk), `default` (scale search, one refinement) or `best`.
        act_order: walk columns by falling Hessian diagonal, groups staying where they are.
        block_size: columns that are walked before their errors reach the rest; speed only.
        damping: least damping, relative to the mean diagonal of the Hessian.
        damping_evidence: damping is at least this times inputs / effective samples.
        routing_power: a routed token weighs its router score to this power; 0 counts all alike.
        rtn_below: experts with fewer effective samples than this share of their inputs are rounded to nearest.

    Raises:
        ConfigError: names the value that is not possible.
    """

    effort: Effort | str = Effort.DEFAULT
    act_order: bool = True
    block_size: int = 128
    damping: float = 0.01
    damping_evidence: float = 0.1
    routing_power: float = 1.0
    rtn_below: float = 0.25

    def __post_init__(self) -> None:
        """Check every value."""
        efforts = [effort.value for effort in Effort]
        if not isinstance(self.effort, Effort) and self.effort not in efforts:
            raise _impossible("effort", self.effort, f"one of {', '.join(efforts)}")
        if not isinstance(self.act_order, bool):
            raise _impossible("act_order", self.act_order, "True or False")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise _impossible("block_size", self.block_size, "a positive integer")
        for name in ("damping", "damping_evidence", "routing_power", "rtn_below"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise _impossible(name, value, "a number from 0 on")

    def recipe(self, method: Method = Method.GPTQ) -> Recipe:
        """The solver's settings."""
        return Recipe(method=method, **asdict(self) | {"effort": Effort(self.effort)})


def _impossible(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r}", where="GPTQConfig", remedy=f"give {expected}")


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
    recipe = _config(gptq_config).recipe()
    return _quantize(model, dataloader, layer_config, recipe, device, dtype, progress)


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
    recipe = _config(gptq_config).recipe(Method.RTN)
    return _quantize(model, dataloader, layer_config, recipe, device, dtype, progress)


def export(
    quantizers: Mapping[str, QuantizedModule],
    out: str | Path,
    *,
    model: Any,
    original: str | Path | None = None,
    layout: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model that was quantized in memory as a checkpoint directory that engines load.

    Args:
        quantizers: what `gptq_quantize_model` or `rtn_quantize_model` returned.
        out: directory to make; it appears only when it is complete.
        model: the model that was quantized: what is not quantized comes from it.
        original: checkpoint directory that the model came from. Its tokenizer goes along; a `Decoder` needs it, for
            its config.json.
        layout: `compressed-tensors`, `humming` or `dense`; None for the most widely served one.
        overwrite: replace `out` if it holds something.

    Raises:
        AlphaQuantError: what is wrong; nothing is left on disk.
    """
    beside = None if original is None else Path(original)
    export_held(hold(model), quantizers, Path(out), original=beside, layout=layout, overwrite=overwrite)


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
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}", remedy=f"give one of {', '.join(_DTYPES)}")
    held = hold(model)
    spec = held.spec
    work_dtype = compute_dtype(dtype, spec, run_device)
    schemes = resolve_plan(_plan(layer_config, spec), spec).schemes
    ids_NL = None
    if dataloader is not None or recipe.method is Method.GPTQ:
        loader = () if dataloader is None else dataloader
        ids_NL = loader_tokens(loader, vocab_size=spec.vocab_size, max_length=spec.max_positions)
    return quantize_held(held, schemes, recipe, ids_NL, device=run_device, dtype=work_dtype, progress=progress)


def _plan(given: Mapping[str, Any] | Plan | str | Path, spec: ModelSpec) -> Plan:
    """The plan that a `layer_config` stands for.

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
        raise PlanError(f"layer_config {what}", remedy="give a plan, its file, or {module: 'int4:g128', …}")
    if given.keys() & _PLAN_KEYS:
        return Plan.from_dict(dict(given), "layer_config")
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
