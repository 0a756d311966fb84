"""Docstrings, comments and error messages are in standard English: verb and object first, no headless clauses."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pruning_lib"
FOLDERS = (".", "models", "data", "pruning", "training", "evaluation", "experiments", "report", "cli")
MODULES = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).glob("*.py"))]

# Imperatives that open the docstring of a function.  Add a verb when a new one is needed.
VERBS = set("""
    accept accumulate add adjust align allocate answer append apply approximate assert assign attach attack average
    begin bind block blur bound bring build cache calibrate call cancel capture change check choose classify clean clear
    clip clone close collect combine compare compute concatenate connect construct continue convert copy correct count
    create crop cut deactivate decide decode decorate decrease defer delete describe detach detect determine disable
    discard display distribute divide download draw drop dump embed enable encode end enforce ensure enter erase
    estimate evaluate exclude execute exit expand export extend extract fail fetch fill filter find fine-tune finish fit
    fix flatten flip flush fold follow force format forward free freeze fuse gather generate get give group guess handle
    hash hide hold identify ignore import improve include increase indent infer initialise inject insert install
    interpolate interrupt invert iterate join keep kill label launch leave let limit link list load locate lock log look
    lower make map mark mask match materialise maximise mean measure merge minimise mix modify move multiply name
    normalise notify offload omit open order overwrite pack pad parse partition pass patch paste permute pick pin place
    plan plot point poll pop postpone predict prepare prevent print process produce project propagate prune publish pull
    push put quantise query queue quote raise random-restart rank re-solve read rebuild recalibrate receive recompute
    reconstruct record recover redirect reduce refer refresh refuse register reject release reload remove rename render
    reorder repeat replace report represent request require rerun reschedule reserve reset reshape resolve restart
    restore restrict resume retry return reverse rewrite rotate round run sample save scale scan schedule score search
    seed select send separate serialise serve set shift shorten show shuffle shut sign simulate skip slice smooth solve
    sort split stack start state step stop store stream strip submit subtract sum summarise suppress swap switch take
    terminate test tie time tokenise train transform translate transpose trim truncate try tune turn undo unfold unpack
    unwrap update upload use validate verify visit wait walk warn weight whiten widen wrap write yield zero
""".split())
NO_OPENING = re.compile(r"(What|How|Which|Whether|Who|Whom|Whose|That|Of|By|Where|When|Why)\b")  # classes and modules

VERB = r"(is|are|was|were|goes|go|went|stays|stay|comes|come|counts?|remains?|has|have|had|needs?|gives?|makes?|takes?)"
BANNED = {
    "a headless clause; name the thing": re.compile(
        r"\bwhat\b(?! to\b| :)|(?:^|[.;:,(]\s|\b(?:and|or|of|by|than|to|as)\s)who\b"
        rf"|(?:^|[.;:(]\s)which {VERB}\b", re.I),
    "a part that 'goes'; write that it is removed": re.compile(
        r"\b(?:heads?|neurons?|blocks?|groups?|columns?|parameters?|channels?|units?|that) (?:go|goes|went)\b"),
    "a word this project does not use; write output projection, reconstruction, available": re.compile(
        r"closing projection|\brepair|\bcompensat|\bat hand\b|\bwhoever\b|\bhanded? on\b", re.I),
    "an old module name": re.compile(
        r"(?<![\w.])(?:baselines|plans|block_plans|criteria|compensate|recover|finetune|networks|resnets|activations|"
        r"shapes|fused|recipes|harness|shortcuts|speed|store|subjects|reach|practice)\.[a-z_A-Z]+"),
}


def docstrings(tree):
    """Yield (line, node, text) of every docstring of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), node, text


def comments(source):
    """Yield (line, text) of every comment; adjacent lines are joined, since a clause may be broken over them."""
    last, start, parts = -1, 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if parts and token.start[0] != last + 1:
                yield start, " ".join(parts)
                parts = []
            start = start if parts else token.start[0]
            last = token.start[0]
            parts.append(token.string.lstrip("# "))
    if parts:
        yield start, " ".join(parts)


def messages(tree):
    """Yield (line, text) of every error message of a module; inserted values become ``{}``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Call) and part.args:
                    yield node.lineno, "".join(_literal(piece) for piece in ast.walk(part.args[0]))


def _literal(node):
    """Return the text of a string constant; "" for anything else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def wrong_openings(source):
    """Return the docstrings that do not begin with a verb (functions) or begin with a headless word (the others)."""
    found = []
    for line, node, text in docstrings(ast.parse(source)):
        first = text.split()[0].rstrip(".,:;")
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        fits = first[:1].isupper() and first.lower() in VERBS if function else not NO_OPENING.match(text)
        if not fits:
            found.append(f"line {line}: {text.splitlines()[0]}")
    return found


def banned_phrases(source):
    """Return the docstrings, comments and messages with a banned phrase."""
    tree, found = ast.parse(source), []
    texts = [*((line, text) for line, _, text in docstrings(tree)), *comments(source), *messages(tree)]
    for line, text in texts:
        text = re.sub(r"\s+", " ", text)
        for reason, pattern in BANNED.items():
            found += [f"line {line}: {reason}: ... {text[max(0, hit.start() - 40):hit.end() + 40]} ..."
                      for hit in pattern.finditer(text)]
    return found


def names_of(path):
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=names_of)
def test_the_docstring_of_a_function_begins_with_a_verb(path):
    found = wrong_openings(path.read_text())
    assert not found, f"{path.name}: begin with a verb of VERBS (or add one there)\n" + "\n".join(found)


@pytest.mark.parametrize("path", MODULES, ids=names_of)
def test_docstrings_comments_and_messages_have_no_banned_phrase(path):
    found = banned_phrases(path.read_text())
    assert not found, "\n".join(found)


def test_every_module_is_checked():
    assert set(MODULES) == set(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("opening", ["How far apart two things are.", "The mean of x.", "Whether x is known.",
                                     "Of each layer.", "Logits (B, C).", "Returns the mean.", "return the mean."])
def test_a_wrong_opening_of_a_function_is_reported(opening):
    assert wrong_openings(f'def f():\n    """{opening}"""\n')


def test_a_class_may_open_with_a_noun_but_not_with_a_headless_word():
    assert not wrong_openings('class A:\n    """The plan of a method."""\n')
    assert wrong_openings('class A:\n    """What a plan is."""\n')


@pytest.mark.parametrize("source", [
    'x = 1  # what goes\n', 'x = 1  # the mean of the blocks that go\n', '"""Keep what\nstays."""\n',
    '"""See ``baselines.METHODS``."""\n', 'raise ValueError(f"{x}: the closing projections of")\n',
    '# a comment over two lines: who\n# calls holds the lock\n'])
def test_a_banned_phrase_is_reported(source):
    assert banned_phrases(source)


def test_plain_sentences_pass():
    assert not banned_phrases('"""Return the mean of x, which is finite."""\nx = 1  # the caller must hold the lock\n')
