"""Measurement of importances for the interactive map of the AMP chapter, as in row amp-scores-smollm2.

The record of that row has sums only; this script writes single heads and the plans of AMP.
``made`` in its output repeats the record's values, and tests/report/test_drawings.py compares the two.
"""

import json
from pathlib import Path

from pruning_lib import data
from pruning_lib.models import loading
from pruning_lib.pruning import amp, selection

ROOT = Path(__file__).resolve().parents[2]
RUN = "amp-scores-smollm2"
BINS = 48  # bins of sorted neurons per row of the map; 1,536 squares would be too small
SPLITS = {"same": None, "neurons": 0}  # the same share of heads and neurons, or neurons only
STEPS = [step / 100 for step in range(51)]


def shares(scores):
    """Return importances relative to the mean of their block, as compared by AMP."""
    return scores / scores.mean(1, keepdim=True)


def lost(scores, gone):
    """Return the share of importance lost with the removed parts ``gone`` (L, k), averaged over blocks."""
    return (scores.gather(1, gone).sum(1) / scores.sum(1)).mean().item()


def step(importance, model, fraction, heads_removed, gone):
    """Return [heads and neurons removed in each block, fraction reached, importance lost of heads and of neurons]."""
    plan = selection.choose(importance, model, removed_fraction=fraction, heads_removed=heads_removed, multiple_of=1)
    gone[plan.removed_heads.shape[1]] = plan.removed_heads.tolist()
    return [plan.removed_heads.shape[1], plan.neurons.shape[1], round(plan.removed_fraction, 4),
            round(lost(importance.heads, plan.removed_heads), 4), round(lost(importance.neurons, plan.neurons), 4)]


def unevenness(scores):
    return (scores.max(1).values / scores.median(1).values).median().item()


def measure(record):
    row = record["parameters"]
    model, tokenizer = loading.load_model(row["model"], dtype=row["dtype"])
    scores = amp.importance(model, data.batches(data.texts(row["calibration"], row["prompts"]), tokenizer))
    scores = selection.Importance(scores.heads, scores.neurons, {})
    gone: dict[int, list] = {}
    steps = {name: [step(scores, model, fraction, heads, gone) for fraction in STEPS] for name, heads in SPLITS.items()}
    rows = shares(scores.neurons).sort(1).values.unflatten(1, (BINS, -1)).mean(2)
    return {"run": RUN, "made": {"head_max_over_median": unevenness(scores.heads),
                                 "neuron_max_over_median": unevenness(scores.neurons)},
            "neurons_of_a_block": scores.neurons.shape[1], "steps": steps, "gone": gone,
            "heads": [[round(x, 3) for x in block] for block in shares(scores.heads).tolist()],
            "neurons": [[round(x, 3) for x in block] for block in rows.tolist()]}


if __name__ == "__main__":
    found = measure(json.loads((ROOT / "data" / "results" / f"{RUN}.json").read_text()))
    print(found["made"])
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    (ROOT / "book" / "drawings" / "head_map.json").write_text(f"{{{lines}}}\n")
