"""Checkpoints of pruned models that plain transformers (``load_model`` for image networks) loads, with verification."""

from __future__ import annotations

import copy
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from pruning_lib import _locks
from pruning_lib._files import readable
from pruning_lib.models import described_networks, families, image_networks, offload, portable
from pruning_lib.models.hooks import evaluating
from pruning_lib.models.parameter_counts import parameter_bytes

ROUNDING = 1e-6  # as a share of the largest logit: some experts are multiplied in an order that memory decides
SHARD_BYTES = 2 << 30  # largest file; a shard is held in memory once more while it is written


def save(model: nn.Module, tokenizer: Any, folder: str | Path, *, verify: bool = True) -> Path:
    """Write ``model`` (and ``tokenizer``, unless None) to ``folder`` as safetensors.

    For a language model, ``AutoModelForCausalLM.from_pretrained(folder)`` then gives the same logits bit for bit.
    A LLaMA whose head count does not divide its width, which transformers from 5.4 on refuses, is written
    as the equivalent Mistral model.  Offloaded weights are loaded shard by shard.  For an image network
    ``load_model(folder)`` gives the same logits.

    Parameters
    ----------
    folder : a new or empty folder; nothing is overwritten
    verify : reload the checkpoint and compare logits on random tokens or pixels before the folder appears

    Raises
    ------
    FileExistsError
        when ``folder`` is not empty.
    OSError
        when the folder cannot be written, for example because the disk is full; nothing is left behind.
    RuntimeError
        when the reloaded model differs; nothing is left behind.
    ValueError
        for an image network without a config, which cannot be built again.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> prompts = pl.batches(["The sea is", "Once upon a time"], tokenizer)
    >>> result = pl.prune(model, prompts, removed_fraction=0.2)
    >>> folder = pl.save(result.model, tokenizer, "smaller")
    >>> from transformers import AutoModelForCausalLM
    >>> AutoModelForCausalLM.from_pretrained(folder).num_parameters() == result.model.num_parameters()
    True
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give another folder or remove it first")
    refuse_mixed(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _beside(folder) as work:
        try:
            _write(model, work)
            if tokenizer is not None:
                portable.write_tokenizer(tokenizer, work)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} cannot be written: {error}. Nothing was written; it needs "
                          f"{parameter_bytes(model) / 1e9:.1f} GB, give a folder where there is room") from error
        if verify:
            _compare(model, work)
        readable(work)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    return folder


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Yield a new folder next to ``folder``, and delete it at the end unless it was renamed.

    A killed process cannot delete its folder.  The next save to the same place on the same machine deletes it; other
    machines do not, since they may not see the lock of a folder in use.
    """
    prefix = f".{folder.name}-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{escape(prefix)}????????.part"):
        with suppress(OSError), _locks.folder(left) as ours:
            shutil.rmtree(left) if ours else None
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=folder.parent))
    try:
        with _locks.folder(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refuse_mixed(model: nn.Module) -> None:
    """Raise ValueError for parameters in several dtypes, which a checkpoint does not bring back.

    Modules that transformers itself keeps in float32 do not count.
    """
    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    kinds = {str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters()
             if p.is_floating_point() and not any(part in name for part in kept)}
    if len(kinds) > 1:
        raise ValueError(f"parameters of this model have several dtypes ({', '.join(sorted(kinds))}), a checkpoint is "
                         f"loaded in one; convert it first, for example model.to(torch.bfloat16)")


def _write(model: Any, folder: Path) -> None:
    """Write weights and config; a language model is written in shards, with a config that transformers accepts."""
    if families.is_image_network(model):
        image_networks.write(model, folder)
        return
    config, other, dtype = model.config, _storable(model), stored_dtype(model)
    waits, generation = offload.is_offloaded(model), model.generation_config
    if (other is not config or dtype != model.dtype) and not waits:
        model = _with_config(model, other, dtype)
    model.config, model.generation_config = other, GenerationConfig()
    try:
        most = min(SHARD_BYTES, parameter_bytes(model) // 8) if waits else SHARD_BYTES
        model.save_pretrained(folder, max_shard_size=most)
    finally:
        model.config, model.generation_config = config, generation
    if other is not config and waits:  # the names of the weights are the same in both; readers follow the config
        _state_architecture(folder / "config.json", other)
    portable.write_both_forms(folder / "config.json")
    portable.write_generation_config(model, folder)


def stored_dtype(model: Any) -> torch.dtype:
    """Return the dtype a model is written in: its own, or that of the checkpoint it was loaded from by ``"auto"``.

    float16 has no place for numbers above 65,504; a model that came to hold one stays as it is.
    """
    wanted: torch.dtype = getattr(model, "stored_dtype", model.dtype)
    if wanted == model.dtype or offload.is_offloaded(model):
        return model.dtype
    fits = all(p.abs().max() <= torch.finfo(wanted).max for p in model.parameters())
    return wanted if fits else model.dtype


def _storable(model: Any) -> Any:
    """Return the config of the model, or the config of the equivalent model that can be stored."""
    config, family = _tied_as_the_weights(model), families.family_of(model)
    if family.stored_as is None or config.hidden_size % config.num_attention_heads == 0:
        return config
    families.refuse_head_count(model, config.num_attention_heads)
    common = {k: v for k, v in config.to_dict().items()
              if k not in ("model_type", "architectures", "transformers_version", *family.not_stored_with)}
    return AutoConfig.for_model(family.stored_as, **common, sliding_window=None)


def _tied_as_the_weights(model: Any) -> Any:
    """Return the config, corrected if it calls the two embedding matrices one while they differ, or two while one."""
    first, last = (part and part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    flag = bool(getattr(model.config, "tie_word_embeddings", False))
    if first is None or last is None or first.is_meta:
        return model.config
    tied = first is last or first.data_ptr() == last.data_ptr() or (flag and torch.equal(first, last))
    if tied == flag:
        return model.config
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = tied
    return config


def _with_config(model: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model of ``config`` with the same weights, as ``dtype``."""
    with torch.device("meta"):
        stored = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    stored.load_state_dict({name: weight.to(dtype) for name, weight in model.state_dict().items()}, assign=True)
    stored.tie_weights()
    stored.generation_config = model.generation_config
    return stored


def _state_architecture(path: Path, config: Any) -> None:
    with torch.device("meta"):
        name = type(AutoModelForCausalLM.from_config(config)).__name__
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name]}, indent=2) + "\n")


@torch.inference_mode()
def _compare(model: nn.Module, folder: Path) -> None:
    """Raise RuntimeError unless the model and its checkpoint give the same logits, up to ``ROUNDING`` in float32."""
    stored = _stored_image_network if families.is_image_network(model) else _stored_language_model
    with evaluating(model):
        ours, theirs = stored(model, folder)
    difference = (ours - theirs).abs().max().item()
    if not difference <= (ROUNDING * ours.abs().max().item() if ours.dtype == torch.float32 else 0):
        raise RuntimeError(f"the reloaded checkpoint differs from the model by {difference:g} in its logits; nothing "
                           f"was written. If you changed the dtype of a loaded model, load it with dtype= instead")


def _stored_language_model(model: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the logits (B, T, vocabulary) of the model and of its checkpoint on random tokens."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    ids = ids.to(offload.input_device(model))
    how = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    ours = _rounded(model)(ids, use_cache=False).logits
    try:  # module by module: only the weights of the running layer of the copy are in memory beside the model
        return ours, offload.load_from_disk(folder, ids.device, **how)(ids, use_cache=False).logits
    except (RuntimeError, ValueError):  # JetMoE uses weights outside of forward passes, some text towers have no type
        return ours, _loaded(model, folder, how).to(ids.device).eval()(ids, use_cache=False).logits


def _loaded(model: Any, folder: Path, how: dict[str, Any]) -> Any:
    """Return the model of a checkpoint; a text tower without a causal type is loaded by its own class."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **how)
    except ValueError:
        return type(model).from_pretrained(folder, **how)


def _rounded(model: Any) -> Any:
    """Return the model, or a copy whose weights are rounded as they are stored."""
    dtype = stored_dtype(model)
    if dtype == model.dtype:
        return model
    written = families.copy_of(model)
    for parameter in written.parameters():
        parameter.data = parameter.to(dtype).to(parameter.dtype)
    return written


def _stored_image_network(network: Any, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the logits (B, classes) of the network and of its checkpoint on random pixels."""
    weight = next(network.parameters())
    allowed: tuple[str, ...] = ()
    if families.image_family(network):
        size = network.config.arguments.get("size", 32)
        shape = (2, len(network.config.mean), size, size)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    else:
        pixels = described_networks.random_inputs(network)
        source = described_networks.description(network).source
        allowed = (source.name,) if source else ()  # the caller has built the network with it
    # files have one memory format; another one may round differently
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    return plain(pixels), image_networks.read(folder, allow_import=allowed).to(weight.device)(pixels)
