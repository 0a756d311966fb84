"""Files of a checkpoint folder in a form that transformers 4.56 to 5 read alike.

The versions differ in the names of config fields and of tokenizer classes: a field of one version is ignored by another
without a word, which takes its default.  So both forms are written.
Order of this file: config · tokenizer · generation config.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# files of tokenizers; transformers does not need all of them, other programs do (tokenizer.model)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "chat_template.json", "tokenizer.model", "spiece.model", "vocab.json",
                   "merges.txt", "vocab.txt")
NEW_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # name in transformers 5 -> one that both versions know


# --- config -----------------------------------------------------------------------------------------------------------


def write_both_forms(path: Path) -> None:
    """State dtype and rotary positions in the config at ``path`` under the names of every supported version.

    A type that takes the other form for something else keeps its own alone.
    """
    before, wanted = path.read_text(), _rotary_read(path)
    fields = json.loads(before)
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    if dtype:
        fields["dtype"] = fields["torch_dtype"] = dtype
    fields.update(rotary(fields))
    if fields.get("model_type") == "olmo" and fields.get("rope_scaling"):  # transformers 4 takes the oldest form only
        fields["rope_scaling"] = {{"rope_type": "type"}.get(k, k): v for k, v in fields["rope_scaling"].items()}
    path.write_text(json.dumps(fields, indent=2) + "\n")
    if _rotary_read(path) != wanted:
        path.write_text(before)


def _rotary_read(path: Path) -> Any:
    """Return the rotary positions that transformers reads from the config at ``path``, under the names that it uses."""
    from transformers import AutoConfig, __version__

    try:
        config = AutoConfig.from_pretrained(path.parent)
    except Exception:  # transformers raises many kinds
        return None
    config = config.get_text_config(decoder=True)
    names = ("rope_theta", "rope_scaling") if __version__.startswith("4.") else ("rope_parameters",)
    return {name: _without_old_word(getattr(config, name, None)) for name in names}


def _without_old_word(value: Any) -> Any:
    """Return rotary settings without ``type``, the older word, where ``rope_type`` says the same."""
    if not isinstance(value, dict):
        return value
    return {key: _without_old_word(item) for key, item in value.items() if key != "type" or "rope_type" not in value}


def completed(config: Any) -> Any:
    """Return a config; in transformers 4, give one that transformers 5 wrote the fields that 4 reads."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5 and getattr(config, "rope_parameters", None):
        for name, value in rotary(config.to_dict()).items():
            setattr(config, name, value)
    return config


def rotary(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields on rotary positions in the form of transformers 5 and in that of 4."""
    new = fields.get("rope_parameters")
    if not new:
        return new_rotary(fields)
    if any(isinstance(value, dict) for value in new.values()):  # by kind of attention, as in Gemma 3
        full, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
        return {**_old_rotary(full), **({"rope_local_base_freq": local["rope_theta"]} if local else {})}
    return _old_rotary(new)


def _old_rotary(new: dict[str, Any]) -> dict[str, Any]:
    """Return ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` of one ``rope_parameters``."""
    kind = new.get("rope_type", "default")
    scaling = {k: v for k, v in new.items() if k not in ("rope_theta", "partial_rotary_factor")}
    old: dict[str, Any] = {name: new[name] for name in ("rope_theta", "partial_rotary_factor") if name in new}
    return {**old, "rope_scaling": None if kind == "default" else scaling}


def new_rotary(fields: dict[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` of a config in the form of transformers 4; nothing for a model without rotation."""
    if "rope_theta" not in fields or "rope_local_base_freq" in fields:
        return {}  # by kind of attention: transformers 5 reads that form itself
    scaling = dict(fields.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    partial = {k: fields[k] for k in ("partial_rotary_factor",) if k in fields}
    base = {"rope_type": kind or "default", "rope_theta": fields["rope_theta"]}
    return {"rope_parameters": {**base, **scaling, **partial}}


# --- tokenizer --------------------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer: as its own files where it is as it was loaded, else as transformers saves it.

    Files of the source that transformers does not write (``tokenizer.model``) are kept either way.  A padding token
    that ``load_model`` made up is not written, nor is a state of padding or truncation that a call left behind.
    """
    tokenizer.save_pretrained(folder)
    sources = _source_files(tokenizer)
    unchanged = "tokenizer_config.json" in sources and _as_loaded(tokenizer)
    for name, source in sources.items():
        if unchanged or not (folder / name).exists():
            (folder / name).write_bytes(source.read_bytes())
    if unchanged:
        for path in [folder / name for name in TOKENIZER_FILES if name not in sources and name != "tokenizer.json"]:
            path.unlink(missing_ok=True)  # the source says the same in another file
    _mend_config(folder, drop_padding=getattr(tokenizer, "padding_made_up", False))
    if not unchanged:
        _drop_left_over_state(folder / "tokenizer.json")


def _source_files(tokenizer: Any) -> dict[str, Path]:
    """Return name -> path of the files a tokenizer was loaded from: a folder, or a hub name's copies in the cache."""
    name = getattr(tokenizer, "name_or_path", "") or ""
    if name and Path(name).is_dir():
        return {file: Path(name) / file for file in TOKENIZER_FILES if (Path(name) / file).is_file()}
    return dict(_cached_files(name)) if "/" in name else {}


def _cached_files(name: str) -> Iterator[tuple[str, Path]]:
    from transformers.utils.hub import cached_file

    for file in TOKENIZER_FILES:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False)
        if found:
            yield file, Path(found)


def _as_loaded(tokenizer: Any) -> bool:
    """Return whether a tokenizer is unchanged since it was loaded, padding aside."""
    from transformers import AutoTokenizer

    try:
        fresh = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    except Exception:  # the source may need code of its own, or be of a kind that is gone
        return False
    return type(fresh) is type(tokenizer) and _described(fresh) == _described(tokenizer)


def _described(tokenizer: Any) -> dict[str, Any]:
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    return {"words": tokenizer.get_vocab(), "special": special, "template": getattr(tokenizer, "chat_template", None),
            "model_max_length": tokenizer.model_max_length, "sample": tokenizer("Ab 1\n c")["input_ids"],
            "padding_side": tokenizer.padding_side}


def _mend_config(folder: Path, *, drop_padding: bool) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            before = json.loads(path.read_text())
            fields = {k: v for k, v in before.items() if not (drop_padding and k == "pad_token")}
            if name == "tokenizer_config.json":
                fields = _for_both(fields)
            if fields != before:
                path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _drop_left_over_state(path: Path) -> None:
    if path.is_file():
        fields = json.loads(path.read_text())
        if fields.get("padding") or fields.get("truncation"):
            path.write_text(json.dumps({**fields, "padding": None, "truncation": None}, ensure_ascii=False))


def _for_both(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's config with a class and a form of special tokens that every version knows."""
    fields = dict(fields)
    if fields.get("tokenizer_class") in NEW_CLASSES:
        fields["tokenizer_class"] = NEW_CLASSES[fields["tokenizer_class"]]
    if isinstance(fields.get("extra_special_tokens"), list):  # transformers 4 wants a dict there
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return fields


# --- generation config ------------------------------------------------------------------------------------------------


def write_generation_config(model: Any, folder: Path) -> None:
    """Write the model's generation config as it is; transformers refuses to save some published ones (LLaMA 2's)."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        (folder / "generation_config.json").write_text(config.to_json_string(use_diff=True))
