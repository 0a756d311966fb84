"""A tokenizer in the form of a GGUF file.

llama.cpp knows two kinds that matter here: byte-level BPE (GPT-2, Llama 3, Qwen), which it cuts into words by a rule
named in the file, and BPE on characters with bytes for unknown ones (SentencePiece: Llama 2, Mistral, Phi-3), which
it merges by a score per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra

SPACE = "\u2581"  # stands for a space in SentencePiece
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how text is cut into words before pairs are merged -> llama.cpp's name of that rule
_SPLITS = {
    _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST: "qwen2",
}


@dataclass
class Vocabulary:
    """Tokens by number, with their types, and the settings of the tokenizer in llama.cpp."""

    model: str  # "gpt2" or "llama"
    split: str
    tokens: list[str]
    types: list[int]
    special: Mapping[str, int]  # "bos", "eos", "unk", "pad" -> number
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    begins_with_bos: bool = False
    ends_with_eos: bool = False
    prefixes_space: bool = False
    chat_template: str = ""

    def add_to(self, writer: Any) -> None:
        """Write everything into a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefixes_space)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins_with_bos)
        writer.add_add_eos_token(self.ends_with_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def package() -> Any:
    """Return the package gguf; MissingExtra where it is not installed."""
    with extra("gguf"):
        import gguf
    return gguf


def read(folder: Path, size: int) -> Vocabulary:
    """Read the tokenizer in ``folder`` for a model of ``size`` token numbers.

    Raises
    ------
    ValueError
        where there is none, or one of a kind that llama.cpp has no rule for that we know.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        made = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{folder} has no tokenizer that can be converted: {error}") from error
    if made["model"]["type"] != "BPE":
        raise _unknown(folder, made["model"]["type"])
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in made["model"]["merges"]]
    ids = tokenizer("a")["input_ids"]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    common: dict[str, Any] = {
              "special": {name: number for name, number in special.items() if number is not None},
              "begins_with_bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
              "ends_with_eos": bool(ids) and ids[-1] == tokenizer.eos_token_id,
              "chat_template": tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""}
    tokens, types = _tokens(made, size)
    if made["model"].get("byte_fallback"):
        return Vocabulary("llama", "default", tokens, types, scores=_scores(tokens, merges), **common,
                          prefixes_space=tokenizer.tokenize("a")[0].startswith(SPACE))
    return Vocabulary("gpt2", _split(made, folder), tokens, types, merges=merges, **common)


def _tokens(made: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return token and type of every number below ``size``; numbers without a token are padding of the matrix."""
    gguf = package()
    words = {number: word for word, number in made["model"]["vocab"].items()}
    added = {token["id"]: token for token in made["added_tokens"]}
    tokens: list[str] = []
    types: list[int] = []
    for number in range(size):
        token = added.get(number)
        word = token["content"] if token else words.get(number)
        tokens.append(f"[PAD{number}]" if word is None else word)
        if word is None:
            types.append(gguf.TokenType.UNUSED)
        elif token:
            types.append(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
        elif made["model"].get("byte_fallback") and len(word) == 6 and word.startswith("<0x"):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.UNKNOWN if word == made["model"].get("unk_token") else gguf.TokenType.NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return a score per token: the higher, the earlier its pair is merged; pieces that no pair makes come last."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _split(made: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of the rule by which a byte-level tokenizer cuts text into words."""
    rules = made["pre_tokenizer"] or {}
    steps = rules.get("pretokenizers", [rules])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name:
                return name
    raise _unknown(folder, f"BPE after {json.dumps(rules)[:200]}")


def _unknown(folder: Path, kind: str) -> ValueError:
    return ValueError(f"the tokenizer in {folder} is of a kind that is not converted here ({kind}); llama.cpp's own "
                      f"convert_hf_to_gguf.py may know it")
