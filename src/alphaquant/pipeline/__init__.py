"""Runs: the streaming loop, quantizing, evaluating, exporting, and what they leave on disk."""
