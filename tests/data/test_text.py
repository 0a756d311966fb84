"""Samples come in a fixed order from the expected source; our own small sets have their stated properties."""

import collections
import json
import re

import pandas as pd
import pytest

from pruning_lib import data

STYLES = {"piqa": 2, "hellaswag": 4, "winogrande": 2, "arc_easy": 4, "arc_challenge": 4}  # choices per item


def write(folder, name, rows, *, split="train", part=0, parts=1):
    path = folder / name / "data" / f"{split}-{part:05d}-of-{parts:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def hundred(local):
    """Write c4 with a hundred texts in two files."""
    for part in (1, 0):
        write(local, "c4-300", {"text": [f"text {50 * part + i}" for i in range(50)]}, part=part, parts=2)
    return [f"text {i}" for i in range(100)]


def test_prompts_have_alpacas_layout_and_hold_no_answer(local):
    write(local, "alpaca-en-999", [{"instruction": "Add.", "input": "1, 2", "output": "3"},
                                   {"instruction": "Rhyme.", "input": "", "output": "time"}])
    assert data.texts("alpaca") == [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nRhyme.\n\n### Response:\n"]


def test_texts_come_in_the_order_of_the_files_and_n_takes_the_first(hundred):
    assert data.texts("c4") == hundred
    assert data.texts("c4", 60) == hundred[:60]


def test_a_seed_draws_the_same_texts_every_time_without_repeats(hundred):
    drawn = data.texts("c4", 30, seed=5)
    assert drawn == data.texts("c4", 30, seed=5) != data.texts("c4", 30, seed=6)
    assert len(set(drawn)) == 30 and set(drawn) <= set(hundred) and drawn != hundred[:30]
    assert data.texts("c4", 60, seed=5)[:30] == drawn
    assert any(int(text.split()[1]) > 40 for text in drawn)  # from all of them, not from the first thirty


def test_texts_from_the_hub_are_the_same_as_from_the_folder(hundred, local, monkeypatch):
    """Replace the hub by a folder; ``load_dataset`` accepts both."""
    monkeypatch.setitem(data.DATASETS, "from_hub", data.Dataset(lambda row: row["text"], "not-here",
                                                                (str(local / "c4-300"),)))
    assert data.texts("from_hub", 3) == hundred[:3]
    assert data.texts("from_hub") == hundred
    assert data.texts("from_hub", 30, seed=5) == data.texts("c4", 30, seed=5)


def test_splits_are_kept_apart(local):
    for split in ("validation", "test"):
        write(local, "wikitext-2-v1-pages", {"page": [f" = {split} = \n"]}, split=split)
    assert data.texts("wikitext2") == [" = validation = \n"]
    assert data.texts("wikitext2", split="test") == [" = test = \n"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("c5",), "unknown data set 'c5'; known: alpaca, c4, .*wikitext2"),
    (("mini_text", 1000), "n=1000 texts of 'mini_text'; give 1 to 24"),
    (("mini_text", 0), "n=0 texts"), (("mini_text", -1), "n=-1 texts")])
def test_what_is_not_there_is_refused_with_what_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.texts(*arguments)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no split 'train'; splits: validation, test"):
        data.texts("wikitext2", split="train")


def test_without_data_and_network_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNING_DATA", str(tmp_path))  # an empty folder
    with pytest.raises(ConnectionError, match="(?s)'c4' is not available.*PRUNING_DATA.*'c4-300'.*mini_text"):
        data.texts("c4", 3)


def test_a_fingerprint_tells_order_and_borders_apart():
    assert data.fingerprint(["a", "b"]) == "8fb20ef63ced4145"  # part of the records, so it must never change
    same = data.fingerprint(iter(["ab", "c"]))
    assert same == data.fingerprint(["ab", "c"])
    others = [["c", "ab"], ["a", "bc"], ["abc"], ["ab", "c", ""], ["ab", "C"], ["ab"]]
    assert len({same, *map(data.fingerprint, others)}) == 7


def test_the_lines_of_wikitext_are_joined_into_articles():
    lines = ["", " = River Tyne = \n", "", " The Tyne is a river . \n", " = = Course = = \n", " It flows . \n",
             " = = = Bridges = = = \n", " Seven . \n", " = 1 = 1 = \n", " x = 2 \n"]
    assert data.articles(lines) == ["".join(lines[1:8]), "".join(lines[8:])]


def test_the_hubs_form_of_wikitext_gives_articles_and_our_folder_gives_pages(local):
    lines = [line for i in range(400) for line in (f" = Article {i} = \n", " Text . \n", "")]
    write(local, "wikitext-2-v1-pages", {"text": lines}, split="test")
    assert data.texts("wikitext2", 2, split="test") == [" = Article 0 = \n Text . \n", " = Article 1 = \n Text . \n"]
    assert len(data.texts("wikitext2", split="test")) == 400


# --- our own sets -----------------------------------------------------------------------------------------------------


def items(style):
    return [json.loads(line) for line in (data.INPUTS / "mini" / f"{style}.jsonl").read_text().splitlines()]


def question_choices_answer(style, item):
    """Return the three parts of an item in any layout; positions start at 0."""
    if style == "piqa":
        return item["goal"], [item["sol1"], item["sol2"]], item["label"]
    if style == "hellaswag":
        return item["query"], item["choices"], item["gold"]
    if style == "winogrande":
        return item["sentence"], [item["option1"], item["option2"]], int(item["answer"]) - 1
    return item["question"], item["choices"]["text"], item["choices"]["label"].index(item["answerKey"])


@pytest.mark.parametrize(("style", "choices"), STYLES.items())
def test_right_answers_stand_equally_often_in_every_place(style, choices):
    parts = [question_choices_answer(style, item) for item in items(style)]
    assert {len(c) for _, c, _ in parts} == {choices}
    counts = collections.Counter(answer for *_, answer in parts)
    assert len(counts) == choices and max(counts.values()) - min(counts.values()) <= 1


def test_there_are_two_hundred_items_or_more_and_none_twice():
    found = [(style, *question_choices_answer(style, item)[:2]) for style in STYLES for item in items(style)]
    plain = collections.Counter((question.lower(), *sorted(map(str.lower, choices))) for _, question, choices in found)
    assert len(found) >= 200 and max(plain.values()) == 1
    assert all(len(set(choices)) == len(choices) for *_, choices in found)
    questions = collections.Counter((style, question) for style, question, _ in found)
    assert max(questions.values()) == 1
    ids = [item["id"] for style in STYLES for item in items(style)]
    assert len(set(ids)) == len(ids)


def test_always_taking_the_longest_or_the_shortest_answer_does_not_pay():
    for style, choices in STYLES.items():
        parts = [question_choices_answer(style, item) for item in items(style)]
        for pick in (max, min):
            hits = sum(c.index(pick(c, key=len)) == answer for _, c, answer in parts)
            assert hits <= len(parts) / choices + 6, (style, pick)  # 6: about 1.7 standard deviations


def test_no_eight_words_in_a_row_stand_in_two_of_calibration_prompts_test_text_and_items():
    def eights(texts):
        words = [re.findall(r"[a-z0-9']+", text.lower()) for text in texts]
        return {tuple(w[i:i + 8]) for w in words for i in range(len(w) - 7)}

    rows = [json.loads(line) for line in (data.INPUTS / "mini_prompts.jsonl").read_text().splitlines()]
    kinds = {
        "calibration": eights(data.texts("mini_calibration_text")),
        "prompts": eights(row[key] for row in rows for key in ("instruction", "input", "output")),
        "test": eights(data.texts("mini_text")),
        "items": eights(" ".join([question, *choices]) for style in STYLES
                        for question, choices, _ in (question_choices_answer(style, i) for i in items(style))),
    }
    assert all(len(found) > 500 for found in kinds.values())
    names = list(kinds)
    assert not [(a, b, shared) for i, a in enumerate(names) for b in names[i + 1:]
                if (shared := kinds[a] & kinds[b])]


def test_pairs_for_recovery_hold_no_prompt_that_calibrates(local):
    rows = [{"instruction": f"Say {i % 7}.", "input": "", "output": "" if i == 6 else f"{i}"} for i in range(12)]
    write(local, "alpaca-en-999", rows)
    calibration = data.texts("alpaca", 3)
    found = data.pairs("alpaca", skip=3)
    assert [answer for _, answer in found] == ["3", "4", "5", "10", "11"]  # 7 to 9 repeat 0 to 2; 6 is empty
    assert not set(calibration) & {prompt for prompt, _ in found}
    assert found[0][0] == data.instruction_prompt(rows[3]) and data.pairs("alpaca", 2, skip=3) == found[:2]
    with pytest.raises(ValueError, match="n=6 pairs of 'alpaca'; give 1 to 5, the number beyond the first 3"):
        data.pairs("alpaca", 6, skip=3)
    with pytest.raises(ValueError, match="'c4' has no answers.*alpaca, mini_prompts"):
        data.pairs("c4")
