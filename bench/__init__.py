"""Measurements against other mirrors, as ratios within one run."""
