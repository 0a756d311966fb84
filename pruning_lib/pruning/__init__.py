"""Pruning methods: importance, selection, block ranking, reconstruction."""
