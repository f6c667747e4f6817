"""What engines load as one, and what the rules ask of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.formats import Scheme
    from alphaquant.plan import Module

    Schemes = Mapping[str, Scheme | None]

__all__ = ["FUSED", "FUSED_OF", "GATES", "LINEAR", "Schemes", "leaf"]

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Linears that engines load as one matrix, by the name of that."""

FUSED_OF = {member: fused for fused, members in FUSED.items() for member in members}
"""The matrix that a linear is loaded into, by the last part of its name."""

LINEAR = (ModuleKind.ATTENTION, ModuleKind.MLP, ModuleKind.SHARED_EXPERT)
GATES = (ModuleKind.ROUTER, ModuleKind.SHARED_EXPERT_GATE)


def leaf(module: Module) -> str:
    """The last part of its canonical name."""
    return module.alias.rpartition(".")[2]
