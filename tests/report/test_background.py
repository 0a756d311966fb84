"""Chapters of background: snippets print what stands below them, the drawing pairs heads as attention code does."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import repeat_kv

from pruning_lib.pruning import amp

BOOK = Path(__file__).resolve().parents[2] / "book"
SNIPPET = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.M | re.S)
TEXTS = {path.stem: path.read_text() for path in sorted((BOOK / "chapters").glob("*.md"))}
PRINTED = [name for name, text in TEXTS.items() if SNIPPET.search(text)]
BACKGROUND = {"history", "grouped_query", "least_squares", "bures", "why_l1"}


def script(name):
    spec = importlib.util.spec_from_file_location(name, BOOK / "drawings" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grouped = script("grouped_query")


def test_every_chapter_of_background_asks_answers_and_names_limits_and_prints_something():
    assert BACKGROUND <= set(PRINTED)
    for name in BACKGROUND:
        headings = re.findall(r"^## (.+)$", TEXTS[name], re.M)
        assert headings[0] == "The question" and headings[-1] == "Limits", name


@pytest.mark.parametrize("name", PRINTED)
def test_a_snippet_prints_what_stands_below_it(name):
    names = {"__name__": "snippet"}
    for code, shown in SNIPPET.findall(TEXTS[name]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"{name}.md", "exec"), names)
        assert out.getvalue() == shown


# --- grouped-query attention ------------------------------------------------------------------------------------------


def test_the_drawing_is_what_its_script_draws_and_stands_in_its_chapter():
    assert (BOOK / "drawings" / "grouped_query.html").read_text() == grouped.draw()
    assert ":drawing: grouped_query.html" in TEXTS["grouped_query"]


@pytest.mark.parametrize(("queries", "groups"), [(6, 3), (4, 2), (3, 3), (9, 3), (6, 1)])
def test_pairs_are_those_of_attention_code(queries, groups):
    keys = torch.arange(groups).view(1, groups, 1, 1)
    assert [key for _, key in grouped.pairs(queries, groups)] == repeat_kv(keys, queries // groups).flatten().tolist()


def test_the_panels_say_which_cut_is_safe():
    found = [grouped.wrong(list(queries), list(keys)) for _, queries, keys, _ in grouped.PANELS]
    assert found == [[], [], [], None, [1, 3]]


# --- the worksheet ----------------------------------------------------------------------------------------------------


def test_the_worksheet_without_answers_is_the_one_with_answers_emptied():
    def questions(text):
        return re.findall(r"^\*\*\d+\.\*\* (.+)$", text, re.M)

    assert len(questions(TEXTS["worksheet"])) >= 8
    assert questions(TEXTS["worksheet"]) == questions(TEXTS["worksheet_answers"])
    assert "*Answer.*" not in TEXTS["worksheet"] and TEXTS["worksheet_answers"].count("*Answer.*") == len(
        questions(TEXTS["worksheet"]))


def test_the_answers_of_the_worksheet_are_right():
    """Compute every number again, with the library where it has the function."""
    x, v = np.array([[1.0, 2], [3, 0]]), np.array([[1.0, 0], [1, 1]])
    out, into = np.array([[2.0, 0], [0.5, -0.5]]), np.array([[1.0, -1, 0], [0, 1, 0.5]])
    z = np.array([[1, 0], [0.5, 0.5]]) @ x @ v
    half = torch.full((1, 2), 0.5)
    heads = amp.head_scores(torch.tensor(z)[None].float(), torch.tensor(out.T).float(), half, D=1).tolist()
    y = x + z @ out
    neurons = amp.neuron_scores(torch.tensor(np.maximum(0, y @ into))[None].float(), half).tolist()
    without = np.maximum(0, (x + z[:, :1] @ out[:1]) @ into)[:, [0, 2]]
    cut = x + z[:, :1] @ out[:1] + without @ np.array([[1.0, 0], [1, 1]])
    answers = re.findall(r"^\*Answer\.\* (.+)$", TEXTS["worksheet_answers"], re.M)

    def numbers(text):
        return [float(n.replace("−", "-")) for n in re.findall(r"[−-]?\d+(?:\.\d+)?", text.replace("$", ""))]

    assert numbers(answers[0]) == z.T.flatten().tolist() == [3, 3, 2, 1]
    assert numbers(answers[1]) == np.concatenate([np.outer(z[:, h], out[h]).flatten() for h in (0, 1)]).tolist()
    assert numbers(answers[2])[:2] == heads and numbers(answers[4]) == y.flatten().tolist()
    assert numbers(answers[5])[:3] == neurons and numbers(answers[6]) == cut.flatten().tolist()


# --- quiz and answers -------------------------------------------------------------------------------------------------


def unanswered():
    """Return the notebooks with a question to try that is not followed by an answer on the page."""
    for path in sorted((BOOK.parent / "notebooks").glob("*.ipynb")):
        text = path.read_text()
        if "**Try.**" in text and "{admonition} Answer" not in text:
            yield path.stem


def test_every_question_to_try_has_an_answer():
    answers = dict(re.findall(r"^## (\w+)\n\n(.+)$", TEXTS["answers"], re.M))
    asked = set(unanswered())
    assert len(asked) > 20 and asked <= set(answers)
    assert set(answers) <= {path.stem for path in (BOOK.parent / "notebooks").glob("*.ipynb")}
    assert min(len(answer.split()) for answer in answers.values()) >= 20


KIT = {"answers", "capstone", "fill_in", "quiz", "six_sessions", "teaching", "worksheet", "worksheet_answers"}
READ_THROUGH = {"amp", "beyond_amp", "consensus", "robustness", "your_model", "claims", "records", "scale",
                "when_to_prune"} | BACKGROUND


def test_there_is_a_quiz_for_every_chapter_and_every_answer_is_folded():
    sections = re.split(r"^## ", TEXTS["quiz"], flags=re.M)[1:]
    assert {re.search(r"\[this chapter\]\((\w+)\.md\)", section)[1] for section in sections} == READ_THROUGH
    for section in sections:
        questions = re.findall(r"^\*\*Question (\d+)\.\*\* .+\n\n```\{admonition\} Answer\n:class: dropdown\n.+\n```$",
                               section, re.M)
        assert questions and [int(n) for n in questions] == list(range(1, section.count("**Question") + 1))


def test_the_rubric_of_the_capstone_adds_up():
    criteria = re.findall(r"^\| [a-z ]+ \| .+ \| .+ \| .+ \| .+ \|$", TEXTS["capstone"].split("## Rubric")[1], re.M)
    assert f"16 to {3 * len(criteria)} is excellent" in TEXTS["capstone"]


def test_the_six_sessions_use_every_exercise():
    used = {int(n) for text in re.findall(r"exercises? ([\d, and]+)", TEXTS["six_sessions"])
            for n in re.findall(r"\d+", text)}
    assert used == set(range(1, 11))
    assert all(f"({name}.md" in TEXTS["six_sessions"] for name in BACKGROUND | KIT - {"answers", "six_sessions",
                                                                                    "worksheet_answers"})
