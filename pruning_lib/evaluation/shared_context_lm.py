"""Faster language-model class for lm-eval: answers to the same question share one forward pass.

lm-eval requests the likelihood of each answer given the question, one sequence per answer.  Here a sequence holds the
question once, followed by its answers, and the attention mask limits an answer to the question and itself.
Scores equal those of the stock class up to rounding (a test compares them); tasks and harness are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from pruning_lib._extras import extra
from pruning_lib.models import families

with extra("eval"):
    from lm_eval.models.huggingface import HFLM

Request = tuple[tuple[str, str], list[int], list[int]]  # strings, tokens of the question, tokens of the answer


class SharedContextLM(HFLM):
    """``HFLM`` that computes the likelihoods of all answers to a question together.

    Parameters
    ----------
    tokens_per_batch : largest number of padded tokens per forward pass
    """

    def __init__(self, model: torch.nn.Module, tokenizer: object, *, tokens_per_batch: int = 2048) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32")
        self.tokens_per_batch = tokens_per_batch

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
                              ) -> list[tuple[float, bool]]:
        longest = max((len(question) + len(answer) for _, question, answer in requests), default=0)
        config = self.model.config  # the mask built here does not support a sliding window
        reach = min(self.max_length, getattr(config, "sliding_window", None) or self.max_length)
        if longest > reach or not families.logits_known(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        questions: dict[tuple[int, ...], list[int]] = {}
        for i, (_, question, _) in enumerate(requests):
            questions.setdefault(tuple(question), []).append(i)
        result: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="answers scored", disable=disable_tqdm) as bar:
            for batch in self._batches(questions, requests):
                for i, score in self._score(batch, requests):
                    result[i] = score
                    bar.update()
        return result

    def _batches(self, questions: dict[tuple[int, ...], list[int]], requests: list[Request]) -> Iterator[list]:
        """Yield lists of (question, indices of its requests), longest first, within the token budget."""
        def length(item: tuple) -> int:
            question, members = item
            return len(question) + sum(len(requests[i][2]) - 1 for i in members)

        waiting = sorted(questions.items(), key=length, reverse=True)
        while waiting:
            B = max(1, self.tokens_per_batch // length(waiting[0]))
            yield waiting[:B]
            waiting = waiting[B:]

    def _score(self, batch: list, requests: list[Request]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield (index of the request, (log likelihood, True if greedy decoding gives the answer))."""
        rows = [_pack(question, [requests[i][2] for i in members]) for question, members in batch]
        ids, positions, mask = _collate(rows, dtype=self.model.dtype)
        hidden = self.model.base_model(
            input_ids=ids.to(self.device), position_ids=positions.to(self.device),
            attention_mask=mask.to(self.device), use_cache=False,
        ).last_hidden_state  # (B, T, C)
        where = [(row, place) for row, packed in enumerate(rows) for places in packed[3] for place in places]
        at = torch.tensor(where, device=self.device)
        logits = families.logits(self.model, hidden[at[:, 0], at[:, 1]])  # only at positions that predict an answer
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        numbers = [i for _, members in batch for i in members]
        answers = [torch.tensor(requests[i][2], device=self.device) for i in numbers]
        for i, answer, lp in zip(numbers, answers, logprobs.split([len(a) for a in answers]), strict=True):
            yield i, (lp.gather(1, answer[:, None]).sum().item(), bool((lp.argmax(-1) == answer).all()))


def _pack(question: tuple[int, ...], answers: list[list[int]]
          ) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Return one row: tokens, positions, owner of each token (0 question, 1.. answers), indices that predict answers.

    The last token of an answer is predicted but never an input, so it is left out.
    """
    tokens, positions, owner = list(question), list(range(len(question))), [0] * len(question)
    places = []
    for number, answer in enumerate(answers, start=1):
        start = len(tokens)
        tokens += answer[:-1]
        positions += range(len(question), len(question) + len(answer) - 1)
        owner += [number] * (len(answer) - 1)
        places.append([len(question) - 1, *range(start, len(tokens))])
    return tokens, positions, owner, places


def _collate(rows: list, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows to (B, T) and build the additive mask (B, 1, T, T) that separates answers from each other."""
    T = max(len(tokens) for tokens, *_ in rows)
    ids, positions = torch.zeros(2, len(rows), T, dtype=torch.long)
    owner = torch.full((len(rows), T), -1)
    for i, (tokens, place, own, _) in enumerate(rows):
        n = len(tokens)
        ids[i, :n], positions[i, :n], owner[i, :n] = torch.tensor(tokens), torch.tensor(place), torch.tensor(own)
    sees = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)
    sees &= torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return ids, positions, mask[:, None]
