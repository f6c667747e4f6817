"""What quality is: perplexity, KL to the original, top-1 agreement."""

from alphaquant.evaluation.metrics import Agreement, Quality, WindowScores, score_windows

__all__ = ["Agreement", "Quality", "WindowScores", "score_windows"]
