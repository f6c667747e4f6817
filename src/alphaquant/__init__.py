"""AlphaQuant quantizes Mixture-of-Experts (and dense) language models with GPTQ in mixed precision.

`quantize`, `plan`, `evaluate`, `export` and `report` are the command's verbs, from directory to directory; `load` gives
a model in memory, and `alphaquant.gptq` quantizes one there. The rooms whose names they share are imported from, as in
`from alphaquant.plan import Plan`.
"""

from importlib.metadata import version

from alphaquant.allocation import Search
from alphaquant.api import PlannedModel, evaluate, evaluate_tasks, export, plan, quantize, report
from alphaquant.errors import AlphaQuantError
from alphaquant.gptq import GPTQConfig
from alphaquant.pipeline import Calibration, Serving, load
from alphaquant.plan import Plan

__version__ = version("alphaquant-moe")
__all__ = [
    "AlphaQuantError",
    "Calibration",
    "GPTQConfig",
    "Plan",
    "PlannedModel",
    "Search",
    "Serving",
    "__version__",
    "evaluate",
    "evaluate_tasks",
    "export",
    "load",
    "plan",
    "quantize",
    "report",
]
