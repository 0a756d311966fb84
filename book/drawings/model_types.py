"""Writes ``chapters/model_types.md``: what can be removed from every causal model type of the installed transformers.

Of every type a toy network with random weights is built, cut, saved and loaded again; the numbers of the table are
measured on it.  Takes about five minutes on one core.

    python book/drawings/model_types.py
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pruning_lib.models import checkpoints, equivalents, expert_surgery, families, possible_cuts, surgery, verification
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.models.expert_plan import ExpertPlan
from pruning_lib.models.growth import input_axis
from pruning_lib.models.hooks import skip_block
from pruning_lib.models.language_families import NO_EXPERTS
from pruning_lib.models.plan import Plan
from pruning_lib.models.toy_models import toy

ROUNDING = 1e-6  # as a share of the largest logit: some experts are multiplied in an order that memory decides
UNCUT = "transformers loads even an uncut network of this type with other logits"
FIXED_WIDTH = "computes the head width"
SOME = "only some blocks: "
UNITS = ("heads", "neurons", "experts", "blocks")
FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "chapters" / "model_types.md"
TABLE = FOLDER / "model_types.json"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def examine(name: str) -> dict[str, Any]:
    """Return, for one model type, what can be removed or why not, and how exact it was.

    Returns
    -------
    dict with ``type``, one entry per unit of ``UNITS`` ("" where it can be removed, else the reason), and for those
    that can ``cut``, the largest difference of a logit between masking and removing, and ``reload``, between the cut
    model and its checkpoint loaded by plain transformers; ``stored_as`` where a model that loses heads becomes one of
    another type
    """
    try:
        model = toy(name)
        family = families.family_of(model)
    except Exception as error:  # transformers raises many kinds
        reason = f"no toy network could be examined: {type(error).__name__}: {_line(error)}"
        return {"type": name, **dict.fromkeys(UNITS, reason), "cut": {}, "reload": {}}
    row: dict[str, Any] = {"type": name, "cut": {}, "reload": {},
                           **{unit: family.refused.get(unit, "") for unit in UNITS}}
    row |= possible_cuts.removable(model)
    if equivalents.entry(model) and not row["heads"]:
        row["stored_as"] = equivalents.with_head_width(model).config.model_type
    if family.members > 1 and not row["heads"]:
        row["members"] = family.members
    trials = {"heads": _cut_units, "neurons": _cut_units, "experts": _cut_experts, "blocks": _cut_blocks}
    for unit, cut in trials.items():
        if not row[unit]:
            try:
                found = [(masked, _reload(pruned)) for masked, pruned in cut(model, unit)]
                row["cut"][unit], row["reload"][unit] = map(max, zip(*found, strict=True))
                if not row["cut"][unit] < 1e-5 or not row["reload"][unit] < ROUNDING:
                    differ = f"logits differ by {row['cut'][unit]:.2g}, after loading by {row['reload'][unit]:.2g}"
                    row[unit] = differ if _reload(model) < ROUNDING else UNCUT
            except _SomeOnly as error:
                row[unit] = f"{SOME}{_line(error)}"
            except Exception as error:
                row[unit] = f"{type(error).__name__}: {_line(error)}"
    return row


class _SomeOnly(Exception):
    """Says why some of the blocks of a type cannot be removed."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _cut_units(model: nn.Module, unit: str) -> Iterator[tuple[float, nn.Module]]:
    """Remove heads or neurons from every block that has them; the masked model has their columns at zero."""
    masked, as_other = copy.deepcopy(model), equivalents.entry(model)
    if as_other and (unit == "heads" or not families.sizes(model).neurons):
        model = equivalents.with_head_width(model)
        path = as_other.heads_out if unit == "heads" else as_other.neurons_out
    else:
        family = families.family_of(model)
        path = family.heads_out if unit == "heads" else family.neurons_out
    s, plan = families.sizes(model), _plan(model, unit)
    blocks = families.blocks(masked)
    for i, number in enumerate(s.head_blocks if unit == "heads" else s.neuron_blocks):
        if unit == "heads":
            gone = (plan.removed_heads[i][:, None] * s.head_widths[i] + torch.arange(s.head_widths[i])).flatten()
        else:
            gone = plan.neurons[i]
        layer = blocks[number].get_submodule(path)
        layer.weight.data.index_fill_(input_axis(layer), gone, 0)
    pruned = surgery.remove(model, plan)
    yield _difference(_logits(masked), _logits(pruned)), pruned


def _plan(model: nn.Module, unit: str) -> Plan:
    """Return a plan that removes other heads or other neurons in every block."""
    s, family = families.sizes(model), families.family_of(model)
    La, Lm = len(s.head_blocks), len(s.neuron_blocks)
    if unit == "neurons":
        columns = torch.stack([torch.arange(s.neurons).roll(3 * i)[:5].sort().values for i in range(Lm)])
        return Plan("whole_groups", torch.zeros(La, 0, dtype=torch.long), columns, s)
    none = torch.zeros(Lm, 0, dtype=torch.long)
    if family.found:
        trial = next(trial for trial in verification.trials(model, family, "heads")
                     if verification.manner(trial) not in family.refused)
        kept = (s.groups - len(trial["groups"]) if "groups" in trial else
                s.heads // s.groups - len(trial["heads"]) // s.groups)
    else:
        trial, kept = {"groups": ()}, s.groups - 1
    if "groups" in trial:
        gone = torch.stack([torch.arange(s.groups).roll(i)[kept:].sort().values for i in range(La)])
        return Plan("whole_groups", gone, none, s)
    gone = torch.stack([torch.arange(s.heads // s.groups)[kept:].expand(s.groups, -1)] * La)
    return Plan("equal_queries", gone, none, s)


def _cut_experts(model: nn.Module, unit: str) -> Iterator[tuple[float, nn.Module]]:
    """Remove one expert of every block and neurons of all others; masked, routers never choose it."""
    s, experts = expert_surgery.sizes(model), expert_surgery.tried(model, experts_too=True)
    m = expert_surgery.row_multiple(model)
    neurons = torch.stack([torch.stack([torch.arange(s.neurons).roll(e + i)[:m].sort().values
                                        for e in range(s.experts)]) for i in range(len(s.blocks))])
    plain = tuple(torch.arange(s.plain_removed(i, m)) for i in range(len(s.plain)))
    plan = ExpertPlan(torch.arange(len(s.blocks))[:, None] % s.experts, neurons, plain, s)
    masked = copy.deepcopy(model)
    blocks = families.blocks(masked)
    for i, block in enumerate(blocks):
        inside = neurons[s.blocks.index(i)] if i in s.blocks else None
        expert_surgery.mask_neurons(block, experts, i, inside, plain[i])
    routers = {i: (blocks[i], plan.experts[n]) for n, i in enumerate(s.blocks)}
    with expert_surgery.masked_routers(routers, experts):
        expected = _logits(masked)
    pruned = surgery.remove(model, plan)
    yield _difference(expected, _logits(pruned)), pruned


def _cut_blocks(model: nn.Module, unit: str) -> Iterator[tuple[float, nn.Module]]:
    """Remove every block alone; masked, its output is its input."""
    refused = ""
    for info in families.residual_blocks(model):
        with skip_block(model, info.name):
            expected = _logits(model)
        try:
            pruned = surgery.remove(model, BlockPlan.of(model, [info.name]))
        except ValueError as error:
            refused = refused or str(error)
            continue
        yield _difference(expected, _logits(pruned)), pruned
    if refused:
        raise _SomeOnly(refused)


def _reload(model: Any) -> float:
    with tempfile.TemporaryDirectory() as parent:
        folder = checkpoints.save(model, None, Path(parent) / "model", verify=False)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        except ValueError:  # text towers that only their own class loads
            loaded = type(model).from_pretrained(folder)
    return _difference(_logits(model), _logits(loaded))


def page(rows: list[dict[str, Any]], version: str) -> str:
    """Return the page in Markdown."""
    can = {unit: sum(not row[unit] for row in rows) for unit in UNITS}
    either = sum(not row["neurons"] or not row["experts"] for row in rows)
    exact = sum(not any(row["reload"].values()) for row in rows if row["reload"])
    rounded = max((value for row in rows for unit, value in row["reload"].items() if not row[unit]), default=0)
    worst = max((value for row in rows for unit, value in row["cut"].items() if not row[unit]), default=0)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for unit in UNITS:
            if _cell(row, unit) is None and row["type"] not in reasons.setdefault(_reason(row, unit), []):
                reasons[_reason(row, unit)].append(row["type"])
    lines = [
        "# Model types", "",
        "Can this library prune your model, and which parts of it? `pruning-lib inspect MODEL` answers for one model. "
        f"This page answers for all {len(rows)} causal model types of transformers {version}.", "",
        "## The answer", "",
        f"- **Neurons** can be removed from {either} types ({_share(either, rows)}): from the MLP of {can['neurons']}, "
        f"inside the experts of {can['experts']}.",
        f"- **Heads** can be removed from {can['heads']} types ({_share(can['heads'], rows)}). In "
        f"{sum(FIXED_WIDTH in row['heads'] for row in rows)} of the other types, transformers computes the head width "
        "as width / heads. With fewer heads each head would be wider, so no config describes the cut network. Types "
        "marked *as* have this limit too. A model of theirs that loses heads is stored as the type named there, which "
        "computes the same and states the head width. In types marked *in pairs* the outputs of two heads are "
        "subtracted, so that both go together.",
        f"- **Blocks**: any block can be removed from {can['blocks']} types ({_share(can['blocks'], rows)}), only some "
        f"blocks from {sum(row['blocks'].startswith(SOME) for row in rows)}. **Experts** can be removed from "
        f"{can['experts']} types.", "",
        "Find your type in the table: it is `model_type` in the file `config.json` of the model.", "",
        "## The table", "",
        "✓: can be removed. –: the type has no such part. *Inside experts*: all neurons belong to experts. A number: "
        "cannot be removed; the list of reasons below has the number.", "",
        "| type | heads | neurons | experts | blocks |", "| --- | --- | --- | --- | --- |"]
    reasons = {reason: types for reason, types in reasons.items() if types}
    numbers = {reason: str(i) for i, reason in enumerate(reasons, 1)}
    for row in rows:
        cells = [_cell(row, unit) or numbers[_reason(row, unit)] for unit in UNITS]
        lines.append(f"| {row['type']} | {' | '.join(cells)} |")
    lines += ["", "## Reasons", "", "```{admonition} All reasons, by number", ":class: dropdown"]
    lines += [f"{numbers[reason]}. {reason} ({len(types)} {'type' if len(types) == 1 else 'types'}: {', '.join(types)})"
              for reason, types in reasons.items()]
    lines += ["```", "", "## Limits", "",
              "A setting of a particular model can forbid what its type allows. The library then refuses the cut "
              "before it starts, and states the reason. Quality was not measured here: that a part *can* be removed "
              "does not mean that it should be.", "",
              "```{admonition} How we measured", ":class: dropdown",
              "Every ✓ was measured on a toy network of two or three blocks with random weights in float32. Where "
              "blocks with attention alternate with others, heads are removed from those that have some. Every block "
              "was removed alone. The masked network and the cut network differ in their logits by at most "
              f"{worst:.1g} of the largest logit. Plain `AutoModelForCausalLM.from_pretrained` then loads the "
              f"checkpoint of the cut network. Its logits are equal bit for bit in {exact} types, and to "
              f"{rounded:.1g} of the "
              "largest logit in all. The parts of types without an entry of their own are found from the shapes of the "
              "network (see {doc}`adding`).", "```"]
    return "\n".join(lines) + "\n"


def _share(count: int, rows: list[dict[str, Any]]) -> str:
    return f"{100 * count / len(rows):.0f} %"


def _cell(row: dict[str, Any], unit: str) -> str | None:
    """Return the cell of one unit; None where it needs a reason."""
    if not row[unit]:
        how = f"as {row['stored_as']}" if row.get("stored_as") else "in pairs" if row.get("members") == 2 else ""
        return f"✓ {how}".strip() if unit == "heads" else "✓"
    if unit == "experts" and row[unit] == NO_EXPERTS:
        return "–"
    return "inside experts" if unit == "neurons" and "see 'experts'" in row[unit] and not row["experts"] else None


def _reason(row: dict[str, Any], unit: str) -> str:
    """Return the reason with its unit; what holds for a whole type is said once."""
    return row[unit] if row[unit].startswith("no toy") else f"{unit}: {row[unit]}"


def main() -> None:
    """Examine the named types, or all, and write the table and the page."""
    names = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    known = {row["type"]: row for row in json.loads(TABLE.read_text())["rows"]} if TABLE.exists() else {}
    for name in names:
        known[name] = examine(name)
        print(name, {unit: known[name][unit] or "yes" for unit in UNITS}, flush=True)
    rows = [known[name] for name in sorted(known)]
    TABLE.write_text(json.dumps({"transformers": transformers.__version__, "rows": rows}, indent=1) + "\n")
    PAGE.write_text(page(rows, transformers.__version__))


if __name__ == "__main__":
    main()
