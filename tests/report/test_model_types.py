"""The page of model types is made from its table, and the table says what the code does."""

import importlib.util
import json
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BOOK = Path(__file__).resolve().parents[2] / "book"
SPEC = importlib.util.spec_from_file_location("model_types", BOOK / "drawings" / "model_types.py")
model_types = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(model_types)
TABLE = json.loads((BOOK / "drawings" / "model_types.json").read_text())
ROWS = {row["type"]: row for row in TABLE["rows"]}
SAMPLE = ("gemma2", "olmo2", "gpt2", "bloom", "mixtral", "bart", "llama", "falcon")


def test_the_page_is_made_from_the_table():
    assert (BOOK / "chapters" / "model_types.md").read_text() == model_types.page(TABLE["rows"], TABLE["transformers"])


@pytest.mark.skipif(transformers.__version__ != TABLE["transformers"], reason="the table is of another transformers")
def test_the_table_has_every_causal_type_of_transformers_once():
    assert [row["type"] for row in TABLE["rows"]] == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.skipif(transformers.__version__ != TABLE["transformers"], reason="the table is of another transformers")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_says_what_the_code_does(name):
    found = model_types.examine(name)
    assert {unit: found[unit] for unit in model_types.UNITS} == {unit: ROWS[name][unit] for unit in model_types.UNITS}
    assert found["cut"].keys() == ROWS[name]["cut"].keys()


def test_what_can_be_removed_was_exact():
    for row in ROWS.values():
        for unit in model_types.UNITS:
            if not row[unit]:
                assert row["cut"][unit] < 1e-5 and row["reload"][unit] < model_types.ROUNDING, (row["type"], unit)


def test_most_types_lose_neurons_and_heads():
    assert sum(not row["neurons"] or not row["experts"] for row in ROWS.values()) >= 0.8 * len(ROWS)
    assert sum(not row["heads"] for row in ROWS.values()) >= 0.6 * len(ROWS)
