"""Model families: paths of the blocks, heads and neurons.

The record of a family holds only facts that cannot be read from the model; sizes are read from its modules.
To add a family, add one entry to ``FAMILIES`` (language models) or ``IMAGE_FAMILIES``; the tests run over both tables.
Order of this file: language families · image families · residual blocks · sizes of a language model · refusals.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

from pruning_lib.models import described_networks, growth, renumbering, structure, toy_models, verification
from pruning_lib.models.classifier_logits import logits, logits_known
from pruning_lib.models.image_families import (
    IMAGE_FAMILIES,
    ImageFamily,
    image_blocks,
    image_family,
    is_image_network,
    keeps_shape,
)
from pruning_lib.models.language_families import FAMILIES, NO_EXPERTS, Experts, LanguageFamily, Part
from pruning_lib.models.parameter_counts import parameter_count, whole_mean
from pruning_lib.models.parts import (
    Projections,
    Rows,
    block_counts,
    block_parts,
    has,
    linear,
    matrix,
    named_paths,
    places,
    projections,
    tensor,
)
from pruning_lib.models.residual_blocks import BlockInfo, Unit

__all__ = ["BlockInfo", "Experts", "FAMILIES", "IMAGE_FAMILIES", "ImageFamily", "LanguageFamily", "NO_EXPERTS", "Part",
           "Projections", "Rows", "Sizes", "Unit", "block_counts", "block_parts", "blocks",
           "classifier", "copy_of", "family_of", "has", "head_width", "image_blocks", "image_family",
           "is_image_network", "keep_blocks", "keeps_shape", "linear", "logits", "logits_known", "matrix",
           "named_paths", "output_projections", "parameter_count", "places", "projections", "refuse_head_count",
           "refuse_wrapped", "residual_blocks", "sizes", "stream_factor", "tensor", "text_config", "tiny",
           "unit"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model, read from its modules; the same in every block that has heads, or neurons.

    Heads may differ in width from block to block; numbers of parameters are then means over the blocks.
    """

    blocks: int  # L
    heads: int  # H
    groups: int  # G
    head_width: int  # D, of the first block with heads
    neurons: int  # M
    width: int  # C
    head_parameters: float  # of one query head: its rows of the query projection and columns of the output projection
    group_parameters: float  # of one key/value head, without its queries
    neuron_parameters: int
    parameters: int  # of the whole model, shared parameters counted once
    head_blocks: tuple[int, ...]  # numbers of the blocks that have heads, La of them: all, but of mixed architectures
    neuron_blocks: tuple[int, ...]  # numbers of the blocks that have neurons, Lm of them
    head_widths: tuple[int, ...]  # D in every one of ``head_blocks``


_FOUND: WeakKeyDictionary[nn.Module, LanguageFamily] = WeakKeyDictionary()
_FIXED: WeakKeyDictionary[nn.Module, tuple[int, dict[int, str]]] = WeakKeyDictionary()  # number of blocks, fixed ones


def family_of(model: nn.Module) -> LanguageFamily:
    """Return the family record of a transformers model: that of its type, else one found from its shapes.

    Raises
    ------
    ValueError
        for a module that is no language model of transformers, or whose modules are not at the paths of the record.
    """
    refuse_wrapped(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        return _found(model, kind)
    family: LanguageFamily = FAMILIES[kind]
    for path in (family.blocks, *(f"{family.blocks}.0.{p}" for p in named_paths(family))):
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{type(model).__name__} has no {path!r}: give the causal language model as transformers "
                f"loads it (AutoModelForCausalLM), not a wrapper or a part of it"
            ) from None
    return family


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError, with the way to the model itself, for one that is compiled, parallel or has adapters."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    for name, way in (("OptimizedModule", "give model._orig_mod, and compile the pruned model instead"),
                      ("DataParallel", "give model.module"), ("DistributedDataParallel", "give model.module"),
                      ("PeftModel", "give model.merge_and_unload()")):
        if name in kinds:
            raise ValueError(f"this model is wrapped ({type(model).__name__}), its modules are not where its type has "
                             f"them; {way}")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("adapters are loaded into the layers of this model, its weights are not where its type has "
                         "them; merge them first (peft: PeftModel.from_pretrained(base, adapter).merge_and_unload())")


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model that has its family record too."""
    other = copy.deepcopy(model)
    if model in _FOUND:
        _FOUND[other] = _FOUND[model]
    return other


def keep_blocks(model: nn.Module, stays: Sequence[bool]) -> None:
    """Bring the record of a model of no family up to date after some of its blocks were removed."""
    family = _FOUND.get(model)
    if family is None:
        return
    kept = [i for i, stay in enumerate(stays) if stay]
    if family.head_parts:
        _FOUND[model] = family = replace(family, head_parts=tuple(family.head_parts[old] for old in kept))
    if family.experts is None:
        return
    having = tuple(new for new, old in enumerate(kept) if old in family.experts.blocks)
    plain = tuple(family.experts.plain[old] for old in kept)
    experts = replace(family.experts, blocks=having, plain=plain) if having else None
    refused = family.refused if having else {**family.refused, "experts": NO_EXPERTS}
    _FOUND[model] = replace(family, experts=experts, refused=refused)


def _found(model: nn.Module, kind: str) -> LanguageFamily:
    """Return the record of a type that has none; the search is made once per model."""
    if model not in _FOUND:
        known, images = (", ".join(sorted(table)) for table in (FAMILIES, IMAGE_FAMILIES))
        if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
            raise ValueError(f"unknown family {kind!r}; known: {known}, and other causal language models as "
                             f"transformers loads them; image networks, of which only whole blocks can be removed: "
                             f"{images}")
        found = verification.verified(model, structure.find(model))
        if not found.verified:
            with suppress(Exception):  # of a type whose toy network cannot be built, shapes alone tell
                found = structure.as_in(found, family_of(toy_models.toy(kind)))
        _FOUND[model] = found
    return _FOUND[model]


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder blocks of a language model."""
    return cast(nn.ModuleList, model.get_submodule(family_of(model).blocks))


def unit(model: nn.Module, name: str) -> Unit:
    """Return the modules behind a block of ``residual_blocks``."""
    if image_family(model) or not is_image_network(model):
        return Unit(name)
    return described_networks.description(model).layout.units.get(name) or Unit(name)


def residual_blocks(model: nn.Module) -> list[BlockInfo]:
    """Return the residual blocks of a network in forward order.

    The decoder blocks of a language model form one stage; one is removable if a config describes the rest.  In an image
    network of no family the blocks are found by running it, see ``residual_blocks.find``.

    Raises
    ------
    ValueError
        for a language model of no family; the message lists the families.
    """
    if image_family(model):
        return image_blocks(model)
    if is_image_network(model):
        return list(described_networks.description(model).layout.blocks)
    fixed = fixed_blocks(model)
    return [BlockInfo(f"{family_of(model).blocks}.{i}", 0, i not in fixed, fixed.get(i, ""))
            for i in range(len(blocks(model)))]


def fixed_blocks(model: nn.Module) -> dict[int, str]:
    """Return the numbers of the decoder blocks that cannot be removed alone, with the reason."""
    family, count = family_of(model), len(blocks(model))
    if not family.found:
        return {}
    if _FIXED.get(model, (0, {}))[0] != count:
        _FIXED[model] = count, renumbering.fixed(model, family.blocks)
    return _FIXED[model][1]


def classifier(model: nn.Module) -> nn.Module:
    """Return the classifier; its input is the penultimate representation, (N, P), or (B, T, C) in a language model."""
    family = image_family(model)
    if family:
        return model.get_submodule(family.classifier)
    if is_image_network(model):
        path = described_networks.description(model).layout.classifier
        if path is None:
            raise ValueError(f"the output of this {type(model).__name__} is not that of a linear layer, so it has no "
                             f"penultimate features; let the network end in a linear layer")
        return model.get_submodule(path)
    family_of(model)  # raises for a model of no family
    return cast(Any, model).get_output_embeddings()


def output_projections(model: nn.Module) -> list[nn.Module]:
    """Return the output projections: those of the heads of every block, then those of the neurons of every block.

    Blocks without heads, or without neurons, have none.
    """
    family, found = family_of(model), blocks(model)
    return [block.get_submodule(path) for unit, path in (("heads", family.heads_out), ("neurons", family.neurons_out))
            for i, block in enumerate(found) if has(block, family.of_block(i), unit)]


def sizes(model: nn.Module) -> Sizes:
    """Return the sizes of ``model``, read from its modules; 0 heads or neurons if none can be removed.

    Raises
    ------
    ValueError
        when blocks differ in size, since a plan removes the same number in every block that has any.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> found = pl.sizes(model)
    >>> found.blocks, found.heads, found.groups, found.neurons
    (3, 6, 3, 64)
    """
    family, heads, neurons = family_of(model), {}, {}
    widths = [head_width(model, i) for i in range(len(blocks(model)))]
    for i, block in enumerate(blocks(model)):
        own, D = family.of_block(i), widths[i]
        counts, per_unit = block_counts(block, own, text_config(model), D), Counter[str]()
        for part in block_parts(block, own, D):
            shape = tensor(block, part.parameter).shape
            per_unit[part.unit] += shape.numel() // shape[part.axis] * part.entries
        if counts["heads"]:
            heads[i] = counts["heads"], counts["groups"], per_unit["heads"], per_unit["groups"]
        if counts["neurons"]:
            neurons[i] = counts["neurons"], per_unit["neurons"]
    for kinds in ({counts[:2] for counts in heads.values()}, set(neurons.values())):
        if len(kinds) > 1:
            raise ValueError(f"blocks differ in size ({len(kinds)} kinds); plans need the same sizes in every block")
    H, G = next((counts[:2] for counts in heads.values()), (0, 0))
    head, group = (whole_mean([counts[k] for counts in heads.values()]) for k in (2, 3))
    M, neuron = next(iter(neurons.values()), (0, 0))
    total = parameter_count(model)
    D = next((widths[i] for i in heads), head_width(model))
    return Sizes(len(blocks(model)), H, G, D, M, text_config(model).hidden_size, head, group, neuron, total,
                 tuple(heads), tuple(neurons), tuple(widths[i] for i in heads))


def text_config(model: nn.Module) -> Any:
    """Return the config of a language model's decoder."""
    return growth.text_config(cast(Any, model).config)


def head_width(model: nn.Module, block: int | None = None) -> int:
    """Return ``D``, the columns of one head in the output projection of a block, by default the first; 0 without."""
    family, config = family_of(model), text_config(model)
    if family.found:
        return verification.columns(family if block is None else family.of_block(block))
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def stream_factor(model: nn.Module) -> float:
    """Return the factor of both output projections of ``model`` when they are added to the residual stream."""
    name = family_of(model).multiplied_by
    return float(getattr(model.config, name)) if name else 1.0


def refuse_head_count(model: nn.Module, heads: int) -> None:
    """Raise ValueError, naming the allowed counts, if a model with ``heads`` per block could not be stored.

    transformers from 5.4 on refuses LLaMA configs whose head count does not divide the width.  Such a model is stored
    under the family's ``stored_as``; the count is refused only if the config sets a field that family does not have.
    """
    family, config = family_of(model), text_config(model)
    s = sizes(model)
    counts = {"heads": s.heads, "groups": s.groups, "neurons": s.neurons}
    H, G = counts["heads"], counts["groups"]
    for name, reason in family.heads_fixed_by.items():
        if heads != H and _field(config, name):
            raise ValueError(f"heads of this model cannot be removed ({name}: {reason}); use scope='neurons'")
    if family.found and heads != H:
        _refuse_unstorable(model, family, counts, heads)
    in_the_way = [name for name in family.not_stored_with if getattr(config, name, False)]
    if in_the_way and config.hidden_size % heads:
        lossless = {*range(H // G, H + 1, H // G), *range(G, H + 1, G)}  # whole groups, equal queries
        allowed = sorted(h for h in lossless if config.hidden_size % h == 0)
        raise ValueError(
            f"{heads} heads per block could not be stored: with {', '.join(in_the_way)} the count must divide the "
            f"width {config.hidden_size}. Allowed: {allowed}; or use scope='neurons'"
        )


def _refuse_unstorable(model: nn.Module, family: LanguageFamily, counts: dict[str, int], heads: int) -> None:
    """Raise ValueError unless transformers builds a network with so many heads."""
    H, G = counts["heads"], counts["groups"]

    def builds(count: int) -> bool:
        whole = count % (H // G) == 0 and count // (H // G) <= G
        left = {**counts, "heads": count, "groups": count // (H // G) if whole else G}
        try:
            growth.rebuilt(model, verification.values_of(model, family, left))
        except growth.Unplaced:
            return False
        return True

    if not builds(heads):
        lossless = sorted({*range(H // G, H + 1, H // G), *range(G, H + 1, G)})  # whole groups, equal queries
        raise ValueError(f"{heads} heads per block could not be stored, transformers refuses them for this model. "
                         f"Allowed: {[h for h in lossless if builds(h)]}; or use scope='neurons'")


def tiny(name: str, *, n_blocks: int = 2, heads: int = 4, groups: int = 2, head_width: int = 8, neurons: int = 24,
         width: int = 32, vocabulary: int = 64) -> Any:
    """Return the config of a tiny model of family ``name``, for tests and exercises."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        name, vocab_size=vocabulary, hidden_size=width, intermediate_size=neurons, num_hidden_layers=n_blocks,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **FAMILIES[name].tiny,
    )
    config.head_dim = head_width  # Phi and Qwen2 do not declare it but honour it when set
    return config


def _field(config: Any, name: str) -> Any:
    """Return a field of a config; a dot leads into a field that is a dict."""
    first, _, rest = name.partition(".")
    value = getattr(config, first, None)
    return (value or {}).get(rest) if rest else value
