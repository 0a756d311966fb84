"""Writes a pruned model so that plain transformers loads it, and proves it by reloading."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pruning_lib import families
from pruning_lib.activations import evaluating


def save(model: nn.Module, tokenizer: Any, folder: str | Path, *, verify: bool = True) -> Path:
    """Write ``model`` (and ``tokenizer``, unless None) to ``folder`` as safetensors.

    Stock ``AutoModelForCausalLM.from_pretrained(folder)`` then gives the same logits bit for bit.  A LLaMA whose head
    count does not divide its width, which transformers from 5.4 on refuses, is written as the Mistral network that
    computes the same.

    Parameters
    ----------
    folder : must not exist yet, or be empty: nothing is overwritten
    verify : reload what was written and compare logits on random tokens before the folder appears

    Raises
    ------
    FileExistsError
        when ``folder`` holds something.
    RuntimeError
        when the reloaded model differs; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give another folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _storable(model).save_pretrained(beside, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if verify:
            _compare(model, beside)
        beside.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _storable(model: nn.Module) -> nn.Module:
    """``model`` itself, or the same weights as a network of the family that can be stored."""
    config, family = model.config, families.of(model)
    if family.stored_as is None or config.hidden_size % config.num_attention_heads == 0:
        return model
    families.refuse_head_count(model, config.num_attention_heads)
    common = {k: v for k, v in config.to_dict().items()
              if k not in ("model_type", "architectures", "transformers_version", *family.not_stored_with)}
    other = AutoConfig.for_model(family.stored_as, **common, sliding_window=None)
    with torch.device("meta"):
        stored = AutoModelForCausalLM.from_config(other, dtype=model.dtype)
    stored.load_state_dict(model.state_dict(), assign=True)
    stored.tie_weights()
    stored.generation_config = model.generation_config
    return stored


@torch.inference_mode()
def _compare(model: nn.Module, folder: Path) -> None:
    how = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation=how)
    loaded = loaded.to(model.device).eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    with evaluating(model):
        difference = (model(ids).logits - loaded(ids).logits).abs().max().item()
    if difference != 0:
        raise RuntimeError(f"the reloaded checkpoint differs from the model by {difference:g} in its logits; nothing "
                           f"was written. If you changed the dtype of a loaded model, load it with dtype= instead")
