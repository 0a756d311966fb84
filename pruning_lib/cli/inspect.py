"""The command ``inspect``: possible cuts of a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from pruning_lib.cli import output
from pruning_lib.models import (
    deployment,
    expert_surgery,
    families,
    image_networks,
    loading,
    opening,
    possible_cuts,
    skeletons,
)
from pruning_lib.pruning.selection import lossless_cuts


def show(arguments: argparse.Namespace) -> int:
    """Print the possible cuts of a model."""
    return output.answer(inspect_model, arguments)


def inspect_model(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the possible cuts of a model; a language model is read from its config alone."""
    source = loading.find(arguments.model)
    if Path(source).is_dir() and image_networks.is_image_network(Path(source)):
        return _inspect_image_network(arguments.model, image_networks.read(Path(source)))
    model = skeletons.skeleton(Path(source)) or _without_weights(source, arguments.model)
    s, facts = families.sizes(model), lossless_cuts(model)
    units = [f"{facts['heads']} heads in {facts['groups']} groups"] * bool(facts["heads"])
    units += [f"{facts['neurons']} neurons"] * bool(facts["neurons"])
    lines = [f"{arguments.model}: {facts['family']}, {s.parameters:,} parameters, {s.blocks} blocks"
             + f" of {' and '.join(units)}" * bool(units) + _some(s),
             f"all neurons but one: {facts['neurons_fraction']:.3f} of all parameters; one block: "
             f"{facts['block_fraction']:.4f}"]
    lines += ["heads that can be removed from every block (--heads-removed), and the fractions in reach "
              "(--removed-fraction):"] * bool(facts["cuts"])
    if facts["stored_as"] != facts["family"]:
        lines.append(f"  {facts['family']} has no field for the head width; without heads the network is stored as the "
                     f"equal {facts['stored_as']}")
    for cut in facts["cuts"]:
        reach = cut["refused"] or f"{cut['least_fraction']:.4f} to {cut['most_fraction']:.4f}"
        lines.append(f"  {cut['heads_removed']:3d}  {cut['grouped_query']:13s}  {reach}")
    facts["served"] = deployment.head_width_note(facts["family"])
    lines += [facts["served"]] if facts["served"] else []
    lines += [f"{unit} cannot be removed: {reason}" for unit, reason in facts["refused"].items()
              if reason not in ("", families.NO_EXPERTS) and not reason.startswith(possible_cuts.SOME_BLOCKS)]
    fixed = families.fixed_blocks(model)
    if fixed and len(fixed) < s.blocks:
        lines.append(f"blocks that have to stay: {', '.join(map(str, sorted(fixed)))} ({next(iter(fixed.values()))})")
    facts["fixed_blocks"] = sorted(fixed)
    if not facts["refused"]["experts"]:
        e = expert_surgery.sizes(model)
        lines.append(f"{len(e.blocks)} blocks have {e.experts} experts of {e.neurons} neurons; both can be removed "
                     f"(--experts-removed, --removed-fraction)")
    return {"model": arguments.model, **facts}, "\n".join(lines)


def _without_weights(source: str, name: str) -> Any:
    """Return the network that transformers builds from a config, on the meta device."""
    from transformers import AutoModelForCausalLM

    try:
        config = opening.config_of(source)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{name!r} has no config of a causal language model; give another model ({error})") from error


def _some(s: families.Sizes) -> str:
    """Return a note on the blocks that have heads and neurons, where some have none."""
    some = [f"{len(having)} of the {s.blocks} blocks have {unit}" for unit, having in (
        ("heads", s.head_blocks), ("neurons", s.neuron_blocks)) if 0 < len(having) < s.blocks]
    return f" ({', '.join(some)})" if some else ""


def _inspect_image_network(name: str, network: Any) -> tuple[dict[str, Any], str]:
    """Return the removable blocks of an image network: blocks that keep the shape, if one per stage remains."""
    from pruning_lib.pruning import consensus  # brings scipy.stats, which takes as long as torch

    infos = families.residual_blocks(network)
    stages = {info.stage: [other for other in infos if other.stage == info.stage] for info in infos}
    facts = {"model": name, "network": image_networks.kind(network), "parameters": families.parameter_count(network),
             "blocks": [info.name for info in infos], "removable": [info.name for info in infos if info.removable],
             "most_blocks_removed": consensus.max_removable(network, min_blocks=1)}
    lines = [f"{name}: {facts['network']}, {facts['parameters']:,} parameters, {len(infos)} blocks; "
             f"{facts['most_blocks_removed']} can be removed together if every stage keeps one",
             "blocks that can be removed, stage by stage (with pl.prune_blocks, or: pruning-lib run consensus_prune -p "
             f"model={name}):"]
    for stage, members in stages.items():
        free = ", ".join(info.name for info in members if info.removable)
        lines.append(f"  stage {stage + 1}, {len(members)} blocks  {free or 'none'}")
    return facts, "\n".join(lines)
