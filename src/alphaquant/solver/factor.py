"""Shrinkage, damping and factorisation of Hessians: one Cholesky, no inverse.

`H = M D Mᵀ` with `M` unit upper triangular: the feedback (LDLQ) form of GPTQ's matrix. Shapes: E experts, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from alphaquant.solver.backend import Backend, kernels_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["Factor", "chosen_rows", "damp", "factorize", "reorder", "shrink"]

_BLOCK = 128  # columns that are factorised together
_RETRIES = 4
_RETRY_FACTOR = 10.0
_FIRST_RETRY = 1e-4  # ten times no damping is no damping


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """Factorised damped Hessians, columns in walking order.

    Attributes:
        feedback_EII: `M`, unit upper triangular fp32: how a column's error moves the later ones.
        curvature_EI: `D` fp32: what a squared rounding error of a column costs.
        order_EI: walking order: position → input column.
        damping_E: the damping used, relative to the mean diagonal.
        retries_E: how often it was raised because the factorisation failed.
        packed_EII: the feedback for products in tiles, where they are faster; see `native.packed`.
    """

    feedback_EII: Tensor
    curvature_EI: Tensor
    order_EI: Tensor
    damping_E: Tensor
    retries_E: Tensor
    packed_EII: Tensor | None = None

    def in_natural_order(self) -> Tensor:
        """`D` by input column."""
        return self.curvature_EI.gather(1, self.order_EI.argsort(1))

    def divided(self, x_EOI: Tensor) -> Tensor:
        """`x H⁻¹` of the damped Hessians; columns are in natural order."""
        order_EOI = self.order_EI[:, None].expand_as(x_EOI)
        upper_EII = self.feedback_EII
        # H = M D Mᵀ in walking order
        part_EOI = torch.linalg.solve_triangular(
            upper_EII.transpose(1, 2), x_EOI.gather(2, order_EOI), upper=False, left=False, unitriangular=True
        )
        part_EOI = torch.linalg.solve_triangular(
            upper_EII, part_EOI.div_(self.curvature_EI[:, None]), upper=True, left=False, unitriangular=True
        )
        return torch.empty_like(x_EOI).scatter_(2, order_EOI, part_EOI)

    def reordered(self, order_EI: Tensor) -> Factor:
        """The factors where input column `order[i]` has become column `i`, walked in the same order."""
        return replace(self, order_EI=order_EI.argsort(1).gather(1, self.order_EI))

    def scaled(self, scale_EI: Tensor, backend: Backend = Backend.AUTO) -> Factor:
        """The factors of `S H S` for scales of input columns, walked in the same order."""
        scale_EI = scale_EI.gather(1, self.order_EI)
        feedback_EII = (self.feedback_EII * scale_EI[:, :, None]).div_(scale_EI[:, None])  # one copy, not two
        curvature_EI = self.curvature_EI * scale_EI.square()
        packed_EII = _packed(feedback_EII, backend)
        return replace(self, feedback_EII=feedback_EII, curvature_EI=curvature_EI, packed_EII=packed_EII)


def shrink(h_EII: Tensor, effective_E: Tensor, samples: float) -> Tensor:
    """Hessians mixed with `samples` samples' worth of their own diagonal; the input is not changed.

    Correlations of few samples are mostly chance. Those of a Hessian behind which `n` effective samples stand are
    multiplied by `n / (n + samples)`; the diagonal stays.
    """
    if samples == 0:
        return h_EII
    trust_E = (effective_E / (effective_E + samples)).to(h_EII)
    shrunk_EII = h_EII * trust_E[:, None, None]
    shrunk_EII.diagonal(dim1=1, dim2=2).copy_(h_EII.diagonal(dim1=1, dim2=2))
    return shrunk_EII


def damp(h_EII: Tensor, damping_E: Tensor) -> Tensor:
    """Hessians with `damping` times their mean diagonal added to the diagonal; the input is not changed.

    Dead columns (zero diagonal) count as average ones, so they neither move others nor are moved. A Hessian of zeros
    becomes a multiple of the identity: its solution is plain rounding.
    """
    damped_EII = h_EII.clone()
    damped_EII.diagonal(dim1=1, dim2=2).copy_(_damped_diagonal(h_EII, damping_E))
    return damped_EII


def _damped_diagonal(h_EII: Tensor, damping_E: Tensor) -> Tensor:
    diagonal_EI = h_EII.diagonal(dim1=1, dim2=2)
    mean_E = diagonal_EI.mean(1)
    mean_E = torch.where(mean_E > 0, mean_E, 1.0)[:, None]
    alive_EI = torch.where(diagonal_EI > 0, diagonal_EI, mean_E)
    return alive_EI + damping_E.to(h_EII)[:, None] * mean_E


def factorize(h_EII: Tensor, damping_E: Tensor, *, act_order: bool = True, backend: Backend = Backend.AUTO) -> Factor:
    """Factorise damped Hessians (GPTQ's matrix in the form of Chee et al. 2023, QuIP, eq. 3).

    Where the Cholesky fails, the damping is raised tenfold (to 1e-4 at least), up to four times; a Hessian that still
    fails keeps its diagonal alone.

    Args:
        h_EII: symmetric positive semi-definite, fp32; not changed.
        damping_E: added to the diagonal, relative to its mean.
        act_order: walk columns by falling diagonal (stable for ties), else in natural order.
        backend: what will walk them.
    """
    num_experts, size, _ = h_EII.shape
    damping_E = damping_E.to(h_EII.device, torch.float32).clone()
    retries_E = torch.zeros(num_experts, dtype=torch.int64, device=h_EII.device)
    if act_order:
        order_EI = h_EII.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    else:
        order_EI = torch.arange(size, device=h_EII.device).repeat(num_experts, 1)
    # in the opposite order, so that flipping both axes turns the lower Cholesky factor into the upper one
    opposite_EI = order_EI.flip(1)
    chol_EII, has_failed_E = _cholesky(_damped(h_EII, damping_E, opposite_EI))
    failed = has_failed_E.nonzero()[:, 0]
    for _ in range(_RETRIES):
        if failed.numel() == 0:
            break
        damping_E[failed] = (damping_E[failed] * _RETRY_FACTOR).clamp_min(_FIRST_RETRY)
        retries_E[failed] += 1
        chol_EII[failed], has_failed_E = _cholesky(_damped(h_EII[failed], damping_E[failed], opposite_EI[failed]))
        failed = failed[has_failed_E]
    if failed.numel() > 0:
        retries_E[failed] += 1
        diagonal_EI = _damped_diagonal(h_EII[failed], damping_E[failed]).gather(1, opposite_EI[failed])
        chol_EII[failed] = torch.diag_embed(diagonal_EI.sqrt())
    upper_EII = chol_EII.flip(1, 2)
    del chol_EII
    root_EI = upper_EII.diagonal(dim1=1, dim2=2).clone()
    feedback_EII = upper_EII.div_(root_EI[:, None, :]).contiguous()
    return Factor(
        feedback_EII=feedback_EII,
        curvature_EI=root_EI.square(),
        order_EI=order_EI,
        damping_E=damping_E,
        retries_E=retries_E,
        packed_EII=_packed(feedback_EII, backend),
    )


def _damped(h_EII: Tensor, damping_E: Tensor, order_EI: Tensor) -> Tensor:
    """Damped Hessians in another order of columns."""
    damped_EII = reorder(h_EII, order_EI)
    damped_EII.diagonal(dim1=1, dim2=2).copy_(_damped_diagonal(h_EII, damping_E).gather(1, order_EI))
    return damped_EII


def _packed(feedback_EII: Tensor, backend: Backend) -> Tensor | None:
    pack: Callable[..., Tensor | None] | None = getattr(kernels_for(feedback_EII, backend), "packed", None)
    return None if pack is None else pack(feedback_EII, is_upper=True)


def _cholesky(h_EII: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors, and which of them there are none of; on a CPU in the place of the Hessians.

    On a CPU block by block, most of it products: twice as fast as the library's, which comes out column by column.
    """
    if h_EII.device.type != "cpu":
        chol_EII, info_E = torch.linalg.cholesky_ex(h_EII)
        return chol_EII, info_E != 0
    num_experts, size, _ = h_EII.shape
    chol_EII = h_EII  # in place: these are the largest arrays of a run
    has_failed_E = torch.zeros(num_experts, dtype=torch.bool)
    for start in range(0, size, _BLOCK):
        cut, rest = slice(start, start + _BLOCK), slice(start + _BLOCK, size)
        if start:
            before_ERI = chol_EII[:, start:, :start]
            chol_EII[:, start:, cut].baddbmm_(before_ERI, chol_EII[:, cut, :start].transpose(1, 2), alpha=-1)
        block_EBB, info_E = torch.linalg.cholesky_ex(chol_EII[:, cut, cut])
        has_failed_E |= info_E != 0
        chol_EII[:, cut, cut] = block_EBB
        right_EBR = chol_EII[:, rest, cut].transpose(1, 2)
        chol_EII[:, rest, cut] = torch.linalg.solve_triangular(block_EBB, right_EBR, upper=False).transpose(1, 2)
    return chol_EII.tril_(), has_failed_E


def reorder(h_EII: Tensor, order_EI: Tensor) -> Tensor:
    """Both axes of Hessians in another order: place → input column."""
    return chosen_rows(h_EII, order_EI).gather(2, order_EI[:, None, :].expand_as(h_EII))


def chosen_rows(x_EJO: Tensor, index_EI: Tensor) -> Tensor:
    """The chosen rows of each matrix, `[E, I, O]`: copied whole, several times as fast as gathering single numbers."""
    out_EIO = x_EJO.new_empty(*index_EI.shape, x_EJO.shape[2])
    for x_JO, index_I, out_IO in zip(x_EJO, index_EI, out_EIO, strict=True):
        torch.index_select(x_JO, 0, index_I, out=out_IO)
    return out_EIO
