"""What a layout is: how a quantized module is named and stored in a checkpoint, both ways."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from alphaquant.errors import PlanError
from alphaquant.layouts.compressed_tensors import CompressedTensorsLayout
from alphaquant.layouts.dense import DenseLayout
from alphaquant.layouts.gptq import GptqLayout
from alphaquant.layouts.humming import HummingLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from alphaquant.formats import QuantizedTensor, Scheme
    from alphaquant.plan import ModuleKind

__all__ = ["LAYOUTS", "Layout", "choose_layout"]


class Layout(Protocol):
    """A way to store quantized modules, and to tell an engine how they are stored."""

    @property
    def name(self) -> str:
        """Its name in options and in ``alphaquant/modules.json``."""

    def unsupported(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold this scheme on an [O, I] weight, or None when it can."""

    def tensor_names(self, module: str, scheme: Scheme) -> tuple[str, ...]:
        """The full names of the tensors that stand for the module's weight."""

    def tensors(self, module: str, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors to store for one weight [O, I], by full name: contiguous, on the CPU.

        Raises:
            PlanError: the layout cannot hold the scheme.
        """

    def read(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The weight that ``tensors`` stored, bit for bit; ``read`` gives a stored tensor by full name.

        Raises:
            CheckpointError: a tensor is not what the scheme implies, or the layout keeps no codes.
        """

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], kinds: Mapping[str, ModuleKind] | None = None
    ) -> dict[str, Any] | None:
        """The ``quantization_config`` of config.json for all modules of a model; None when nothing is quantized.

        Args:
            schemes: every module by checkpoint name; None is left unquantized.
            kinds: the modules' kinds, by which norms and embeddings stay out of the list of ignored linears.
        """


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (CompressedTensorsLayout(), HummingLayout(), GptqLayout(1), GptqLayout(2), DenseLayout())
    }
)
"""Every layout by name; ``dense`` writes bfloat16 (``DenseLayout(dtype)`` another type)."""


def choose_layout(schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> Layout:
    """The layout that most engines read: compressed-tensors where it can hold every scheme, else humming.

    Args:
        schemes: every module by checkpoint name; None is left unquantized.
        shapes: [O, I] of at least the quantized modules.

    Raises:
        PlanError: neither can hold a scheme.
    """
    quantized = [(name, scheme, shapes[name]) for name, scheme in schemes.items() if scheme is not None]
    reasons: list[str] = []
    for layout in (LAYOUTS["compressed-tensors"], LAYOUTS["humming"]):
        found = ((name, layout.unsupported(scheme, shape)) for name, scheme, shape in quantized)
        first = next(((name, reason) for name, reason in found if reason is not None), None)
        if first is None:
            return layout
        reasons.append(f"{layout.name} not {first[0]} ({first[1]})")
    raise PlanError(
        f"no layout can hold this plan: {'; '.join(reasons)}",
        remedy="change the format or group size of these modules, or write the dense layout",
    )
