"""What quality is: perplexity, KL to the original, agreement of top-1 tokens and of routers."""

from alphaquant.evaluation.metrics import Agreement, Quality, WindowScores, router_agreement, score_windows

__all__ = ["Agreement", "Quality", "WindowScores", "router_agreement", "score_windows"]
