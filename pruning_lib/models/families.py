"""Model families: paths of the blocks, heads and neurons.

The record of a family holds only facts that cannot be read from the model; sizes are read from its modules.
To add a family, add one entry to ``FAMILIES`` (language models) or ``IMAGE_FAMILIES``; the tests run over both tables.
Order of this file: language families · image families · residual blocks · sizes of a language model · refusals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pruning_lib._registry import Table
from pruning_lib.models.cifar_resnet import Block, CifarResNet
from pruning_lib.models.keras_resnet import KerasBlock, KerasResNet


@dataclass(frozen=True)
class LanguageFamily:
    """Module paths in one family of decoder-only language models.

    ``blocks`` is a path from the model; the other paths start inside one block.  Projections with the same path share
    one fused matrix, whose rows belong to them one after the other in the order of the fields.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    heads_out: str = "self_attn.o_proj"  # output projection of attention
    neurons_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    neurons_out: str = "mlp.down_proj"  # output projection of the MLP
    # config field that holds the factor of both output projections before they are added to the residual stream
    multiplied_by: str | None = None
    # config fields that make head removal impossible when set, with the reason; a dot leads into a field that is a dict
    heads_fixed_by: Mapping[str, str] = field(default_factory=dict)
    # family under which a model is stored whose head count does not divide its width, which transformers refuses ...
    stored_as: str | None = None
    # ... unless one of these config fields is set (that family has no such fields)
    not_stored_with: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)  # config of a tiny test model beyond the common sizes


FAMILIES: Table = Table("family")
FAMILIES["llama"] = LanguageFamily(stored_as="mistral", not_stored_with=("attention_bias", "mlp_bias"))
FAMILIES["mistral"] = LanguageFamily(tiny={"sliding_window": None})
FAMILIES["qwen2"] = LanguageFamily()
FAMILIES["qwen3"] = LanguageFamily()
FAMILIES["gemma"] = LanguageFamily()
FAMILIES["olmo"] = LanguageFamily()
FAMILIES["smollm3"] = LanguageFamily()
FAMILIES["granite"] = LanguageFamily(
    multiplied_by="residual_multiplier",
    tiny={"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "attention_multiplier": 0.25, "logits_scaling": 2.0},
)
FAMILIES["phi"] = LanguageFamily(
    heads_out="self_attn.dense",
    neurons_in=("mlp.fc1",),
    neurons_out="mlp.fc2",
    heads_fixed_by={"qk_layernorm": "its query/key norm is sized as width / heads when the model is loaded"},
)
FAMILIES["phi3"] = LanguageFamily(
    queries="self_attn.qkv_proj",
    keys="self_attn.qkv_proj",
    values="self_attn.qkv_proj",
    neurons_in=("mlp.gate_up_proj", "mlp.gate_up_proj"),
    heads_fixed_by={"rope_parameters.short_factor": "its list of long-context factors has to fit width / heads"},
    tiny={"sliding_window": None},
)


@dataclass(frozen=True)
class Rows:
    """One projection of a block: its rows of a linear layer; all rows unless the layer is fused."""

    linear: nn.Linear
    start: int
    count: int

    def of(self, rows: Tensor) -> Tensor:
        """Return the rows of this projection from a tensor with one row per output of the layer."""
        return rows[self.start:self.start + self.count]

    @property
    def parameters(self) -> int:
        """Return the number of parameters, biases included."""
        return self.count * (self.linear.in_features + (self.linear.bias is not None))


@dataclass(frozen=True)
class Projections:
    """All projections of the heads and neurons of one block."""

    queries: Rows  # (H*D, C)
    keys: Rows  # (G*D, C)
    values: Rows
    neurons_in: tuple[Rows, ...]  # each (M, C)
    heads_out: nn.Linear  # (C, H*D)
    neurons_out: nn.Linear  # (C, M)


@dataclass(frozen=True)
class ImageFamily:
    """Module paths of the residual blocks in one family of image networks."""

    network: type[nn.Module]
    block: tuple[type[nn.Module], ...]  # classes of residual blocks among the members of the sequences
    sequences: tuple[str, ...]  # paths to the sequences of blocks, in forward order
    classifier: str  # the layer that maps features (N, P) to classes


IMAGE_FAMILIES: Table = Table("image family")
IMAGE_FAMILIES["cifar_resnet"] = ImageFamily(CifarResNet, (Block,), ("layer1", "layer2", "layer3"), "linear")
IMAGE_FAMILIES["keras_resnet"] = ImageFamily(KerasResNet, (KerasBlock,), ("layer1", "layer2", "layer3"), "linear")
IMAGE_FAMILIES["torchvision_resnet"] = ImageFamily(
    ResNet, (BasicBlock, Bottleneck), ("layer1", "layer2", "layer3", "layer4"), "fc")
IMAGE_FAMILIES["mobilenet_v2"] = ImageFamily(MobileNetV2, (InvertedResidual,), ("features",), "classifier.1")


@dataclass(frozen=True)
class BlockInfo:
    """One residual block of a network in its present state."""

    name: str  # its path, e.g. "layer1.3"
    stage: int  # counted from 0; a block that changes the shape begins a stage
    removable: bool  # the shape of the data is the same without the block


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model, read from its modules; the same in every block."""

    blocks: int  # L
    heads: int  # H
    groups: int  # G
    head_width: int  # D
    neurons: int  # M
    width: int  # C
    head_parameters: int  # of one query head: its rows of the query projection and columns of the output projection
    group_parameters: int  # of one key/value head, without its queries
    neuron_parameters: int
    parameters: int  # of the whole model, shared parameters counted once


def family_of(model: nn.Module) -> LanguageFamily:
    """Return the family record of a transformers model.

    Raises
    ------
    ValueError
        for a model type without a record, or a model whose modules are not at the paths of the record.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        known, images = (", ".join(sorted(table)) for table in (FAMILIES, IMAGE_FAMILIES))
        raise ValueError(f"unknown family {kind!r}; known: {known} (language models as transformers loads them); "
                         f"image networks, of which only whole blocks can be removed: {images}")
    family: LanguageFamily = FAMILIES[kind]
    for path in (family.blocks, *(f"{family.blocks}.0.{p}" for p in _projections(family))):
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{type(model).__name__} has no {path!r}: give the causal language model as transformers "
                f"loads it (AutoModelForCausalLM), not a wrapper or a part of it"
            ) from None
    return family


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder blocks of a language model."""
    return cast(nn.ModuleList, model.get_submodule(family_of(model).blocks))


def image_family(model: nn.Module) -> ImageFamily | None:
    """Return the record of an image network, found by its class; None for any other model."""
    return next((family for family in IMAGE_FAMILIES.values() if isinstance(model, family.network)), None)


def residual_blocks(model: nn.Module) -> list[BlockInfo]:
    """Return the residual blocks of a network in forward order.

    The decoder blocks of a language model form one stage and are all removable.

    Raises
    ------
    ValueError
        for a network of no family; the message lists the families.
    """
    if image_family(model):
        return image_blocks(model)
    return [BlockInfo(f"{family_of(model).blocks}.{i}", 0, True) for i in range(len(blocks(model)))]


def image_blocks(model: nn.Module) -> list[BlockInfo]:
    """Return the residual blocks of an image network; every block that changes the shape begins a stage."""
    family = cast(ImageFamily, image_family(model))
    found: list[BlockInfo] = []
    for sequence in family.sequences:
        for i, block in enumerate(cast(nn.Sequential, model.get_submodule(sequence))):
            if isinstance(block, family.block):
                keeps = keeps_shape(block)
                stage = found[-1].stage + (not keeps) if found else 0
                found.append(BlockInfo(f"{sequence}.{i}", stage, keeps))
    return found


def keeps_shape(block: nn.Module) -> bool:
    """Return True if the output of a residual block has the shape of its input, judged by the block's convolutions.

    The convolutions are in forward order; a shortcut with its own convolution comes last and has as many output
    channels as the branch.
    """
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    same_channels = convolutions[0].in_channels == convolutions[-1].out_channels
    return same_channels and all(convolution.stride == (1, 1) for convolution in convolutions)


def classifier(model: nn.Module) -> nn.Module:
    """Return the classifier; its input is the penultimate representation, (N, P), or (B, T, C) in a language model."""
    family = image_family(model)
    if family:
        return model.get_submodule(family.classifier)
    family_of(model)  # raises for a model of no family
    return cast(Any, model).get_output_embeddings()


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the logits (..., vocabulary) of a language model from the input of its classifier, (..., C).

    In most families they are the output of the classifier; Granite divides it, Gemma 2 caps it softly.
    """
    found: Tensor = cast(Any, model).get_output_embeddings()(hidden)
    divisor, cap = (getattr(model.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
    if divisor:
        found = found / divisor
    return cap * torch.tanh(found / cap) if cap else found


@torch.no_grad()
def logits_known(model: nn.Module) -> bool:
    """Return True if ``logits`` agrees with the forward pass of the model on two tokens."""
    network = cast(Any, model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=network.device)
    expected = network(input_ids=ids, use_cache=False).logits
    found = logits(model, network.base_model(input_ids=ids, use_cache=False).last_hidden_state).to(expected.device)
    return bool((found - expected).abs().max() <= 0.01 * expected.abs().max())


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module; shared ones count once."""
    return sum(p.numel() for p in module.parameters())


def sizes(model: nn.Module) -> Sizes:
    """Return the sizes of ``model``, read from its modules.

    Raises
    ------
    ValueError
        when blocks differ in size, since a plan removes the same number in every block.
    """
    family, found = family_of(model), set()
    D = head_width(model)
    for block in blocks(model):
        p = projections(block, family)
        H, G, M, C = p.queries.count // D, p.keys.count // D, p.neurons_out.in_features, p.heads_out.out_features
        head = p.queries.parameters // H + D * C
        group = (p.keys.parameters + p.values.parameters) // G
        neuron = sum(rows.parameters for rows in p.neurons_in) // M + C
        found.add((H, G, M, C, head, group, neuron))
    if len(found) != 1:
        raise ValueError(f"blocks differ in size ({len(found)} kinds); plans need the same sizes in every block")
    H, G, M, C, head, group, neuron = found.pop()
    total = parameter_count(model)
    return Sizes(len(blocks(model)), H, G, D, M, C, head, group, neuron, total)


def linear(block: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer at ``path`` inside a block."""
    return cast(nn.Linear, block.get_submodule(path))


def projections(block: nn.Module, family: LanguageFamily) -> Projections:
    """Return the projections of one block; fused matrices are split into their projections."""
    out, down = linear(block, family.heads_out), linear(block, family.neurons_out)
    shared = family.queries == family.keys
    pairs = linear(block, family.keys).out_features - shared * out.in_features
    pairs //= 1 + (family.keys == family.values)
    counts = [(family.queries, out.in_features), (family.keys, pairs), (family.values, pairs),
              *((path, down.in_features) for path in family.neurons_in)]
    start, rows = dict.fromkeys(dict(counts), 0), []
    for path, count in counts:
        rows.append(Rows(linear(block, path), start[path], count))
        start[path] += count
    return Projections(rows[0], rows[1], rows[2], tuple(rows[3:]), out, down)


def head_width(model: nn.Module) -> int:
    """Return the head width ``D``: the value in the config, or else width / heads."""
    config: Any = model.config
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
    family, config = family_of(model), cast(Any, model.config)
    first = projections(blocks(model)[0], family)
    H, G = (rows.count // head_width(model) for rows in (first.queries, first.keys))
    for name, reason in family.heads_fixed_by.items():
        if heads != H and _field(config, name):
            raise ValueError(f"heads of this model cannot be removed ({name}: {reason}); use scope='neurons'")
    in_the_way = [name for name in family.not_stored_with if getattr(config, name, False)]
    if in_the_way and config.hidden_size % heads:
        lossless = {*range(H // G, H + 1, H // G), *range(G, H + 1, G)}  # whole groups, equal queries
        allowed = sorted(h for h in lossless if config.hidden_size % h == 0)
        raise ValueError(
            f"{heads} heads per block could not be stored: with {', '.join(in_the_way)} the count must divide the "
            f"width {config.hidden_size}. Allowed: {allowed}; or use scope='neurons'"
        )


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


def _projections(family: LanguageFamily) -> tuple[str, ...]:
    return (family.queries, family.keys, family.values, family.heads_out, *family.neurons_in, family.neurons_out)


def _field(config: Any, name: str) -> Any:
    """Return a field of a config; a dot leads into a field that is a dict."""
    first, _, rest = name.partition(".")
    value = getattr(config, first, None)
    return (value or {}).get(rest) if rest else value
