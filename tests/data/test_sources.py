"""Texts of one's own: every form of a file, of a column and of a name gives its texts, or an error that says where."""

import json

import pandas as pd
import pytest

from pruning_lib import data
from pruning_lib.data import sources

ROWS = [{"text": "one\u2028line", "n": 1}, {"text": "two", "n": 2}]


@pytest.fixture
def write(tmp_path):
    def make(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        if name.endswith(".parquet"):
            pd.DataFrame(content).to_parquet(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", lines(ROWS)), ("a.jsonl", "\ufeff" + lines(ROWS) + "\n"), ("a.jsonl", "\n\n" + lines(ROWS) + "\n \n"),
    ("a.jsonl", lines(ROWS).replace("\n", "\r\n")), ("a.jsonl", lines([row["text"] for row in ROWS])),
    ("A.JSONL", lines(ROWS)), ("a.json", json.dumps(ROWS)), ("a.json", json.dumps({"version": 1, "data": ROWS})),
    ("a.json", "\ufeff" + json.dumps([row["text"] for row in ROWS])), ("a.parquet", ROWS),
    ("a.txt", "one\u2028line\n\ntwo"), ("a.txt", "\ufeffone\u2028line\r\n \r\n\r\ntwo")])
def test_every_form_of_a_file_gives_its_texts(write, name, content):
    assert data.texts(write(name, content)) == ["one\u2028line", "two"]


def test_lines_end_at_newlines_only(write):
    r"""Keep texts whole: JSON allows unescaped characters at which ``str.splitlines`` breaks."""
    text = "a\u2028b\u2029c\x85d"
    assert len(text.splitlines()) == 4
    assert data.texts(write("a.jsonl", json.dumps({"text": text}, ensure_ascii=False))) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_nulls_and_nan_are_empty_texts_which_are_left_out(write, name):
    rows = [{"text": None}, {"text": "two"}, {"text": float("nan")}, {"text": " "}]
    content = rows[:2] if name == "a.parquet" else lines(rows)
    assert data.texts(write(name, content)) == ["two"]
    instructions = [{"instruction": "Add.", "input": None, "output": "3"},
                    {"instruction": "Say.", "input": "", "output": None}]
    file = write(f"i-{name}", instructions if name == "a.parquet" else lines(instructions))
    assert data.pairs(file, skip=0) == [(data.instruction_prompt({"instruction": "Add."}), "3")]


def test_columns_are_named_or_guessed(write):
    rows = [{"id": "x", "ask": "What?", "reply": "That."}, {"id": "y", "ask": "Who?", "reply": "Me."}]
    file = write("a.jsonl", lines(rows))
    assert data.texts(f"{file}:ask") == ["What?", "Who?"]
    assert data.pairs(f"{file}:ask,reply", skip=0) == [("What?", "That."), ("Who?", "Me.")]
    assert data.pairs(f"{file}:ask,reply", skip=1) == [("Who?", "Me.")]
    assert data.texts(write("b.jsonl", lines([{"only": "this", "n": 1}]))) == ["this"]
    for columns in (("prompt", "completion"), ("prompt", "response"), ("question", "answer")):
        pair = write("c.jsonl", lines([dict(zip(columns, ("p", "a"), strict=True))]))
        assert data.pairs(pair, skip=0) == [("p", "a")]
    with pytest.raises(ValueError, match="the columns id, ask, reply; name the one with the texts: .*a.jsonl:COLUMN"):
        data.texts(file)
    with pytest.raises(ValueError, match="name the two with prompts and answers: .*:PROMPTS,ANSWERS"):
        data.pairs(file, skip=0)
    with pytest.raises(ValueError, match="a.jsonl, line 1 has no column 'asks'; it has: id, ask, reply"):
        data.texts(f"{file}:asks")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "a"}\n\n{"text": ', "a.jsonl, line 3: no JSON"),
    ("a.jsonl", "[1]", "line 1: wanted an object"),
    ("a.jsonl", '{"text": "a"}\n{"text": 5}', "a.jsonl, line 2: column 'text' holds int, not text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2: not UTF-8"), ("a.jsonl", "\n\n", "holds no rows"),
    ("a.json", "{}", "wanted a list"), ("a.parquet", b"PAR1", "no parquet file"), ("a.csv", "a", "one of .jsonl"),
    ("a.txt", "", "holds no rows")])
def test_a_damaged_file_is_refused_with_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        data.texts(path)


def test_a_name_that_is_nothing_is_refused_with_the_nearest_and_the_forms(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'mini_promt'.*nearest: mini_prompts.*ORG/NAME"):
        data.texts("mini_promt")
    with pytest.raises(ValueError, match="is no file; give a file"):
        data.texts(tmp_path / "absent.jsonl")
    for odd in ("a b/c d", "a/b/c/d/e"):
        with pytest.raises(ValueError, match="names no text"):
            data.texts(odd)


def test_hub_names_have_config_split_and_column():
    parse = sources.parse
    assert parse("org/name") == sources.Source("org/name", False)
    assert parse("org/name:a b") == sources.Source("org/name", False, columns=("a b",))
    assert parse("org/na.me/conf-1@validation:q, a") == sources.Source(
        "org/na.me", False, "conf-1", "validation", ("q", "a"))


def test_a_data_set_of_the_hub_is_read_by_split_and_column(write, tmp_path, monkeypatch):
    """``load_dataset`` takes a folder for a name of the hub."""
    for split in ("train", "test"):
        write(f"org/name/data/{split}-00000-of-00001.parquet", [{"q": f"{split} {i}", "id": str(i)} for i in range(5)])
    monkeypatch.chdir(tmp_path)
    assert data.texts("org/name:q", 2) == ["train 0", "train 1"]
    assert data.texts("org/name:q", split="test")[-1] == "test 4"
    assert data.texts("org/name@test:q", at_most=9) == [f"test {i}" for i in range(5)]
    assert data.is_test_text("org/name@test:q") and not data.is_test_text("org/name:q")
    with pytest.raises(ConnectionError, match="did not give org/name, split 'dev'"):
        data.texts("org/name@dev:q")


def test_test_text_calibrates_only_if_that_is_allowed():
    with pytest.raises(ValueError, match="'mini_text' is test text.*mini_prompts.*allow_test_text"):
        data.calibration_texts("mini_text")
    assert data.calibration_texts("mini_text", 2, allow_test_text=True) == data.texts("mini_text", 2)


def test_a_number_that_is_not_there_is_refused_and_at_most_is_not(write):
    file = write("a.jsonl", lines(ROWS))
    with pytest.raises(ValueError, match="n=3 texts of .*a.jsonl'; give 1 to 2"):
        data.texts(file, 3)
    assert len(data.texts(file, at_most=3)) == 2 and len(data.texts(file, at_most=1)) == 1
    assert data.same_place(file, f"{file}:text") and not data.same_place(file, "mini_text")
