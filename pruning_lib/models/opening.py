"""Opens checkpoints that plain transformers does not open, or opens wrongly.

A LLaMA whose head count does not divide its width (pruned by AMP's authors, or trained so) is refused by the config
class of transformers from 5.4 on; it is opened as the Mistral network that computes the same.  The folder of an adapter
is no model; it is merged into its base model on request.  Tensors beside the network's own are ignored.
Order of this file: configs · adapters · tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import safe_open
from torch import nn

from pruning_lib._extras import extra
from pruning_lib.models.language_families import FAMILIES

# buffers that older versions of transformers stored, which newer ones compute
OLD_BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|rotary_emb\.\w+)$")


def config_of(source: str, **options: Any) -> Any:
    """Return the config of a language model; that of the family that stores the same network where its own is refused.

    Raises
    ------
    ValueError
        when that family has no place for a field of the config, or the head width is nowhere stated.
    Exception
        of any kind, from transformers, when there is no config to be read.
    """
    from transformers import AutoConfig, PretrainedConfig

    base = adapter_base(Path(source))
    if base is not None:
        refuse_adapter(source, base)
    fields, _ = PretrainedConfig.get_config_dict(source)
    kind = fields.get("model_type")
    family = FAMILIES[kind] if kind in FAMILIES else None
    if family is None or family.stored_as is None or fields["hidden_size"] % fields["num_attention_heads"] == 0:
        return AutoConfig.from_pretrained(source, **options)
    in_the_way = [name for name in family.not_stored_with if fields.get(name)]
    if in_the_way:
        raise ValueError(f"{fields['num_attention_heads']} heads do not divide the width {fields['hidden_size']}, "
                         f"which transformers refuses, and with {', '.join(in_the_way)} no other family "
                         f"stores this network")
    kept = {k: v for k, v in fields.items() if v is not None and k not in
            ("model_type", "architectures", "transformers_version", "pretraining_tp", *family.not_stored_with)}
    head_dim = fields.get("head_dim") or _head_width(source, fields["num_attention_heads"])
    return AutoConfig.for_model(family.stored_as, **{**kept, "head_dim": head_dim, "sliding_window": None,
                                                     "num_key_value_heads": fields.get(
                                                         "num_key_value_heads", fields["num_attention_heads"])})


def _head_width(source: str, heads: int) -> int:
    """Return the head width from the rows of a query projection in a local folder."""
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                if name.endswith("q_proj.weight"):
                    return int(file.get_slice(name).get_shape()[0]) // heads
    raise ValueError(f"{source} does not say how wide a head is; write head_dim into its config.json (rows of a query "
                     f"projection / {heads})")


def adapter_base(folder: Path) -> str | None:
    """Return the name of the base model of an adapter folder; None for a folder with a model of its own."""
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    return json.loads(path.read_text()).get("base_model_name_or_path") or ""


def refuse_adapter(folder: str | Path, base: str) -> NoReturn:
    """Raise ValueError with the two ways from an adapter to a model."""
    raise ValueError(f"{folder} holds an adapter of {base or 'a base model it does not name'}, not a model: merge it "
                     f"first (peft: merge_and_unload, then save_pretrained), or give merge_adapter=True, on the "
                     f"command line --merge-adapter")


def merged(base: nn.Module, folder: Path) -> nn.Module:
    """Return the base model with the adapter in ``folder`` added to its weights.

    Raises
    ------
    ValueError
        when the adapter does not fit, or cannot be merged.
    """
    with extra("recovery"):
        from peft import PeftModel
    try:
        return PeftModel.from_pretrained(base, folder).merge_and_unload()  # type: ignore[arg-type, operator]
    except Exception as error:  # peft raises many kinds
        raise ValueError(f"the adapter in {folder} cannot be merged into its base model: {error}") from error


def refuse_unfit(found: Mapping[str, Any]) -> None:
    """Raise ValueError when config and weights belong to different models; transformers would fill gaps at random.

    Tensors outside the blocks that the network has no place for (a value head), and buffers that older versions of
    transformers stored, are no reason: they are ignored.
    """
    beside = [name for name in found["unexpected_keys"] if re.search(r"\.\d+\.", name) and not OLD_BUFFERS.search(name)]
    lost = {"the weights lack": sorted(found["missing_keys"]), "the config has no place for": sorted(beside),
            "of another size than the config says": sorted(k for k, *_ in found["mismatched_keys"])}
    named = [f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
             for what, names in lost.items() if names]
    if named:
        raise ValueError("; ".join(named) + ": config.json and the weights are of different models; restore the "
                         "config.json that was saved with them, or get the files anew")
