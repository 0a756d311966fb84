"""Records of families of decoder-only language models: facts that their modules cannot tell.

Most types of transformers need no record: ``structure`` finds their heads and neurons from the shapes of the network.
A record saves that search for the families used most, and states limits with a reason.
To add a family, add one entry to ``FAMILIES``; the tests run over the table.
Order of this file: parts of a block · the record · the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pruning_lib._registry import Table

NO_EXPERTS = "its blocks have no experts"


@dataclass(frozen=True)
class Part:
    """One axis of one parameter of a block, along which every unit (head, group or neuron) has the same many entries.

    Attributes
    ----------
    parameter : path within the block, e.g. ``"self_attn.q_proj.weight"``
    axis : of the parameter
    unit : ``"heads"``, ``"groups"`` (a key/value pair) or ``"neurons"``
    entries : per unit
    pieces : the entries of a unit lie in this many equal pieces, first the first piece of every unit, then the second
        of every unit and so on; 1 where they lie side by side
    grouped : the entries of each group follow those of the query heads of that group, in the same parameter
    """

    parameter: str
    axis: int
    unit: str
    entries: int
    pieces: int = 1
    grouped: bool = False

    def places(self, units: int) -> Tensor:
        """Return the entries (units, entries) of every unit, counted from where the part begins."""
        along = torch.arange(units * self.entries).view(self.pieces, units, -1)
        return along.transpose(0, 1).reshape(units, -1)


@dataclass(frozen=True)
class Experts:
    """Paths and axes of the experts of the blocks that have some, and of the neurons inside them.

    Attributes
    ----------
    blocks : numbers of the blocks that have experts
    down : path, within a block, of the tensor that takes the neurons of all experts back to the residual stream
    experts : parts with one entry per expert, the router's rows included
    neurons : parts of the experts' tensors with as many neurons as every expert has
    plain : for every block of the model, parts of an ordinary MLP whose size the same config field states (a shared
        expert, or the MLP of a block without experts); ``entries`` of its output projection are its neurons per neuron
        of an expert
    fields : config fields that state the numbers of experts and of neurons
    """

    blocks: tuple[int, ...]
    down: str
    experts: tuple[Part, ...]
    neurons: tuple[Part, ...]
    plain: tuple[tuple[Part, ...], ...]
    fields: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class LanguageFamily:
    """Module paths in one family of decoder-only language models.

    ``blocks`` is a path from the model; the other paths start inside one block.  Projections that are given the same
    path share one fused matrix: its rows are theirs, one after the other in the order of the fields.  Of a family that
    ``structure`` found, ``parts`` and ``head_parts`` list everything that heads and neurons pass through.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"
    values: str = "self_attn.v_proj"
    heads_out: str = "self_attn.o_proj"  # takes the heads back to the residual stream; empty if there are none
    neurons_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    neurons_out: str = "mlp.down_proj"  # takes the neurons back to the residual stream; empty if there are none
    parts: tuple[Part, ...] = ()
    # parts of heads and groups, one entry per block, of a model whose blocks differ in them (in the width of a head,
    # say); empty where ``parts`` has them
    head_parts: tuple[tuple[Part, ...], ...] = ()
    members: int = 1  # heads of the config that make one head: 2 where the outputs of pairs are subtracted
    # config fields that state the sizes, all fields of one size getting the same number
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {
        "heads": ("num_attention_heads",), "groups": ("num_key_value_heads",), "neurons": ("intermediate_size",)})
    experts: Experts | None = None
    found: bool = False  # by ``structure``; then ``parts`` counts, not the paths
    verified: bool = False  # of a record that was found: whether its layouts were tried on the model
    # norms between an output projection and the residual stream, if any
    heads_norm: str = ""
    neurons_norm: str = ""
    # config field that holds the factor of both output projections before they are added to the residual stream
    multiplied_by: str | None = None
    block_outputs: int = 0  # length of the tuple that blocks return, hidden states first; 0 where they return no tuple
    # why heads, neurons or experts cannot be removed at all
    refused: Mapping[str, str] = field(default_factory=lambda: {"experts": NO_EXPERTS})
    # config fields whose truth makes head removal impossible, with the reason; a dot leads into a field that is a dict
    heads_fixed_by: Mapping[str, str] = field(default_factory=dict)
    # where transformers refuses head counts that do not divide the width: the family that stores the same network ...
    stored_as: str | None = None
    # ... as long as none of these config fields is set (that family has no place for them)
    not_stored_with: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)  # config of a toy network beyond the common sizes

    def of_block(self, number: int) -> LanguageFamily:
        """Return the record as it holds for one block of the model."""
        if not self.head_parts:
            return self
        own = self.head_parts[number]
        return replace(self, parts=self.parts + own, head_parts=(), heads_out=self.heads_out if own else "")


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
