"""The command pruning-lib."""
