"""LoRA fine-tuning of pruned language models: low-rank adapters on every projection, merged before saving.

LoRA [1]_ through peft, with the settings of AMP's published code: rank 8, alpha 16, dropout 0.05, learning rate 3e-4,
two epochs, the loss on answers only.  Our own choices are the batch size, and a warm-up in place of gradient clipping.
A checkpoint can be written every few steps; a resumed run gives bit for bit the same result as an uninterrupted one,
since dropout and order are derived from seed and step.
Order of this file: settings · tune · examples · one step · checkpoints.

References
----------
.. [1] Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib._extras import extra
from pruning_lib._files import bytes_of, digest, replacing
from pruning_lib.models import families, positions
from pruning_lib.models.hooks import evaluating
from pruning_lib.training.sgd import dropout_seeded

POOL = 128  # number of examples sorted by length together
AT_ONCE = 512  # padded tokens per backward pass; a step sums the gradients of several passes
Example = tuple[list[int], int]  # tokens of prompt and answer, and the number of prompt tokens


@dataclass(frozen=True)
class Settings:
    """Settings of fine-tuning; the defaults are those of AMP's published code, except batches and warm-up."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    lr: float = 3e-4
    epochs: int = 2
    tokens_per_batch: int = 2048  # padded tokens per step
    max_length: int = 512  # tokens after which an example is truncated
    warmup_fraction: float = 0.03  # of all steps; then the learning rate falls linearly to zero
    kd_weight: float = 0.0  # weight of knowledge distillation in the loss, 0 to 1
    seed: int = 0


def tune(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, settings: Settings = Settings(),
         teacher: nn.Module | None = None, folder: str | Path | None = None, every_steps: int = 50,
         progress: bool = True) -> list[float]:
    """Fine-tune ``model`` in place on answers to prompts, and merge the adapters into its weights.

    Parameters
    ----------
    pairs : prompts and answers; see ``data.pairs``
    teacher : the dense model, needed if ``settings.kd_weight`` is above 0: that share of the loss is the
        Kullback-Leibler divergence from its predictions, the rest is the usual cross-entropy
    folder : folder of a checkpoint, rewritten every ``every_steps`` steps and named after all inputs of the run, so
        that runs can share a folder; an existing checkpoint is resumed; None writes no checkpoint

    Returns
    -------
    loss of every step, in nats per answer token

    Raises
    ------
    ValueError
        for a model in float16, whose gradients overflow; no examples; a loss that is not finite.  The model is then
        unchanged.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> losses = pl.tune(model, tokenizer, [("The sea is", " blue"), ("Grass is", " green")], progress=False)
    >>> len(losses)  # two epochs of one step
    2
    """
    _check(model, settings, teacher)
    examples = _examples(tokenizer, pairs, positions.longest(model, settings.max_length))
    batches = [b for epoch in range(settings.epochs) for b in _shuffled(examples, settings, epoch)]
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    wrapped = _with_adapters(model, settings)
    try:
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.0)
        saved = _Checkpoint(folder, _key(model, settings, examples, teacher)) if folder else None
        losses = saved.restore(weights, optimizer) if saved else []
        model.train()
        steps = tqdm(range(len(losses), len(batches)), initial=len(losses), total=len(batches), desc="recovery",
                     disable=not progress, leave=False)
        for step in steps:
            losses.append(_step(model, teacher, batches[step], optimizer, settings, step, len(batches)))
            steps.set_postfix(loss=f"{losses[-1]:.3f}")
            if saved and ((step + 1) % every_steps == 0 or step + 1 == len(batches)):
                saved.keep(weights, optimizer, losses)
        wrapped.merge_and_unload()
    except BaseException:  # an interruption too: the model is restored
        wrapped.unload()
        raise
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(learns[name])
        for module, training in modes.items():
            module.training = training
    return losses


def _check(model: nn.Module, settings: Settings, teacher: nn.Module | None) -> None:
    if next(model.parameters()).dtype == torch.float16:
        raise ValueError("the model is in float16, whose gradients overflow; load it in bfloat16 or float32")
    if not 0 <= settings.kd_weight <= 1 or (settings.kd_weight > 0) != (teacher is not None):
        raise ValueError(f"kd_weight={settings.kd_weight} and {'a' if teacher else 'no'} teacher; give both, "
                         f"the weight above 0 and up to 1, or neither")


def _with_adapters(model: nn.Module, settings: Settings) -> Any:
    """Put adapters, drawn from the seed, on every projection of every block; freeze all other weights."""
    with extra("recovery"):
        from peft import LoraConfig, get_peft_model

    family = families.family_of(model)
    paths, known = set(families.named_paths(family)), dict(model.named_modules())
    names = [f"{info.name}.{path}" for info in families.residual_blocks(model) for path in sorted(paths)]
    names = [name for name in names if name in known]  # not every block has attention
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
                        target_modules=names, bias="none", task_type="CAUSAL_LM")
    with dropout_seeded(settings.seed, next(model.parameters()).device):
        return get_peft_model(model, config)  # type: ignore[arg-type]


def _examples(tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int) -> list[Example]:
    """Return the tokens of prompt, answer and the end; pairs whose answer lies beyond ``max_length`` are left out.

    Prompt and answer are tokenised as one text, as at inference: tokenizers of the SentencePiece kind would begin an
    answer of its own with a space.  A token that holds the end of the prompt and the start of the answer is predicted.
    """
    found = []
    for prompt, answer in pairs:
        question = _without_end(tokenizer, tokenizer(prompt)["input_ids"])
        tokens = _without_end(tokenizer, tokenizer(prompt + answer)["input_ids"])
        shared = next((i for i, (a, b) in enumerate(zip(question, tokens, strict=False)) if a != b),
                      min(len(question), len(tokens)))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = (tokens + end)[:max_length]
        if 0 < shared < len(tokens):
            found.append((tokens, shared))
    if not found:
        raise ValueError(f"none of {len(pairs)} pairs has a prompt and an answer within {max_length} tokens; "
                         f"give more pairs or a larger max_length")
    return found


def _without_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Return ``tokens`` without the end token that some tokenizers add."""
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _shuffled(examples: list[Example], settings: Settings, epoch: int) -> list[list[Example]]:
    """Return the batches of one epoch, in an order drawn from seed and epoch: every example once, within the budget.

    Random pools are sorted by length before they are split into batches; in random order almost half of a batch is
    padding.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
    order = [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
    pools = [sorted(order[start:start + POOL], key=lambda e: len(e[0])) for start in range(0, len(order), POOL)]
    batches = [batch for pool in pools for batch in _filled(pool, settings.tokens_per_batch)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _filled(examples: list[Example], tokens: int) -> Iterator[list[Example]]:
    """Yield batches of at most ``tokens`` padded tokens, shortest examples first; a single example may exceed them."""
    batch: list[Example] = []
    for example in examples:
        if batch and len(example[0]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _padded(batch: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and the mask of places that predict an answer token, each (B, T)."""
    T = max(len(tokens) for tokens, _ in batch)
    ids, mask, predicts = (torch.zeros(len(batch), T, dtype=torch.long) for _ in range(3))
    for row, (tokens, question) in enumerate(batch):
        ids[row, :len(tokens)] = torch.tensor(tokens)
        mask[row, :len(tokens)] = 1
        predicts[row, question - 1:len(tokens) - 1] = 1
    return ids, mask, predicts.bool()


def _step(model: Any, teacher: Any, batch: list[Example], optimizer: torch.optim.Optimizer, settings: Settings,
          step: int, steps: int) -> float:
    """Take one step of AdamW; return the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * _learning_rate_factor(step, steps, settings.warmup_fraction)
    optimizer.zero_grad()
    answers, loss = sum(len(tokens) - question for tokens, question in batch), 0.0
    with dropout_seeded(settings.seed * 1_000_003 + step + 1, model.device):
        for part in _filled(batch, AT_ONCE):
            added = _loss(model, teacher, part, settings.kd_weight) / answers
            added.backward()
            loss += added.item()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} in step {step + 1} of {steps}; try a learning rate below {settings.lr}")
    optimizer.step()
    return loss


def _loss(model: Any, teacher: Any, part: list[Example], kd_weight: float) -> Tensor:
    """Return the loss of a few examples, summed over the tokens of their answers."""
    ids, mask, predicts = (t.to(model.device) for t in _padded(part))
    logits = _answer_logits(model, ids, mask, predicts)
    loss = F.cross_entropy(logits, ids[:, 1:][predicts[:, :-1]], reduction="sum")
    if kd_weight:
        with torch.no_grad(), evaluating(teacher):
            wanted = _answer_logits(teacher, ids, mask, predicts).log_softmax(-1)
        follow = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        loss = (1 - kd_weight) * loss + kd_weight * follow
    return loss


def _answer_logits(model: Any, ids: Tensor, mask: Tensor, predicts: Tensor) -> Tensor:
    """Return the float32 logits (answer tokens, vocabulary) at the places that predict an answer token."""
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return families.logits(model, hidden[predicts]).float()


def _learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Return the factor of the learning rate: it rises linearly, then falls linearly to zero after the last step."""
    warmup = max(1, round(warmup_fraction * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def _key(model: nn.Module, settings: Settings, examples: list[Example], teacher: nn.Module | None) -> str:
    """Return a digest of all inputs of the result: settings, examples, and every weight, also of the teacher."""
    parts = [json.dumps([asdict(settings), examples]).encode()]
    frozen = [(name, p) for name, p in sorted(model.named_parameters()) if not p.requires_grad]
    for name, p in frozen + (sorted(teacher.named_parameters()) if teacher else []):
        parts += [f"{name} {tuple(p.shape)} {p.dtype}".encode(), bytes_of(p)]
    return digest(parts)


class _Checkpoint:
    """Checkpoint file with the adapters, the state of the optimiser and the losses so far."""

    def __init__(self, folder: str | Path, key: str) -> None:
        self.path = Path(folder) / f"recovery-{key}.safetensors"

    def keep(self, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Replace the file atomically."""
        tensors = {f"{i}.weight": p.detach().contiguous() for i, p in enumerate(weights)}
        for i, p in enumerate(weights):
            tensors |= {f"{i}.{name}": value.contiguous() for name, value in optimizer.state[p].items()}
        with replacing(self.path) as beside:
            save_file(tensors, beside, metadata={"losses": json.dumps(losses)})

    def restore(self, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
        """Restore weights and optimiser, and return the losses so far; [] without a file."""
        if not self.path.is_file():
            return []
        with safe_open(self.path, "pt") as file:
            facts: Mapping[str, str] = file.metadata() or {}
            for i, p in enumerate(weights):
                p.data.copy_(file.get_tensor(f"{i}.weight"))
                optimizer.state[p] = {name: file.get_tensor(f"{i}.{name}").to(p.device if name != "step" else "cpu")
                                      for name in ("step", "exp_avg", "exp_avg_sq")}
            return json.loads(facts["losses"])
