"""Experiments: rows of runs.yml, executed as notebooks, with records."""
