"""Importance of experts and of the neurons inside them, and the choice of the ones to remove.

Ours, in the manner of AMP.  The importance of an expert is its router weight times the L1 norm of its
output, summed over the tokens it is given and averaged over all tokens, every prompt weighing the same (REAP [1]_ takes
the L2 norm and averages over the tokens an expert is given only).  The importance of a neuron is its mean absolute
activation on the tokens that its expert is given.

References
----------
.. [1] Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", 2025, arXiv 2510.13999.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib.models import expert_surgery, families, offload
from pruning_lib.models.expert_plan import ExpertPlan
from pruning_lib.models.families import Experts
from pruning_lib.models.hooks import evaluating, inputs_to
from pruning_lib.pruning.amp import _right_padded, neuron_scores


@dataclass(frozen=True)
class ExpertImportance:
    """Importance of experts and their neurons; larger means keep.

    Attributes
    ----------
    experts : (Lx, E) float32, in units of the residual stream
    neurons : (Lx, E, M) float32
    plain : for every block of the model, (neurons,) of the ordinary MLP whose size goes with that of the experts
    """

    experts: Tensor
    neurons: Tensor
    plain: tuple[Tensor, ...]


def uniform(model: nn.Module) -> ExpertImportance:
    """Return equal importances, with which a choice can be tried before anything is measured."""
    s = expert_surgery.sizes(model)
    return ExpertImportance(torch.zeros(len(s.blocks), s.experts), torch.zeros(len(s.blocks), s.experts, s.neurons),
                            tuple(torch.zeros(n) for n in s.plain))


def expert_importance(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True
                      ) -> ExpertImportance:
    """Score every expert and every neuron of every expert in one pass over the prompts.

    Parameters
    ----------
    batches : dicts with ``input_ids`` and ``attention_mask``, each (B, T), padded on the right

    Raises
    ------
    ValueError
        for a model without experts, or whose experts do not take tokens, numbers and router weights; without prompts.
    """
    s, placed = expert_surgery.sizes(model), expert_surgery.placed(model)
    blocks = families.blocks(model)
    paths = [placed.down.rpartition(".")[0], *_beside(placed)]
    modules = [blocks[i].get_submodule(path) for path in paths for i in s.blocks]
    experts = torch.zeros(len(s.blocks), s.experts, dtype=torch.float64)
    neurons = torch.zeros(len(s.blocks), s.experts, s.neurons, dtype=torch.float64)
    plain = [torch.zeros(n, dtype=torch.float64) for n in s.plain]
    outputs = {i: blocks[i].get_submodule(expert_surgery.plain_output(blocks[i], parts))
               for i, parts in enumerate(placed.plain) if parts}
    [down] = [part for part in placed.neurons if part.parameter == placed.down]
    gating: dict[int, tuple[Tensor, Tensor]] = {}  # block with experts -> token and router weight of every pair
    weights: Tensor  # (B, T): 1 / length of the prompt, 0 where padded

    def see_experts(i: int, x: Tensor, index: Tensor, router: Tensor) -> None:
        kept = weights.flatten().to(x.device) > 0
        each = weights.flatten().to(x.device)[kept].repeat_interleave(index.shape[-1])  # (pairs,)
        tokens, number = x[kept].repeat_interleave(index.shape[-1], 0), index[kept].reshape(-1, 1)
        norms = modules[i](tokens, *_alone(modules[i], tokens, number, router[kept].reshape(-1, 1)))
        norms = norms.abs().sum(-1, dtype=torch.float32)
        experts[i].index_add_(0, number.flatten().cpu(), (each * norms).double().cpu())
        once = tokens, *_alone(modules[i], tokens, number, torch.ones_like(number, dtype=x.dtype))
        for start, fired in _activations(modules[i], placed.down, down.axis, once, number.flatten()):
            found = (each[:, None] * fired.abs()).double().cpu()
            neurons[i, :, start:start + found.shape[1]].index_add_(0, number.flatten().cpu(), found)

    def see_sorted(n: int, fired: Tensor, counts: list[int]) -> None:  # tokens in the order of their experts
        i = n % len(s.blocks)
        token, router = gating[n]
        number = torch.arange(s.experts).repeat_interleave(torch.tensor(counts))
        each = weights.flatten().to(fired.device)[token]
        norms = modules[n](fired, counts).abs().sum(-1, dtype=torch.float32)
        experts[i].index_add_(0, number, (each * router * norms).double().cpu())
        if n == i:  # not of the experts of an attention, which go with those of the MLP
            neurons[i].index_add_(0, number, (each[:, None] * fired.abs()).double().cpu())

    def see_all(i: int, x: Tensor) -> None:  # every expert has a copy of every token, times its router weight or 0
        each = weights.flatten().to(x.device)
        norms = modules[i](x).view(s.experts, len(each), -1).abs().sum(-1, dtype=torch.float32)
        experts[i] += (norms @ each).double().cpu()
        for start, fired in _activations(modules[i], placed.down, down.axis, (x,)):
            found = torch.einsum("ent,n->et", fired.view(s.experts, len(each), -1).abs().float(), each)
            neurons[i, :, start:start + found.shape[1]] += found.double().cpu()

    def see_plain(n: int, x: Tensor) -> None:
        tokens = x.view(*weights.shape, -1)  # some flatten prompts and tokens before the MLP
        plain[list(outputs)[n]].add_(neuron_scores(tokens, weights.to(x.device)).double().cpu())

    prompts = 0
    with torch.inference_mode(), evaluating(model), _calls_of(modules, see_experts, see_all, see_sorted), _gatings_of(
            modules, model, gating), inputs_to(outputs.values(), see_plain):
        for batch in tqdm(batches, desc="importance of experts", disable=not progress, leave=False):
            mask = _right_padded(batch["attention_mask"]).to(offload.input_device(model))
            weights = mask / mask.sum(1, keepdim=True)
            cast(Any, model).base_model(input_ids=batch["input_ids"].to(mask.device), attention_mask=mask,
                                        use_cache=False)
            prompts += len(mask)
    if not prompts:
        raise ValueError("no batches: give at least one prompt to calibrate on")
    return ExpertImportance((experts / prompts).float(), (neurons / prompts).float(),
                            tuple((scores / prompts).float() for scores in plain))


@contextmanager
def _calls_of(modules: list[nn.Module], see: Any, see_all: Any, see_sorted: Any) -> Iterator[None]:
    """Call ``see(i, tokens, numbers, router weights)`` when experts run; not when ``see`` itself runs them.

    Call ``see_all(i, tokens)`` for experts that each take a copy of all tokens, as those of Llama 4 do, and
    ``see_sorted(i, neurons, counts)`` for output projections that take so many tokens per expert, as JetMoE's do.
    """
    busy = False

    def hook(i: int, args: tuple, kwargs: dict) -> None:
        nonlocal busy
        given = [*args, *kwargs.values()]
        if busy:
            return
        in_order = len(given) == 2 and isinstance(given[1], list)
        everything = len(given) == 1 and isinstance(given[0], Tensor) and given[0].ndim == 2
        if not everything and not in_order and (len(given) != 3 or given[1].dtype not in (torch.int32, torch.int64)):
            raise ValueError("the experts of this type take other arguments than tokens, numbers of experts and router "
                             "weights, so their importance cannot be measured; a plan of your own can still cut them")
        busy = True
        (see_all if everything else see_sorted if in_order else see)(i, *given)
        busy = False

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            handle = module.register_forward_pre_hook(lambda _, args, kwargs, i=i: hook(i, args, kwargs),
                                                      with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _beside(placed: Experts) -> list[str]:
    """Return the paths of further output projections with one slice per expert: JetMoE has such an attention."""
    own = placed.down.rpartition(".")[0]
    paths = dict.fromkeys(part.parameter.rpartition(".")[0] for part in placed.experts)
    return [path for path in paths if path != own and path.endswith(f".{own.rpartition('.')[2]}")]


@contextmanager
def _gatings_of(modules: list[nn.Module], model: nn.Module, found: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Write token and router weight of every pair to ``found``, where a router beside a module sorts them by expert."""
    every = dict(model.named_modules())
    names = {id(module): name for name, module in every.items()}

    def see(n: int, output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 5:  # order, tokens, weights, counts, logits
            found[n] = output[1], output[2]

    with ExitStack() as stack:
        for n, module in enumerate(modules):
            router = every.get(f"{names[id(module)].rpartition('.')[0]}.router")
            if router is not None:
                handle = router.register_forward_hook(lambda _, args, y, n=n: see(n, y))
                stack.callback(handle.remove)
        yield


def _alone(module: nn.Module, x: Tensor, number: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers of experts and router weights for one expert per token, in a form that the module takes.

    LongCat's experts want two per token; the second gets no weight.
    """
    try:
        module(x[:1], number[:1], router[:1])
    except ValueError:
        return number.repeat(1, 2), torch.cat([router, torch.zeros_like(router)], 1)
    return number, router


def _activations(module: nn.Module, down: str, axis: int, given: tuple[Tensor, ...], index: Tensor | None = None
                 ) -> Iterator[tuple[int, Tensor]]:
    """Yield the inputs of the output projection of each token's expert, as many neurons at once as the model is wide.

    Experts are computed inside one module, where no hook sees their neurons.  With rows of the identity in the place of
    the output projection, the module itself gives them.

    Parameters
    ----------
    given : arguments of the module, with router weights of 1
    index : (pairs,) the expert of each token, if the module has biases
    """
    name = down.rpartition(".")[2]
    own = cast(nn.Parameter, getattr(module, name))
    bias = getattr(module, f"{name}_bias", None)
    M, C = own.shape[axis], own.shape[3 - axis]
    try:
        for start in range(0, M, C):
            chosen = torch.zeros(own.shape, dtype=own.dtype, device=own.device)
            along = torch.arange(min(C, M - start), device=own.device)
            chosen.movedim(axis, 1)[:, start + along, along] = 1  # (E, M, C)
            setattr(module, name, nn.Parameter(chosen, requires_grad=False))
            fired = module(*given)[:, :len(along)]
            yield start, fired if bias is None or index is None else fired - bias[index][:, :len(along)]
    finally:
        setattr(module, name, own)


def choose_experts(importance: ExpertImportance, model: nn.Module, *, experts_removed: int = 0,
                   removed_fraction: float | None = None, multiple_of: int = 8) -> ExpertPlan:
    """Decide which experts to remove, and which neurons of the others, the least important first.

    Parameters
    ----------
    experts_removed : per block
    removed_fraction : of all parameters; neurons of the other experts make up the rest of it,
        the same number in each. None takes whole experts only
    multiple_of : the number of neurons an expert keeps becomes the nearest multiple of this: torch multiplies all
        experts at once in rows of 16 bytes, which are 8 numbers in 16 bits and 4 in 32

    Raises
    ------
    ValueError
        for a fraction that cannot be reached, and for counts that transformers could not run.
    """
    s = expert_surgery.sizes(model)
    if not 0 <= experts_removed < s.experts:
        raise ValueError(f"experts_removed={experts_removed}; a block of this model has {s.experts} experts, one stays")
    whole = s.removed_parameters(experts_removed, 0)
    per_neuron = s.removed_parameters(experts_removed, 1) - whole
    rest = 0.0 if removed_fraction is None else (removed_fraction * s.parameters - whole) / per_neuron
    if not -0.5 <= rest < s.neurons:
        raise ValueError(f"removed_fraction={removed_fraction} cannot be reached without {experts_removed} of "
                         f"{s.experts} experts; reachable: {whole / s.parameters:.4f} to "
                         f"{(whole + (s.neurons - 1) * per_neuron) / s.parameters:.4f}")
    m = s.neurons - multiple_of * max(1, round((s.neurons - rest) / multiple_of)) if round(rest) else 0
    m = max(0, m)
    expert_surgery.refuse_counts(model, s.experts - experts_removed, s.neurons - m)
    plain = tuple(_lowest(scores, s.plain_removed(i, m)) for i, scores in enumerate(importance.plain))
    return ExpertPlan(_lowest(importance.experts, experts_removed), _lowest(importance.neurons, m), plain, s)


def _lowest(scores: Tensor, n: int) -> Tensor:
    """Return the ``n`` places with the lowest scores along the last axis, ascending; ties go by place."""
    return scores.sort(dim=-1, stable=True).indices[..., :n].sort(dim=-1).values
