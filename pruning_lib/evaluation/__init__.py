"""Evaluation: quality, robustness, cost, speed."""
