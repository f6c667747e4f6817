"""What a plan may take: bits a weight, or bytes of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaquant.allocation.costs import subjects
from alphaquant.errors import PlanError

if TYPE_CHECKING:
    from alphaquant.pipeline import Prepared

__all__ = ["Budget", "rest_bits"]

_LARGEST = 16.0


@dataclass(frozen=True, slots=True)
class Budget:
    """What the plan may take, or lose; one of them, or none.

    Attributes:
        bits: average stored bits of the weights that can be quantized.
        size: bytes of all tensors.
        max_kl: nats a token of divergence from the original.
    """

    bits: float | None = None
    size: int | None = None
    max_kl: float | None = None

    def total(self, prepared: Prepared) -> int:
        """Bits for all subjects together; all that they take unquantized, where it limits no size.

        Raises:
            PlanError: it is above what the unquantized model takes, or the rest of the model alone takes more.
        """
        weights = sum(m.out_features * m.in_features for m in subjects(prepared))
        if self.bits is not None:
            if not 0 < self.bits <= _LARGEST:
                what = f"--bits {self.bits:g} is no budget: bf16 takes {_LARGEST:g}"
                raise PlanError(
                    what, where="--bits", remedy="give a number between those of the narrowest format and 16"
                )
            return int(self.bits * weights)
        if self.size is None:
            if self.max_kl is not None and not 0 < self.max_kl < float("inf"):
                what = f"--max-kl {self.max_kl:g} is no divergence"
                raise PlanError(what, where="--max-kl", remedy="give nats a token, such as 0.05")
            return int(8 * prepared.spec.dtype.itemsize * weights)
        rest = rest_bits(prepared)
        whole = 8 * prepared.total_bytes
        if 8 * self.size > whole:
            what = f"--size is {self.size:,} bytes, and the model has no more than {whole // 8:,}"
            raise PlanError(what, where="--size", remedy="give less, or keep the model as it is")
        if 8 * self.size <= rest:
            what = f"--size is {self.size:,} bytes, and what stays unquantized takes {rest // 8:,} already"
            raise PlanError(what, where="--size", remedy="give more, or quantize lm_head by --config")
        return 8 * self.size - rest


def rest_bits(prepared: Prepared) -> int:
    """Bits of all that is no subject: as stored, or as `--config` quantizes it."""
    counted = {module.name for module in subjects(prepared)}
    total = 8 * prepared.total_bytes
    for module in prepared.spec.modules():
        stored = 8 * prepared.source.info(f"{module.name}.weight").num_bytes
        scheme, size = prepared.schemes[module.name], module.out_features * module.in_features
        if module.name in counted:
            total -= stored
        elif scheme is not None:
            total -= stored - round(scheme.bits_per_weight(module.out_features, module.in_features) * size)
    return total
