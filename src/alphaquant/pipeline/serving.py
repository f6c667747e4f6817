"""Before hours are spent: will the engine take what the plan makes, and in which layout?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alphaquant.errors import PlanError
from alphaquant.pipeline.run import resolve_plan
from alphaquant.rules import Override

if TYPE_CHECKING:
    from alphaquant.engines import Profile, Violation
    from alphaquant.pipeline.run import Prepared

__all__ = ["Serving"]


@dataclass(frozen=True, slots=True)
class Serving:
    """Where a checkpoint is going to be served: the engine's rules, GPUs of tensor parallelism, their generation.

    `gpu` is the CUDA compute capability times ten, None for none in particular.
    """

    profile: Profile
    tp: int = 1
    gpu: int | None = None

    def violations(self, prepared: Prepared, layout: str | None) -> list[Violation]:
        """What the engine would not take of a plan in this layout; in the best of its layouts for None."""
        modules = list(prepared.spec.modules())
        return self.profile.on(prepared.spec.family).violations(
            prepared.schemes, modules, tp=self.tp, layout=layout, gpu=self.gpu
        )

    def legalized(self, prepared: Prepared) -> tuple[Prepared, tuple[str, ...]]:
        """The plan with overrides at its end that the engine asks for, and what they change, in words."""
        found = self.profile.on(prepared.spec.family).legalize(
            prepared.schemes, list(prepared.spec.modules()), tp=self.tp
        )
        added = tuple(Override.model_validate(override) for override in found.overrides)
        plan = prepared.plan.model_copy(update={"overrides": (*prepared.plan.overrides, *added)})
        return replace(prepared, plan=plan, resolved=resolve_plan(plan, prepared.spec)), found.changes

    def layout(self, prepared: Prepared, name: str | None) -> str | None:
        """The layout to write: the named one, else the first that the engine reads and that holds the plan.

        Raises:
            PlanError: lists every rule of the engine that the plan breaks.
        """
        found = self.violations(prepared, name)
        if found:
            rules = "\n".join(f"  {violation}" for violation in found)
            raise PlanError(
                f"{self.profile.name} would not take this plan, or get it silently wrong:\n{rules}",
                remedy="change the plan, or pass --legalize to raise what must agree",
            )
        if name is not None:
            return name
        return self.profile.best_layout(prepared.schemes, list(prepared.spec.modules()), tp=self.tp)
