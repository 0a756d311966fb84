"""Pipeline: prunes the width and the depth of a language model, with reconstruction, in one call.

Width (heads and neurons by a method of ``importance.METHODS``), depth (blocks by a criterion of
``block_ranking.CRITERIA``), or width and then depth, a combination proposed by MoP.  All variants remove the same
fraction of all parameters; depth alone removes the nearest number of whole blocks and reports the fraction reached.
A mixture of experts loses whole experts, and neurons inside the others.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pruning_lib import data
from pruning_lib.data.batching import right_padded
from pruning_lib.models import checkpoints, equivalents, expert_surgery, families, positions, surgery
from pruning_lib.models.expert_plan import ExpertPlan
from pruning_lib.models.plan import Plan
from pruning_lib.pruning import consensus, importance
from pruning_lib.pruning.block_ranking import Criterion, criterion_of
from pruning_lib.pruning.expert_importance import choose_experts, expert_importance, uniform
from pruning_lib.pruning.held_out import refuse_little_text
from pruning_lib.pruning.importance import Method
from pruning_lib.pruning.reconstruction import MODES, RIDGES, Reconstruction, reconstruct
from pruning_lib.pruning.selection import Importance, choose

RECONSTRUCTIONS = ("auto", "none", *MODES)
BEST = "sequential"  # the book's page methods_compared: perplexity 35 instead of 54 at 20 % removed
CALIBRATION = "alpaca"  # read where a tokenizer is given and nothing else
LONG_TEXT = {"alpaca": "c4", "mini_prompts": "mini_calibration_text"}  # text for reconstruction beside these prompts
PROMPTS, SAMPLES = 50, 100  # texts of each, where there are as many
Texts = str | Path | Sequence[str]


@dataclass(frozen=True)
class Pruned:
    """A pruned language model and the steps that produced it.

    Attributes
    ----------
    reached_fraction : removed fraction of all parameters of the original model
    steps : one sentence per removal step
    reconstructions : results of the reconstruction, one per output projection
    seconds : duration of each phase
    plan : removed heads and neurons, or removed experts and neurons of experts; None for depth alone
    blocks : paths of the removed blocks, in the model after width pruning
    """

    model: nn.Module
    reached_fraction: float
    steps: tuple[str, ...]
    reconstructions: tuple[Reconstruction, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    plan: Plan | ExpertPlan | None = None
    blocks: tuple[str, ...] = ()


def prune(model: nn.Module, batches: Any, *, method: str | Callable[..., Any] = "amp",
          removed_fraction: float | None = None, heads_removed: int | str | None = 0, experts_removed: int = 0,
          grouped_query: str = "whole_groups", criterion: str | Callable[..., Any] = "none", blocks_removed: int = 0,
          reconstruction: str = "auto", ridge: float | Sequence[float] = RIDGES,
          text: Iterable[Mapping[str, Tensor]] = (), calibration: Texts | None = None, prompts: int | None = None,
          reconstruction_text: Texts | None = None, reconstruction_samples: int | None = None,
          allow_test_text: bool = False, multiple_of: int | None = None, seed: int = 0) -> Pruned:
    """Remove ``removed_fraction`` of all parameters; ``model`` itself stays as it is.

    Defaults are those of the command ``pruning-lib prune``, and both give the same model.  They gave AMP the
    best results of the book: all heads stay, and the output projections are re-solved block after block.

    Parameters
    ----------
    batches : the tokenizer, which turns ``calibration`` into batches; or batches of calibration prompts, as
        ``data.batches`` makes them, a ``DataLoader`` or any other iterable of dicts of ``input_ids`` and
        ``attention_mask``, each (B, T)
    method : key of ``importance.METHODS``, or ``"none"`` for depth alone; or a function of your own or
        ``"module:function"``, as in ``importance.method_of``
    removed_fraction : of all parameters; may be left out with ``experts_removed``, and for depth alone with
        ``blocks_removed``
    heads_removed, grouped_query, multiple_of, seed : as in ``selection.choose``.  Where transformers has no field for
        the head width (GPT-NeoX, GPT-J, CodeGen, Falcon, Helium), a model that loses heads becomes an equal one of a
        type that has it, see ``equivalents``
    experts_removed : experts to remove in every block that has experts, those with the least router weight x norm of
        their output; neurons inside the others make up the rest of ``removed_fraction``, if it is given.  A model whose
        neurons are all inside experts loses those without it too
    criterion : key of ``block_ranking.CRITERIA``, or ``"none"`` for width alone; or a function of your own or
        ``"module:function"``, as in ``block_ranking.criterion_of``
    blocks_removed : with both a method and a criterion, number of blocks to remove after width pruning; for depth
        alone, 0 means the number of blocks nearest to ``removed_fraction``
    reconstruction : ``"none"``, or the mode in which ``reconstruction.reconstruct`` re-solves the output projections
        after width pruning: ``"one_pass"``, ``"sequential"``, ``"asymmetric"``; ``"auto"`` is ``"sequential"``, and
        ``"none"`` for depth alone
    ridge : ridge of the reconstruction; of several values, the best one on held-out batches is used
    text : batches for the reconstruction, and for methods that need long text; by default ``batches``
    calibration, prompts : with a tokenizer, the calibration prompts (a name, a file, see ``data.texts``, or a list),
        and the number of them, from the first on; None takes 50 from a name or file, or all if there are fewer.
        Without ``calibration``, ``"alpaca"``; where the extra ``eval`` is missing ``"mini_prompts"``, with a warning
    reconstruction_text, reconstruction_samples : with a tokenizer, the same for ``text``.  None takes ``"c4"`` beside
        ``"alpaca"``, ``"mini_calibration_text"`` beside ``"mini_prompts"``, and beside prompts of your own these
        prompts; and 100 texts
    allow_test_text : whether a test set may be used for calibration

    Raises
    ------
    ValueError
        for unknown names, fractions that cannot be reached or remove nothing, prompts longer than the trained positions
        of the model, too little text for a reconstruction, and test text.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> prompts = pl.batches(["The sea is", "Once upon a time"], tokenizer)
    >>> result = pl.prune(model, prompts, removed_fraction=0.2)
    >>> pl.sizes(result.model).neurons
    32
    """
    width, depth = validate(method, criterion, blocks_removed, reconstruction, removed_fraction, experts_removed)
    checkpoints.refuse_mixed(model)
    if calibration is None:
        calibration = default_calibration() if callable(batches) else ()
    if width and (heads_removed != 0 or not families.sizes(model).neurons):
        model = equivalents.with_head_width(model)
    if experts_removed or _inside_experts(model, width, depth, heads_removed):
        if callable(batches):
            batches = tokenized(model, batches, source_texts(calibration, prompts, PROMPTS, allow_test_text))
        return _prune_experts(model, _fitting(model, batches), {
            "experts_removed": experts_removed, "removed_fraction": removed_fraction, "multiple_of": multiple_of or 8},
            method, reconstruction, heads_removed)
    reconstruction = mode_of(reconstruction, method)
    width_fraction = 0.0
    if width:
        assert removed_fraction is not None  # ``validate`` refused that
        width_fraction = _left_for_width(model, removed_fraction, blocks_removed)

    def plan_of(scores: Importance) -> Plan:
        return choose(scores, model, removed_fraction=width_fraction, rule=width.rule if width else "lowest",
                      heads_removed=heads_removed, grouped_query=grouped_query, multiple_of=multiple_of, seed=seed)

    if width:
        refuse_nothing(plan_of(importance.uniform(model)), width_fraction)  # and a fraction out of reach
    elif depth:
        blocks_removed = _block_count(model, removed_fraction, blocks_removed)
    long = needs_long_text(method, reconstruction)
    if callable(batches):  # a tokenizer
        if long and not text and (source := long_text(reconstruction_text, calibration)) is not None:
            text = tokenized(model, batches, source_texts(source, reconstruction_samples, SAMPLES, allow_test_text))
        batches = tokenized(model, batches, source_texts(calibration, prompts, PROMPTS, allow_test_text))
    batches, text = _fitting(model, batches), _fitting(model, text)
    if reconstruction != "none":
        refuse_little_text(text or batches, ridge)
    if depth and depth.needs_samples:
        refuse_few_samples(model, batches, _named(criterion))
    network, plan, steps = model, None, []
    seconds: dict[str, float] = {}
    reconstructions: list[Reconstruction] = []
    if width:
        start = time.perf_counter()
        plan = plan_of(width.importance(model, text if text and width.needs_text else batches))
        seconds["scores_s"] = time.perf_counter() - start
        steps.append(f"{_named(method)}: {plan}")
        if reconstruction == "none":
            network = surgery.remove(model, plan)
        else:
            start = time.perf_counter()
            network, reconstructions = reconstruct(model, plan, text or batches, ridge=ridge, mode=reconstruction)
            seconds["reconstruction_s"] = time.perf_counter() - start
            steps.append(_solved(reconstruction, text or batches))
    blocks: tuple[str, ...] = ()
    if depth:
        network, blocks = _without_blocks(network, batches, depth, blocks_removed, seed)
        steps.append(_describe(_named(criterion), blocks))
    return Pruned(network, _reached(model, network), tuple(steps), tuple(reconstructions), seconds, plan, blocks)


def default_calibration() -> str:
    """Return the name of the default calibration prompts, with a warning where others stand in for them."""
    if (found := data.default_name(CALIBRATION)) != CALIBRATION:
        warnings.warn(f"calibrating on {found!r}, which is part of this package: {CALIBRATION!r} needs "
                      f'pip install "pruning-lib[eval]"; calibration= takes a file or a list of texts', stacklevel=3)
    return found


def mode_of(reconstruction: str, method: str | Callable[..., Any]) -> str:
    """Return the mode of reconstruction that ``"auto"`` stands for with this method; another one as it is."""
    return reconstruction if reconstruction != "auto" else "none" if method == "none" else BEST


def _inside_experts(model: nn.Module, width: Method | None, depth: Criterion | None, heads_removed: Any) -> bool:
    """Return whether the neurons of a model that is to lose nothing else are all inside experts."""
    if width is None or depth is not None or heads_removed != 0:
        return False
    return families.sizes(model).neurons == 0 and families.family_of(model).experts is not None


def _prune_experts(model: nn.Module, batches: list[dict[str, Tensor]], amount: Mapping[str, Any], method: Any,
                   reconstruction: str, heads_removed: Any) -> Pruned:
    """Remove experts, and neurons inside them, by AMP's manner of scoring."""
    if method != "amp" or reconstruction not in ("auto", "none") or heads_removed != 0:
        raise ValueError(f"experts are scored by method='amp', without heads and reconstruction; got "
                         f"method={_named(method)!r}, reconstruction={reconstruction!r}, heads_removed={heads_removed}."
                         f" Heads can be removed from the result by another call")
    choose_experts(uniform(model), model, **amount)  # refuses before any measurement, as the trial does
    expert_surgery.tried(model, experts_too=amount["experts_removed"] > 0)
    start = time.perf_counter()
    plan = choose_experts(expert_importance(model, batches), model, **amount)
    seconds = {"scores_s": time.perf_counter() - start}
    network = surgery.remove(model, plan)
    return Pruned(network, _reached(model, network), (f"amp: {plan}",), (), seconds, plan)


def needs_long_text(method: str | Callable[..., Any], reconstruction: str) -> bool:
    """Return whether a method or a reconstruction needs long text beside the calibration prompts."""
    return mode_of(reconstruction, method) != "none" or (method != "none" and importance.method_of(method).needs_text)


def long_text(source: Texts | None, calibration: Texts) -> Texts | None:
    """Return the source of the long text beside ``calibration``; None where the calibration prompts serve as it too."""
    return source if source is not None else LONG_TEXT.get(calibration) if isinstance(calibration, str) else None


def source_texts(source: Texts, n: int | None, most: int, allow_test_text: bool = False) -> list[str]:
    """Return the texts of a list, or the first ``n`` of a name or file; None takes ``most``, or all if there are fewer.

    Raises
    ------
    ValueError
        for test text, unless it is allowed, and for fewer than ``n`` texts.
    """
    if not isinstance(source, (str, Path)):
        return list(source)[:n]
    return data.calibration_texts(source, n, at_most=most, allow_test_text=allow_test_text)


def tokenized(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return batches of texts, cut at 512 tokens, or at the trained positions of the model where there are fewer."""
    return data.batches(texts, tokenizer, max_length=positions.longest(model, 512))


def _fitting(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return batches padded on the right; ValueError for a prompt that is too long for the model, or not of it."""
    found = right_padded(batches)
    for batch in found:
        positions.refuse_beyond(model, batch["input_ids"].shape[1], "a prompt")
        positions.refuse_unknown_tokens(model, batch["input_ids"])
    return found


def validate(method: Any, criterion: Any, blocks_removed: int, reconstruction: str, fraction: float | None,
             experts_removed: int = 0) -> tuple[Method | None, Criterion | None]:
    """Return method and criterion, None for ``"none"``; ValueError for unknown names and contradictions."""
    if reconstruction not in RECONSTRUCTIONS:
        raise ValueError(f"reconstruction={reconstruction!r}; allowed: {', '.join(RECONSTRUCTIONS)}")
    width = None if method == "none" else importance.method_of(method)
    depth = None if criterion == "none" else criterion_of(criterion)
    if not width and not depth:
        raise ValueError("method and criterion are both 'none', so nothing is removed; name at least one")
    if not width and mode_of(reconstruction, method) != "none":
        raise ValueError("reconstruction is for width pruning; with method='none' give reconstruction='none'")
    if width and (depth is None) != (blocks_removed == 0):
        raise ValueError(f"criterion={_named(criterion)!r} and blocks_removed={blocks_removed}: give both to remove "
                         f"blocks after width pruning, or neither for width alone")
    if fraction == 0:
        raise ValueError("removed_fraction=0 removes nothing; give more than 0")
    if experts_removed and (depth or not width):
        raise ValueError(f"experts_removed={experts_removed} with method={_named(method)!r} and "
                         f"criterion={_named(criterion)!r}: experts need method='amp' and no criterion; blocks can be "
                         f"removed from the result by another call")
    if fraction is None and (width or not blocks_removed) and not experts_removed:
        raise ValueError("removed_fraction is missing; give the fraction of all parameters to remove"
                         + ", or blocks_removed" * (not width))
    return width, depth


def refuse_nothing(plan: Plan, fraction: float) -> None:
    """Raise ValueError for a plan that removes nothing although at least one parameter was to be removed."""
    s = plan.sizes
    if plan.removed_parameters == 0 and fraction * s.parameters >= 1:
        raise ValueError(f"removed_fraction={fraction} is less than half a neuron of every block, so nothing would be "
                         f"removed; one neuron of every block is {s.blocks * s.neuron_parameters / s.parameters:.6f}")


def refuse_few_samples(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], criterion: str) -> None:
    """Raise ValueError unless there are more prompts than features, for a criterion that needs as many."""
    prompts, features = sum(len(batch["input_ids"]) for batch in batches), families.sizes(model).width
    if prompts <= features + 1:
        raise ValueError(f"criterion={criterion!r} needs more prompts than the model has features: {prompts} prompts, "
                         f"width {features}; give more, or another criterion")


def _named(method: Any) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def _block_count(model: nn.Module, fraction: float | None, blocks_removed: int) -> int:
    """Return the number of blocks for depth alone; ValueError where fraction and number contradict each other."""
    share = _block_parameters(model) / families.sizes(model).parameters
    if fraction is None:
        return blocks_removed
    nearest = round(fraction / share)
    if nearest < 1:
        raise ValueError(f"removed_fraction={fraction} is less than half a block, which has {share:.4f} of all "
                         f"parameters; give more, or remove heads and neurons by a method")
    if blocks_removed and blocks_removed != nearest:
        raise ValueError(f"blocks_removed={blocks_removed} removes {blocks_removed * share:.4f} of all parameters, "
                         f"removed_fraction={fraction} wants {nearest} blocks; give one of the two")
    return nearest


def _solved(mode: str, text: Sequence[Mapping[str, Tensor]]) -> str:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in text)
    return f"reconstruction: {mode}, output projections re-solved by least squares on {tokens:,} tokens"


def _describe(criterion: str, blocks: tuple[str, ...]) -> str:
    return f"{criterion}: removes {len(blocks)} blocks: {', '.join(blocks)}"


def _without_blocks(model: nn.Module, batches: list, criterion: Criterion, count: int, seed: int
                    ) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model without the first ``count`` blocks of one ranking, and the paths of these blocks."""
    consensus.validate(model, rounds=1, per_round=count, min_blocks=1)
    step = consensus.step(model, lambda network: criterion.order(network, batches, None, seed),
                          per_round=count, min_blocks=1)
    return step.model, tuple(step.removed)


def _left_for_width(model: nn.Module, fraction: float, blocks_removed: int) -> float:
    """Return the fraction to remove by width before ``blocks_removed`` narrower blocks are removed."""
    s, block = families.sizes(model), _block_parameters(model)
    if not 0 <= blocks_removed < s.blocks:
        raise ValueError(f"blocks_removed={blocks_removed}; allowed: 0 to {s.blocks - 1}")
    narrow = (s.blocks * block - fraction * s.parameters) / (s.blocks - blocks_removed)  # parameters of a kept block
    if narrow > block:
        most = int(fraction * s.parameters // block)
        raise ValueError(f"{blocks_removed} blocks are more than removed_fraction={fraction}; give at most {most}")
    return s.blocks * (block - narrow) / s.parameters if blocks_removed else fraction


def _block_parameters(model: nn.Module) -> int:
    return families.parameter_count(families.blocks(model)[0])


def _reached(model: Any, network: Any) -> float:
    return 1 - families.parameter_count(network) / families.parameter_count(model)
