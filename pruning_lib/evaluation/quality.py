"""Quality of a model: perplexity, zero-shot tasks and accuracy on images, with confidence intervals.

Accuracies of language models come from lm-eval's own tasks, unmodified.  Every accuracy is reported with its kind, the
number of items and a 95 % interval.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from pruning_lib._extras import extra
from pruning_lib.data import labelled_images
from pruning_lib.data.batching import bos_token
from pruning_lib.evaluation import harness_tasks, window_losses
from pruning_lib.evaluation.correctness import correct_mask
from pruning_lib.evaluation.harness_tasks import OFFICIAL, TASKS
from pruning_lib.evaluation.window_losses import WindowLosses
from pruning_lib.models import families, loading, positions
from pruning_lib.models.hooks import evaluating

__all__ = ["OFFICIAL", "TASKS", "WINDOW", "accuracy", "check_window", "interval", "mean_interval", "pack",
           "paired", "perplexity", "questions", "unpack", "zero_shot"]

WINDOW = 2048  # tokens of a window of ``perplexity``, where the model takes as many


@torch.inference_mode()
def perplexity(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, window: int | None = None,
               stride: int | None = None, max_tokens: int | None = None, progress: bool = True
               ) -> dict[str, Any]:
    """Compute perplexity: the exponential of the mean negative log-likelihood of a token, given its window so far.

    The texts are joined by blank lines and cut into windows of ``window`` tokens whose starts are ``stride`` apart.
    Each token counts once, in the first window that contains it and a token before it.  Windows share no context.  If
    the tokenizer puts a BOS token in front of a text, as those of Gemma and LLaMA do, every window begins with one, as
    in training (Gemma 3 270M without it: perplexity 93 instead of 48).  It is one of the ``window`` tokens and is not
    predicted.

    Parameters
    ----------
    texts : test texts, in order
    window : by default 2,048, or the trained positions of the model where there are fewer
    stride : by default the window
    max_tokens : number of leading tokens to use; None for all

    Returns
    -------
    dict with ``perplexity``, its 95 % interval over windows (``perplexity_low``, ``perplexity_high``; None for a
    single window), ``tokens`` (predicted), ``window``, ``stride``, ``bos_token`` (whether windows begin with one),
    ``nats_per_character`` of the predicted text, which compares models of different tokenizers (None where the
    tokenizer does not tell which characters a token stands for),
    and ``windows``, the loss of every window as text for ``window_losses.paired``

    Raises
    ------
    ValueError
        for texts of fewer than two tokens, a window beyond the trained positions of the model.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> found = pl.perplexity(model, tokenizer, ["The sea is blue."], window=8, progress=False)
    >>> found["tokens"], found["window"], found["bos_token"]
    (14, 8, False)
    """
    window, stride = check_window(model, window, stride)
    if isinstance(texts, str):
        raise ValueError(f"texts is a single text, {texts[:40]!r}; give a list of texts: [text]")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}; give 2 or more, or None for all")
    fast = getattr(tokenizer, "is_fast", False)  # only those tell which characters a token stands for
    encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
    ids, spans = torch.tensor(encoded["input_ids"])[:max_tokens], encoded.get("offset_mapping")
    if len(ids) < 2:
        raise ValueError("the texts have fewer than two tokens; give more text")
    positions.refuse_unknown_tokens(model, ids)
    bos = bos_token(tokenizer)
    first = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    room = window - len(first)  # for tokens of the text
    if room < 2:
        raise ValueError(f"window={window} holds a BOS token and {room} token of the text; give 3 or more")
    losses, counts, characters, done = [], [], 0, 1
    with evaluating(model):
        known = families.logits_known(model)
        for start in tqdm(range(0, len(ids) - 1, min(stride, room)), desc="perplexity", disable=not progress,
                          leave=False):
            end = min(start + room, len(ids))
            predicted = end - max(done, start + 1)  # the first token of the text in a window is not predicted
            if predicted <= 0:
                break
            losses.append(_loss(model, torch.cat([first, ids[start:end]]), last=predicted, known=known))
            counts.append(predicted)
            characters += spans[end - 1][1] - spans[end - predicted][0] if spans else 0
            done = end
    mean, half = _mean_interval(np.array(losses), np.array(counts))
    low, high = (None, None) if half is None else (_exp(mean - half), _exp(mean + half))
    return {"perplexity": _exp(mean), "perplexity_low": low, "perplexity_high": high,
            "tokens": int(sum(counts)), "window": window, "stride": stride, "bos_token": bos is not None,
            "nats_per_character": sum(losses) / characters if characters else None,
            "windows": WindowLosses(np.array(losses), np.array(counts)).pack()}


def check_window(model: nn.Module, window: int | None, stride: int | None = None) -> tuple[int, int]:
    """Return window and stride of ``perplexity``, defaults filled in; ValueError for those the model cannot take."""
    window = positions.longest(model, WINDOW) if window is None else window
    stride = window if stride is None else stride
    if not 0 < stride <= window or window < 2:
        raise ValueError(f"window={window}, stride={stride}; wanted 0 < stride <= window, window >= 2")
    positions.refuse_beyond(model, window, "the window")
    return window, stride


def zero_shot(model: nn.Module, tokenizer: Any, tasks: str = "official", *, limits: dict[str, int] | None = None,
              stock: bool = False) -> tuple[dict[str, float], dict[str, str]]:
    """Measure zero-shot accuracy through lm-eval's Python API.

    Parameters
    ----------
    tasks : ``"official"`` (piqa, hellaswag, winogrande, arc_easy, arc_challenge; from the hub or its cache);
        ``"mini"``, 250 items of our own in the same five styles, not comparable with the official ones; or names of
        tasks and groups of lm-eval, and paths of their YAML files, joined by commas
    limits : task -> number of leading items to use
    stock : score with lm-eval's own model class instead of the faster ``SharedContextLM``

    Returns
    -------
    values : per task ``<task>_<kind>_fraction`` for every kind it offers, ``_low`` and ``_high`` (Wilson, 95 %) for the
        reported kind, ``<task>_items``; other numbers of a task as ``<task>_<metric>``; and ``<tasks>_mean_fraction``
        over the tasks that have an accuracy
    items : task -> correctness of every item, packed by ``pack``, for paired comparisons

    Raises
    ------
    ValueError
        for unknown names, with the nearest.
    ConnectionError
        when the data of a task is not available.
    """
    if tasks == "none":
        raise ValueError("tasks='none'; allowed: official, mini, or names of lm-eval joined by commas")
    harness_tasks.check_tasks(tasks)
    kinds = TASKS[tasks] if tasks in TASKS else dict.fromkeys(harness_tasks.names_of(tasks), "")
    for task, n in (limits or {}).items():
        if task not in kinds or n < 1:
            raise ValueError(f"limits={{{task!r}: {n}}}; give at least 1 item of one of {', '.join(kinds)}")
    lm = _harness_model(model, tokenizer, stock)
    values: dict[str, float] = {}
    items: dict[str, str] = {}
    means = []
    for task, kind in kinds.items():
        result = _evaluated(lm, task, (limits or {}).get(task))
        for name, samples in result["samples"].items():  # one, or the tasks of a group
            right = harness_tasks.correctness(samples)
            reported = kind or next(iter(right), "")
            others = harness_tasks.other_metrics(result["results"][name])
            values |= {f"{name}_{metric}": value for metric, value in others.items()}
            if reported:
                values |= _accuracies(name, right, reported)
                means.append(values[f"{name}_{reported}_fraction"])
                items[name] = pack(right[reported])
    if means:
        values[f"{tasks}_mean_fraction"] = float(np.mean(means))
    return values, items


def _harness_model(model: nn.Module, tokenizer: Any, stock: bool) -> Any:
    with extra("eval"):
        from lm_eval.models.huggingface import HFLM

    from pruning_lib.evaluation.shared_context_lm import SharedContextLM

    return (HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32") if stock
            else SharedContextLM(model, tokenizer))


def _evaluated(lm: Any, task: str, limit: int | None) -> dict[str, Any]:
    """Return lm-eval's results and samples of one task or group."""
    with extra("eval"):
        import lm_eval

    ours = task.startswith("mini_")
    try:
        return lm_eval.simple_evaluate(
            lm, tasks=[harness_tasks.task(task)], num_fewshot=0, bootstrap_iters=0, log_samples=True,
            task_manager=harness_tasks.manager(everything=not ours and not task.endswith(".yaml")),
            samples=None if limit is None else {task: list(range(limit))})
    except Exception as error:
        if ours:
            raise
        raise ConnectionError(f"task {task!r} could not be evaluated: {error}\nWithout a network, set "
                              f"HF_DATASETS_CACHE to a folder that holds it, or use tasks='mini'") from error


def _accuracies(task: str, right: dict[str, np.ndarray], reported: str) -> dict[str, float]:
    low, high = interval(right[reported])
    return {**{f"{task}_{kind}_fraction": float(hits.mean()) for kind, hits in right.items()},
            f"{task}_{reported}_low": low, f"{task}_{reported}_high": high, f"{task}_items": len(right[reported])}


def interval(right: np.ndarray) -> tuple[float, float]:
    """Return the 95 % Wilson interval of an accuracy; ``right`` is (N,) booleans."""
    found = stats.binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Any, labels: Any = None, *, dtype: str = "float32", images_per_batch: int = 256
             ) -> tuple[dict[str, float], str]:
    """Measure the share of images whose class gets the highest score (top-1).

    Parameters
    ----------
    images : (N, channels, height, width) uint8 pixels, or floats as the network takes them; or a data set, a DataLoader
        or batches of them with their labels
    labels : (N,) class of each image
    dtype : format of the multiplications, ``"float32"`` or ``"bfloat16"``

    Returns
    -------
    ``accuracy_fraction``, its 95 % interval (Wilson) ``accuracy_low`` and ``accuracy_high``, ``images``; and the
    correctness of every image, packed, for paired comparisons

    Examples
    --------
    >>> import torch
    >>> import pruning_lib as pl
    >>> network, _ = pl.load_model("./toy-resnet")
    >>> images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 2
    >>> values, answers = pl.accuracy(network, (255 * images).byte(), labels)
    >>> 0 <= values["accuracy_fraction"] <= 1
    True
    """
    if dtype not in loading.FORMATS:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(loading.FORMATS)}")
    images, labels = labelled_images.whole(images, labels)
    device = next(model.parameters()).device
    with torch.autocast(device.type, loading.FORMATS[dtype], enabled=dtype != "float32"):
        hits = correct_mask(model, images, labels, images_per_batch=images_per_batch).numpy()
    low, high = interval(hits)
    return {"accuracy_fraction": float(hits.mean()), "accuracy_low": low, "accuracy_high": high,
            "images": len(hits)}, pack(hits)


def mean_interval(items: dict[str, str]) -> tuple[float, float, float]:
    """Return the mean accuracy over equally weighted tasks and its 95 % interval (normal) from the item counts."""
    right = [unpack(packed) for packed in items.values()]
    mean = float(np.mean([r.mean() for r in right]))
    half = 1.96 * math.sqrt(sum(r.var() / len(r) for r in right)) / len(right)
    return mean, mean - half, mean + half


def questions(items: dict[str, str]) -> dict[str, int]:
    """Return the number of items per task in packed ``items``; models for ``paired`` must agree in it."""
    return {task: int(packed.partition(":")[0]) for task, packed in items.items()}


def paired(first: dict[str, str] | str, second: dict[str, str] | str) -> dict[str, float]:
    """Compare two models on the same items (mean over tasks of accuracy, first - second) or on the same windows.

    Parameters
    ----------
    first, second : task -> packed items, as ``zero_shot`` returns them; or ``windows``, as ``perplexity`` returns them,
        which ``window_losses.paired`` compares

    Returns
    -------
    For items a dict with ``difference_fraction``, its 95 % interval ``_low`` and ``_high`` (normal, items paired within
    each task), ``items``, and ``p_value`` of the exact McNemar test over the pooled items

    Examples
    --------
    >>> import numpy as np
    >>> import pruning_lib as pl
    >>> from pruning_lib.evaluation.quality import pack
    >>> small, dense = pack(np.array([True, False] * 50)), pack(np.array([True] * 100))
    >>> round(pl.compare({"task": small}, {"task": dense})["difference_fraction"], 2)
    -0.5
    """
    if isinstance(first, str) and isinstance(second, str):
        return window_losses.paired(first, second)
    if isinstance(first, str) or isinstance(second, str):
        raise ValueError("items of tasks cannot be compared with windows of a text; give two of the same kind")
    if set(first) != set(second) or not first:
        raise ValueError(f"the two models were measured on different tasks: {sorted(first)} and {sorted(second)}; "
                         f"measure both on the same tasks")
    means, variances, wins, losses, total = [], [], 0, 0, 0
    for task in first:
        a, b = unpack(first[task]), unpack(second[task])
        if len(a) != len(b) or len(a) < 2:
            raise ValueError(f"{task}: {len(a)} items against {len(b)}; measure both on the same items")
        d = a.astype(float) - b
        means.append(d.mean())
        variances.append(d.var(ddof=1) / len(d))
        wins, losses, total = wins + int((d > 0).sum()), losses + int((d < 0).sum()), total + len(d)
    mean, half = float(np.mean(means)), 1.96 * math.sqrt(sum(variances)) / len(means)
    p = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return {"difference_fraction": mean, "difference_low": mean - half, "difference_high": mean + half,
            "items": total, "p_value": float(p)}


def pack(right: np.ndarray) -> str:
    """Pack (N,) booleans into a short text: the count, then the bits."""
    return f"{len(right)}:{base64.b64encode(np.packbits(right).tobytes()).decode()}"


def unpack(text: str) -> np.ndarray:
    """Return the (N,) booleans in a text of ``pack``."""
    count, _, bits = text.partition(":")
    return np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8))[: int(count)].astype(bool)


def _loss(model: Any, ids: Tensor, *, last: int, known: bool) -> float:
    """Return the summed negative log-likelihood of the ``last`` tokens of ``ids`` (T,).

    ``known`` is the result of ``families.logits_known``.
    """
    given, places = {"input_ids": ids[None].to(model.device), "use_cache": False}, slice(-last - 1, -1)
    if known:  # in pieces, because logits over the vocabulary are large
        hidden = model.base_model(**given).last_hidden_state[0, places]
        pieces = (families.logits(model, h) for h in hidden.split(256))
    else:
        pieces = iter(model(**given).logits[0, places].split(256))
    return sum(nn.functional.cross_entropy(logits.float(), target.to(logits.device), reduction="sum").item()
               for logits, target in zip(pieces, ids[-last:].split(256), strict=True))


def _mean_interval(losses: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Return the mean loss per token and half the width of its 95 % interval over windows; None for one window."""
    mean = losses.sum() / counts.sum()
    if len(losses) < 2:
        return float(mean), None
    spread = np.sum((losses - mean * counts) ** 2) / (len(losses) - 1) * len(losses)
    return float(mean), float(stats.t.ppf(0.975, len(losses) - 1) * math.sqrt(spread) / counts.sum())


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
