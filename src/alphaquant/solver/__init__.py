"""The method: Hessians, factors, scales, GPTQ and its refinement, as pure functions batched over experts."""

from alphaquant.solver.backend import Backend, backend_for
from alphaquant.solver.equalize import Moves, Permute
from alphaquant.solver.factor import Factor, damp, factorize, shrink
from alphaquant.solver.gptq import Solution, better_rows, solve
from alphaquant.solver.hessian import Evidence, EvidenceSum, HessianSum
from alphaquant.solver.method import (
    SPENDING,
    WORKSPACE_WEIGHTS,
    Effort,
    Method,
    Outcome,
    Recipe,
    Spending,
    experts_a_part,
    is_thin,
    moved,
    quantize_stack,
    trusted,
)
from alphaquant.solver.places import Places
from alphaquant.solver.refine import grid_steps, leanings, refine, refit_scales
from alphaquant.solver.rtn import hessian_loss, round_to_nearest
from alphaquant.solver.scales import Scales, absmax_scales, search_scales

__all__ = [
    "SPENDING",
    "WORKSPACE_WEIGHTS",
    "Backend",
    "Effort",
    "Evidence",
    "EvidenceSum",
    "Factor",
    "HessianSum",
    "Method",
    "Moves",
    "Outcome",
    "Permute",
    "Places",
    "Recipe",
    "Scales",
    "Solution",
    "Spending",
    "absmax_scales",
    "backend_for",
    "better_rows",
    "damp",
    "experts_a_part",
    "factorize",
    "grid_steps",
    "hessian_loss",
    "is_thin",
    "leanings",
    "moved",
    "quantize_stack",
    "refine",
    "refit_scales",
    "round_to_nearest",
    "search_scales",
    "shrink",
    "solve",
    "trusted",
]
