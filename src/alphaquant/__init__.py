"""AlphaQuant: mixed-precision GPTQ for Mixture-of-Experts (and dense) language models."""

from importlib.metadata import version

from alphaquant.errors import AlphaQuantError
from alphaquant.gptq import export
from alphaquant.pipeline import load

__version__ = version("alphaquant-moe")
__all__ = ["AlphaQuantError", "__version__", "export", "load"]
