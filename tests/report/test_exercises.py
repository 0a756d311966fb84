"""Every exercise has a folded solution, and the code of every solution runs and checks its claims."""

import re
from pathlib import Path

import pytest

CHAPTERS = Path(__file__).resolve().parents[2] / "book" / "chapters"
EXERCISE = r"^```\{admonition\} Exercise (\d+) · (?:on paper|in code), (\d+) minutes\n:class: tip\n.+?^```$"
SOLUTION = r"^````\{admonition\} Solution (\d+)\n:class: dropdown\n(.+?)^````$"
WANTED = {"amp": 3, "beyond_amp": 2, "consensus": 3, "robustness": 3, "your_model": 3}  # at the least


def exercises(text):
    """Return (number, minutes) of each exercise."""
    return [(int(number), int(minutes)) for number, minutes in re.findall(EXERCISE, text, re.M | re.S)]


def solutions(text):
    """Return number -> (text, code) of each solution."""
    return {int(number): (body, re.findall(r"^```python\n(.*?)^```$", body, re.M | re.S))
            for number, body in re.findall(SOLUTION, text, re.M | re.S)}


TEXTS = {path.stem: path.read_text() for path in sorted(CHAPTERS.glob("*.md"))}
SOLVED = [(chapter, number) for chapter, text in TEXTS.items() for number in solutions(text)]


@pytest.mark.parametrize("chapter", [c for c, text in TEXTS.items() if "{admonition} Exercise" in text or c in WANTED])
def test_every_exercise_is_followed_by_its_solution(chapter):
    text = TEXTS[chapter]
    order = re.findall(r"^`{3,}\{admonition\} (Exercise|Solution) (\d+)", text, re.M)
    numbers = range(1, len(order) // 2 + 1)
    assert order == [(kind, str(n)) for n in numbers for kind in ("Exercise", "Solution")]
    assert [n for n, _ in exercises(text)] == list(solutions(text)) == list(numbers)
    assert len(numbers) >= WANTED.get(chapter, 1)


@pytest.mark.parametrize(("chapter", "number"), SOLVED, ids=lambda part: str(part))
def test_the_code_of_a_solution_runs_and_checks_its_claim(chapter, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files saved by a solution
    body, blocks = solutions(TEXTS[chapter])[number]
    assert body.split("```python")[0].strip(), "an answer in words comes first"
    code = "\n".join(blocks)
    assert re.search(r"^\s*assert ", code, re.M), "a solution ends in code that checks it"
    exec(compile(code, f"{chapter}.md, solution {number}", "exec"), {"__name__": "solution"})
