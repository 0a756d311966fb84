"""Serving programs that cannot load a checkpoint with fewer heads; users are told before a model is pruned.

They compute the width of a head as width / heads and ignore ``head_dim`` in the config.  vLLM: read in its sources
(``head_dim = hidden_size // num_heads``), not run here.  llama.cpp: run; its loader refuses the file ("wrong shape").
"""

from __future__ import annotations

OWN_EXPORT = "llama.cpp, unless the file is made by pruning-lib export"
# model type -> programs
WIDTH_FROM_HEADS = {"qwen2": ("vLLM", OWN_EXPORT), "phi": ("vLLM",), "olmo": ("vLLM",), "phi3": (OWN_EXPORT,)}


def head_width_note(model_type: str) -> str:
    """Return a sentence on programs that take no pruned heads of a model type; "" where we know of none."""
    programs = WIDTH_FROM_HEADS.get(model_type)
    if not programs:
        return ""
    return (f"{model_type} with fewer heads is not served by {'; nor by '.join(programs)}: they take the width of a "
            f"head to be width / heads. With all heads (--heads-removed 0) it is")
