"""What each engine computes, by layout.

Facts were read in vLLM 0.32, transformers 5.23, compressed-tensors 0.20 and humming-kernels 0.1.19. Nothing of theirs,
and no tensor, is needed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.engines.parts import FUSED, FUSED_OF, GATES, LINEAR, leaf
from alphaquant.engines.profile import Profile
from alphaquant.errors import ConfigError
from alphaquant.formats import Activation, ElementKind, ScaleKind
from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.formats import Scheme
    from alphaquant.plan import Module

__all__ = ["PROFILES", "profile_of"]

_ROW_PARALLEL = ("o_proj", "down_proj")  # split along their inputs under tensor parallelism, all others along outputs
_MARLIN_GROUPS = (-1, 32, 64, 128)
_FP8_EXPERTS = 'vLLM computes fp8 experts with rounded inputs only ("aq": "fp8")'


def _split(scheme: Scheme, module: Module, tp: int) -> str | None:
    """Why tensor parallelism cannot cut the stored tensors, or None."""
    last = leaf(module)
    if tp == 1 or module.kind not in (*LINEAR, ModuleKind.EXPERT):
        return None
    row = last in _ROW_PARALLEL
    size = module.in_features if row else module.out_features
    side = "inputs" if row else "outputs"
    if size % tp:
        # with fewer heads than GPUs, heads of keys and values are copied
        return None if last in ("k_proj", "v_proj") else f"its {size} {side} do not divide by --tp {tp}"
    part = size // tp
    if row and scheme.group_size > 0 and part % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide the {part} inputs that each of {tp} GPUs holds"
    packs = scheme.format.bits < 8 and (row or not scheme.symmetric)
    if packs and part * scheme.format.bits % 32:
        return f"{part} {side} of {scheme.format.bits} bits on each of {tp} GPUs do not fill whole 32-bit words"
    return None


def _gate(module: Module) -> str | None:
    return "routers and shared-expert gates are computed unquantized" if module.kind in GATES else None


def _vllm_compressed_tensors(scheme: Scheme, module: Module, tp: int) -> str | None:
    """Rules of vLLM 0.32's compressed-tensors schemes and of its fused experts."""
    if (reason := _gate(module) or _split(scheme, module, tp)) is not None:
        return reason
    fmt = scheme.format
    if fmt.block_rows > 1:
        return _vllm_blocks(scheme, module, tp)
    if scheme.activation is not Activation.BF16:
        is_served = fmt.name in ("int8", "fp8") and scheme.group_size == -1 and module.kind is not ModuleKind.EMBEDDING
        what = f"vLLM takes {scheme.activation.value} inputs with int8 and fp8 weights of one scale a row"
        return None if is_served else what
    return _vllm_integers(scheme, module) if fmt.kind is ElementKind.INT else _vllm_floats(scheme, module)


def _vllm_floats(scheme: Scheme, module: Module) -> str | None:
    fmt = scheme.format
    if module.kind is ModuleKind.EMBEDDING:
        return "vLLM looks up integer embeddings only"
    if fmt.name == "fp8" and scheme.group_size == -1:
        return _FP8_EXPERTS if module.kind is ModuleKind.EXPERT else None
    is_block = fmt.name in ("nvfp4", "mxfp4", "mxfp8") and scheme.group_size == fmt.native_group
    return None if is_block else f"vLLM does not compute {scheme} from compressed-tensors"


def _vllm_blocks(scheme: Scheme, module: Module, tp: int) -> str | None:
    """FP8 in blocks: what is loaded behind a matrix, or lies on another GPU, has to begin with a block."""
    is_expert, last, block = module.kind is ModuleKind.EXPERT, leaf(module), scheme.format.block_rows
    if not is_expert and module.kind not in LINEAR:
        return f"vLLM computes {scheme.format} in linears of layers"
    if is_expert and scheme.activation is Activation.BF16:
        return _FP8_EXPERTS
    is_cut = tp > 1 and last not in _ROW_PARALLEL
    fused = FUSED_OF.get(last)
    is_followed = fused is not None and (is_expert or last != FUSED[fused][-1])
    rows = module.out_features // tp if is_cut else module.out_features
    if rows % block == 0 or not (is_cut or is_followed):
        return None
    where = f"each of {tp} GPUs holds" if is_cut else f"vLLM loads as part of {fused}"
    return f"blocks of {block} rows do not divide the {rows} outputs that {where}"


def _vllm_integers(scheme: Scheme, module: Module) -> str | None:
    """Packed integers: linears go through Marlin or humming, experts through Marlin where they have a scale a row."""
    bits, group_size = scheme.format.bits, scheme.group_size
    if module.kind is not ModuleKind.EXPERT:
        return "vLLM computes groups of 16 or more" if 0 < group_size < 16 else None
    if group_size not in _MARLIN_GROUPS:
        return "vLLM computes integer experts in groups of 32, 64 or 128"
    if group_size != -1:
        return None
    hidden = module.out_features if leaf(module) == "down_proj" else module.in_features
    if bits not in (4, 8):
        return f"vLLM computes experts of {bits} bits in groups, not with one scale a row"
    what = f"vLLM computes experts with one scale a row where the hidden size divides by 128, not {hidden}"
    return what if hidden % 128 else None


def _vllm_humming(scheme: Scheme, module: Module, tp: int) -> str | None:
    """Rules of vLLM 0.32's humming method and of humming-kernels."""
    if (reason := _gate(module) or _split(scheme, module, tp)) is not None:
        return reason
    fmt = scheme.format
    if module.kind in (ModuleKind.EMBEDDING, ModuleKind.HEAD):
        return f"vLLM reads the {module.kind.value} of a humming checkpoint unquantized"
    if fmt.block_rows > 1:
        return f"{fmt} is written in compressed-tensors"
    if 0 < scheme.group_size < 16:
        return "humming computes groups of 16 or more"
    if fmt.scale is ScaleKind.E4M3 and (module.kind is ModuleKind.EXPERT or FUSED_OF.get(leaf(module)) is not None):
        return "vLLM has one matrix scale for what it loads as one, and nvfp4 of humming brings several"
    return None


def _vllm_gptq(scheme: Scheme, module: Module, tp: int) -> str | None:
    """Rules of vLLM 0.32's GPTQ method: Marlin's."""
    if (reason := _gate(module) or _split(scheme, module, tp)) is not None:
        return reason
    if module.kind in (ModuleKind.EMBEDDING, ModuleKind.HEAD):
        return f"the {module.kind.value} of a GPTQ checkpoint is read unquantized"
    if scheme.format.name not in ("int4", "int8") or not scheme.symmetric or scheme.activation is not Activation.BF16:
        return "vLLM computes GPTQ checkpoints of symmetric 4 or 8 bits"
    if scheme.group_size not in _MARLIN_GROUPS:
        return "vLLM computes GPTQ checkpoints in groups of 32, 64, 128 or a row"
    return None


def _transformers_compressed_tensors(scheme: Scheme, module: Module, tp: int) -> str | None:
    """What transformers 5.23 de-quantizes rightly as it loads compressed-tensors."""
    del tp  # weights are de-quantized before they are cut
    if (reason := _gate(module)) is not None:
        return reason
    fmt, is_expert = scheme.format, module.kind is ModuleKind.EXPERT
    if module.kind is ModuleKind.EMBEDDING:
        return "transformers reads embeddings unquantized"
    if fmt.kind is ElementKind.INT and scheme.activation is Activation.BF16:
        return "transformers fails on experts with zero points" if is_expert and not scheme.symmetric else None
    if fmt.name in ("mxfp4", "mxfp6") and scheme.group_size == fmt.native_group:
        return None
    if is_expert and fmt.name == "nvfp4":
        return "transformers reads nvfp4 experts without their matrix scale, silently wrong"
    return f"transformers does not load {scheme} from compressed-tensors"


def _both(scheme: Scheme, module: Module, tp: int) -> str | None:
    return _vllm_compressed_tensors(scheme, module, tp) or _transformers_compressed_tensors(scheme, module, tp)


def _vllm_capability(scheme: Scheme) -> int:
    """Below these vLLM refuses, or leaves inputs in bf16 that were calibrated as 8-bit floats."""
    if scheme.activation is Activation.FP8:
        return 89
    return 80 if scheme.format.name == "mxfp4" else 75


PROFILES: Mapping[str, Profile] = {
    "vllm": Profile(
        "vllm",
        {"compressed-tensors": _vllm_compressed_tensors, "humming": _vllm_humming, "gptq": _vllm_gptq},
        fuses=True,
        experts_of="layer",
        capabilities=_vllm_capability,
    ),
    "transformers": Profile(
        "transformers",
        {"compressed-tensors": _transformers_compressed_tensors},
        fuses=False,
        experts_of="model",
    ),
    "any": Profile("any", {"compressed-tensors": _both}, fuses=True, experts_of="model", capabilities=_vllm_capability),
}
"""Every profile by name; `any` is what all engines take."""


def profile_of(name: str) -> Profile:
    """The profile of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROFILES:
        raise ConfigError(f"there is no engine {name!r}", remedy=f"known engines: {', '.join(PROFILES)}")
    return PROFILES[name]
