"""What each engine takes: which modules it loads as one, and which schemes it computes, by layout.

Facts were read in vLLM 0.32, transformers 5.23, compressed-tensors 0.20 and humming-kernels 0.1.19. Nothing of theirs,
and no tensor, is needed here.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.errors import ConfigError, PlanError
from alphaquant.formats import Activation, ElementKind, ScaleKind
from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from alphaquant.formats import Scheme
    from alphaquant.plan import Module

    Schemes = Mapping[str, Scheme | None]

__all__ = [
    "FUSED",
    "PROFILES",
    "Legalized",
    "Profile",
    "TieGroup",
    "Violation",
    "engine_notes",
    "nameless_scheme",
    "profile_of",
]

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Linears that engines load as one matrix, by the name of that."""

_NAMELESS_ATTENTION = ("deepseek",)
"""Families whose attention vLLM 0.32 builds without giving its linears their names: rules by name miss them."""

_FUSED_OF = {member: fused for fused, members in FUSED.items() for member in members}
_ROW_PARALLEL = ("o_proj", "down_proj")  # split along their inputs under tensor parallelism, all others along outputs
_LINEAR = (ModuleKind.ATTENTION, ModuleKind.MLP, ModuleKind.SHARED_EXPERT)
_GATES = (ModuleKind.ROUTER, ModuleKind.SHARED_EXPERT_GATE)
_ATTENTION = "*.self_attn.*"
_MARLIN_GROUPS = (-1, 32, 64, 128)


class TieGroup(NamedTuple):
    """Modules that must share one scheme, or all stay unquantized.

    Attributes:
        names: their checkpoint names.
        patterns: globs over canonical names that mean exactly these.
        why: what the engine makes of them.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    why: str


class Violation(NamedTuple):
    """What an engine would not take, or would get silently wrong.

    Attributes:
        module: the first module concerned, by checkpoint name.
        num_modules: how many are.
        rule: the engine's rule, and what it meets.
        remedy: what to do about it.
    """

    module: str
    num_modules: int
    rule: str
    remedy: str

    def __str__(self) -> str:
        more = f" and {self.num_modules - 1} more" if self.num_modules > 1 else ""
        return f"{self.module}{more}: {self.rule}; {self.remedy}"


class Legalized(NamedTuple):
    """Overrides that make a plan legal when they are added at its end, and what each of them changes, in words."""

    overrides: tuple[dict[str, Any], ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """The rules of one engine, or of several at once.

    Attributes:
        name: its name in options.
        layouts: for every layout that it reads, in order of preference, why it would not take a scheme on a module
            under so many tensor-parallel GPUs, or None.
        fuses: it loads q/k/v and gate/up as one matrix each.
        experts_of: experts share one scheme by "layer", or over the whole "model".
        nameless_attention: it cannot tell attention linears apart, so that they share one scheme over the whole model.
        capabilities: the least CUDA compute capability (80 is 8.0) of formats that need more than the others.
    """

    name: str
    layouts: Mapping[str, Callable[[Scheme, Module, int], str | None]]
    fuses: bool
    experts_of: str
    nameless_attention: bool = False
    capabilities: Callable[[Scheme], int] = field(default=lambda scheme: 0)  # noqa: ARG005

    def on(self, family: str) -> Profile:
        """The profile for models of that family."""
        return replace(self, nameless_attention=self.fuses and family in _NAMELESS_ATTENTION)

    def tie_groups(self, modules: Sequence[Module]) -> list[TieGroup]:
        """The sets of modules that must share one scheme; modules in none of them are free."""
        found: dict[str, list[Module]] = {}
        for module in modules:
            key = self._tie(module)
            if key is not None:
                found.setdefault(key, []).append(module)
        return [self._group(key, members) for key, members in found.items() if len(members) > 1]

    def allowed(
        self, scheme: Scheme | None, module: Module, *, tp: int = 1, layout: str | None = None, gpu: int | None = None
    ) -> str | None:
        """Why the engine would not compute this scheme on this module, or None when it does.

        Args:
            scheme: None is unquantized, which every engine takes.
            module: the module.
            tp: GPUs of tensor parallelism.
            layout: the layout's name; None asks whether any will do.
            gpu: CUDA compute capability times ten; None asks for none in particular.
        """
        if scheme is None or layout == "dense":
            return None
        if gpu is not None and gpu < self.capabilities(scheme):
            need = self.capabilities(scheme)
            return f"{scheme} needs a GPU of compute capability {need / 10}, and this one has {gpu / 10}"
        if layout is not None and layout not in self.layouts:
            return f"{self.name} does not read the {layout} layout"
        reasons: list[str] = []
        for name in self.layouts if layout is None else (layout,):
            reason = self.layouts[name](scheme, module, tp)
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(dict.fromkeys(reasons))

    def violations(
        self,
        schemes: Schemes,
        modules: Sequence[Module],
        *,
        tp: int = 1,
        layout: str | None = None,
        gpu: int | None = None,
    ) -> list[Violation]:
        """Everything that the engine would refuse, or get silently wrong; empty where the plan is legal.

        Args:
            schemes: for every module its scheme, None where it is unquantized.
            modules: the modules of the model.
            tp: GPUs of tensor parallelism.
            layout: the layout that it will be written in; None: that of the engine's layouts that breaks fewest rules.
            gpu: CUDA compute capability times ten.
        """
        if layout == "dense":
            return []
        mixed = [self._mixed(group, schemes, modules, tp) for group in self.tie_groups(modules)]
        ties = [violation for violation in mixed if violation is not None]
        names = (*self.layouts,) if layout is None else (layout,)
        refused = [self._refused(schemes, modules, tp, name, gpu) for name in names]
        return ties + min(refused, key=lambda found: sum(violation.num_modules for violation in found))

    def best_layout(self, schemes: Schemes, modules: Sequence[Module], *, tp: int = 1) -> str | None:
        """The first of the engine's layouts in which it takes every module, or None."""
        quantized = _distinct(schemes, modules)
        return next(
            (n for n in self.layouts if all(self.allowed(s, m, tp=tp, layout=n) is None for s, m in quantized)), None
        )

    def legalize(self, schemes: Schemes, modules: Sequence[Module], *, tp: int = 1) -> Legalized:
        """Lift modules that must share a scheme to the best of theirs, and leave what must stay unquantized.

        Best is unquantized, then the most bits a weight. What is still not allowed remains a violation.
        """
        by_name = {module.name: module for module in modules}
        overrides: list[dict[str, Any]] = []
        changes: list[str] = []
        for group in self.tie_groups(modules):
            found = Counter(schemes[name] for name in group.names)
            if len(found) == 1:
                continue
            best = self._best(list(found), [by_name[name] for name in group.names], tp)
            raised = sum(count for scheme, count in found.items() if scheme != best)
            comment = f"{raised} of {len(group.names)} raised to {_show(best)}: {group.why}"
            overrides += [_override(pattern, best, f"{self.name}: {group.why}") for pattern in group.patterns]
            changes.append(f"{', '.join(group.patterns)}: {comment}")
        for module in modules:
            if module.kind in _GATES and schemes[module.name] is not None:
                why = f"{self.name} computes it unquantized"
                overrides.append(_override(module.name, None, why))
                changes.append(f"{module.name}: left unquantized, {why}")
        return Legalized(tuple(overrides), tuple(changes))

    def _tie(self, module: Module) -> str | None:
        """The pattern-like key of what the module is loaded with."""
        if module.kind is ModuleKind.EXPERT:
            prefix = module.alias[: module.alias.rindex(".experts.")] + ".experts.*"
            return prefix if self.experts_of == "layer" else "*.mlp.experts.*"
        if self.nameless_attention and module.kind is ModuleKind.ATTENTION:
            return _ATTENTION
        parent, _, leaf = module.alias.rpartition(".")
        if self.fuses and module.kind in _LINEAR and leaf in _FUSED_OF:
            return f"{parent}.{_FUSED_OF[leaf]}"
        return None

    def _group(self, key: str, members: Sequence[Module]) -> TieGroup:
        names = tuple(module.name for module in members)
        if key == _ATTENTION:
            return TieGroup(names, (key,), f"{self.name} cannot tell the attention linears of this family apart")
        if key.endswith(".*"):
            scope = "of a layer" if self.experts_of == "layer" else "of all layers"
            return TieGroup(names, (key,), f"{self.name} gives all experts {scope} the scheme of the first one")
        leaves = "/".join(_leaf(module) for module in members)
        return TieGroup(names, tuple(m.alias for m in members), f"{self.name} loads {leaves} as one matrix")

    def _mixed(self, group: TieGroup, schemes: Schemes, modules: Sequence[Module], tp: int) -> Violation | None:
        found = Counter(schemes[name] for name in group.names)
        if len(found) == 1:
            return None
        members = set(group.names)
        best = self._best(list(found), [module for module in modules if module.name in members], tp)
        shown = " and ".join(_show(scheme) for scheme in sorted(found, key=_rank))
        odd = next(name for name in group.names if schemes[name] != best)
        remedy = f"give {', '.join(group.patterns)} one scheme, such as {_show(best)}, or pass --legalize"
        return Violation(odd, len(group.names), f"{group.why}, and here they are {shown}", remedy)

    def _best(self, found: Sequence[Scheme | None], members: Sequence[Module], tp: int) -> Scheme | None:
        """The best of these schemes that every member can have; unquantized where none is."""
        shapes = {(m.kind, _leaf(m), m.out_features, m.in_features): m for m in members}.values()
        for scheme in sorted(found, key=_rank, reverse=True):
            if scheme is None or all(_divides(scheme, m) and self.allowed(scheme, m, tp=tp) is None for m in shapes):
                return scheme
        return max(found, key=_rank)

    def _refused(
        self, schemes: Schemes, modules: Sequence[Module], tp: int, layout: str, gpu: int | None
    ) -> list[Violation]:
        """One violation for each reason and scheme, with the first module that it concerns."""
        found: dict[tuple[str, Scheme], list[Module]] = {}
        for module in modules:
            scheme = schemes[module.name]
            reason = self.allowed(scheme, module, tp=tp, layout=layout, gpu=gpu)
            if scheme is not None and reason is not None:
                found.setdefault((reason, scheme), []).append(module)
        return [
            Violation(members[0].name, len(members), reason, self._remedy(scheme, members[0], tp, layout, gpu))
            for (reason, scheme), members in found.items()
        ]

    def _remedy(self, scheme: Scheme, module: Module, tp: int, layout: str, gpu: int | None) -> str:
        """The nearest scheme that is allowed: another group, else the unquantized module."""
        for other in _neighbours(scheme):
            if _divides(other, module) and self.allowed(other, module, tp=tp, layout=layout, gpu=gpu) is None:
                keys = [f'"group_size": {other.group_size}'] if other.group_size != scheme.group_size else []
                keys += [f'"aq": "{other.activation.value}"'] if other.activation is not scheme.activation else []
                return f"give it {' and '.join(keys)}"
        elsewhere = [
            name
            for name in self.layouts
            if name != layout and self.allowed(scheme, module, tp=tp, layout=name, gpu=gpu) is None
        ]
        if elsewhere:
            return f"write it with --format {elsewhere[0]}"
        return 'leave it with "skip": true, or give it another format'


def profile_of(name: str) -> Profile:
    """The profile of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROFILES:
        raise ConfigError(f"there is no engine {name!r}", remedy=f"known engines: {', '.join(PROFILES)}")
    return PROFILES[name]


def nameless_scheme(schemes: Schemes, modules: Sequence[Module], family: str) -> Schemes:
    """By the empty name, the scheme of linears that reach vLLM without a name, where they share one; else nothing.

    Rules by name meet it as ``^$``.
    """
    if family not in _NAMELESS_ATTENTION:
        return {}
    found = {schemes[module.name] for module in modules if module.kind is ModuleKind.ATTENTION}
    return {"": found.pop()} if len(found) == 1 else {}


def engine_notes(schemes: Schemes, modules: Sequence[Module], layout: str, family: str = "") -> dict[str, list[str]]:
    """For every single engine what it would not take of a directory in this layout, in words, on one GPU."""
    return {
        name: [str(violation) for violation in profile.on(family).violations(schemes, modules, layout=layout)]
        for name, profile in PROFILES.items()
        if name != "any"
    }


def _distinct(schemes: Schemes, modules: Sequence[Module]) -> list[tuple[Scheme, Module]]:
    """One module for each scheme, kind, last name and shape: the rules look at nothing else."""
    found: dict[tuple[Any, ...], tuple[Scheme, Module]] = {}
    for module in modules:
        scheme = schemes[module.name]
        if scheme is not None:
            key = (scheme, module.kind, _leaf(module), module.out_features, module.in_features)
            found.setdefault(key, (scheme, module))
    return list(found.values())


def _show(scheme: Scheme | None) -> str:
    return "unquantized" if scheme is None else str(scheme)


def _rank(scheme: Scheme | None) -> tuple[float, ...]:
    """Unquantized is best, then bits a weight; a zero point counts, and unrounded inputs break a tie."""
    if scheme is None:
        return (float("inf"),)
    group = scheme.group_size if scheme.group_size > 0 else 1 << 20
    extra = (scheme.scale_bits + (0 if scheme.symmetric else scheme.format.bits)) / group
    return (scheme.format.bits + extra, float(scheme.activation is Activation.BF16))


def _neighbours(scheme: Scheme) -> Iterator[Scheme]:
    """Schemes of the same format with other groups, then with other inputs too, nearest first."""
    if scheme.format.scale is not ScaleKind.MODEL:
        return
    for activation in dict.fromkeys((scheme.activation, *Activation)):
        for group_size in dict.fromkeys((scheme.group_size, 128, 64, 32, -1)):
            with suppress(PlanError):  # these do not go together
                other = replace(scheme, group_size=group_size, activation=activation)
                if other != scheme:
                    yield other


def _leaf(module: Module) -> str:
    return module.alias.rpartition(".")[2]


def _divides(scheme: Scheme, module: Module) -> bool:
    return scheme.group_size == -1 or module.in_features % scheme.group_size == 0


def _override(pattern: str, scheme: Scheme | None, comment: str) -> dict[str, Any]:
    if scheme is None:
        return {"pattern": pattern, "skip": True, "comment": comment}
    is_int = scheme.format.kind is ElementKind.INT
    return {
        "pattern": pattern,
        "wq": scheme.format.name,
        "aq": scheme.activation.value,
        "group_size": scheme.group_size,
        **({"symmetric": scheme.symmetric} if is_int else {}),
        "skip": False,
        "comment": comment,
    }


# --- Rules ----------------------------------------------------------------------------------------------------------


def _split(scheme: Scheme, module: Module, tp: int) -> str | None:
    """Why tensor parallelism cannot cut the stored tensors, or None."""
    leaf = _leaf(module)
    if tp == 1 or module.kind not in (*_LINEAR, ModuleKind.EXPERT):
        return None
    row = leaf in _ROW_PARALLEL
    size = module.in_features if row else module.out_features
    side = "inputs" if row else "outputs"
    if size % tp:
        # with fewer heads than GPUs, heads of keys and values are copied
        return None if leaf in ("k_proj", "v_proj") else f"its {size} {side} do not divide by --tp {tp}"
    part = size // tp
    if row and scheme.group_size > 0 and part % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide the {part} inputs that each of {tp} GPUs holds"
    packs = scheme.format.bits < 8 and (row or not scheme.symmetric)
    if packs and part * scheme.format.bits % 32:
        return f"{part} {side} of {scheme.format.bits} bits on each of {tp} GPUs do not fill whole 32-bit words"
    return None


def _gate(module: Module) -> str | None:
    return "routers and shared-expert gates are computed unquantized" if module.kind in _GATES else None


def _vllm_compressed_tensors(scheme: Scheme, module: Module, tp: int) -> str | None:
    """Rules of vLLM 0.32's compressed-tensors schemes and of its fused experts."""
    if (reason := _gate(module) or _split(scheme, module, tp)) is not None:
        return reason
    fmt, is_int = scheme.format, scheme.format.kind is ElementKind.INT
    if scheme.activation is not Activation.BF16:
        is_served = fmt.name in ("int8", "fp8") and scheme.group_size == -1 and module.kind is not ModuleKind.EMBEDDING
        what = f"vLLM takes {scheme.activation.value} inputs with int8 and fp8 weights of one scale a row"
        return None if is_served else what
    if is_int:
        return _vllm_integers(scheme, module)
    if module.kind is ModuleKind.EMBEDDING:
        return "vLLM looks up integer embeddings only"
    if fmt.name == "fp8" and scheme.group_size == -1:
        is_expert = module.kind is ModuleKind.EXPERT
        return 'vLLM computes fp8 experts with rounded inputs only ("aq": "fp8")' if is_expert else None
    is_block = fmt.name in ("nvfp4", "mxfp4", "mxfp8") and scheme.group_size == fmt.native_group
    return None if is_block else f"vLLM does not compute {scheme} from compressed-tensors"


def _vllm_integers(scheme: Scheme, module: Module) -> str | None:
    """Packed integers: linears go through Marlin or humming, experts through Marlin where they have a scale a row."""
    bits, group_size = scheme.format.bits, scheme.group_size
    if module.kind is not ModuleKind.EXPERT:
        return "vLLM computes groups of 16 or more" if 0 < group_size < 16 else None
    if group_size not in _MARLIN_GROUPS:
        return "vLLM computes integer experts in groups of 32, 64 or 128"
    if group_size != -1:
        return None
    hidden = module.out_features if _leaf(module) == "down_proj" else module.in_features
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
    if 0 < scheme.group_size < 16:
        return "humming computes groups of 16 or more"
    if fmt.scale is ScaleKind.E4M3 and (module.kind is ModuleKind.EXPERT or _FUSED_OF.get(_leaf(module)) is not None):
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
