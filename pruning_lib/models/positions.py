"""The number of positions a language model was trained for; text beyond it is scored by a model nobody trained."""

from __future__ import annotations

from typing import Any


def trained_positions(model: Any) -> int | None:
    """Return the longest sequence, in tokens, that the config of ``model`` states; None where it states none."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None) or None


def longest(model: Any, wanted: int) -> int:
    """Return ``wanted`` tokens, or the trained positions of ``model`` where there are fewer."""
    return min(wanted, trained_positions(model) or wanted)


def refuse_unknown_tokens(model: Any, ids: Any) -> None:
    """Raise ValueError when a token number is beyond the embeddings: the tokenizer is that of another model."""
    found = getattr(model, "get_input_embeddings", None)
    known = getattr(found(), "num_embeddings", None) if found else None
    if known and len(ids) and int(ids.max()) >= known:
        raise ValueError(f"the text has token number {int(ids.max())}, the model has embeddings for {known} tokens: "
                         f"tokenizer and model do not belong together; load both from one folder")


def refuse_beyond(model: Any, tokens: int, part: str) -> None:
    """Raise ValueError when ``tokens`` exceed the trained positions; ``part`` names the text."""
    most = trained_positions(model)
    if most and tokens > most:
        raise ValueError(f"{part} has {tokens} tokens, the model was trained for {most} positions; give at most "
                         f"{most}")
