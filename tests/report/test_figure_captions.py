"""A paragraph that begins with "Figure." becomes the caption of the figure that the next code cell draws."""

import sys
from pathlib import Path

import pytest
from docutils import nodes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "book" / "extensions"))
import figure_captions  # noqa: E402


def cell(*outputs):
    shown = nodes.container("", *outputs, classes=["cell_output"])
    return nodes.container("", nodes.container("", classes=["cell_input"]), shown, classes=["cell"])


@pytest.fixture
def section():
    words = nodes.Text(""), nodes.strong("", "Figure."), nodes.Text(" Loss of "), nodes.emphasis("", "all")
    caption = nodes.paragraph("", "", *words)
    held = nodes.container("", nodes.image(uri="a.png"))
    return nodes.section("", nodes.paragraph("", "Why?"), caption, nodes.note(), cell(nodes.paragraph(), held))


def test_a_caption_is_known_by_its_first_word(section):
    assert [figure_captions.is_caption(part) for part in section[:2]] == [False, True]
    assert isinstance(section[1][0], nodes.strong)


def test_a_caption_finds_the_figure_of_the_next_cell(section):
    found = figure_captions.drawn(figure_captions.following_cell(section[1]))
    assert found is section[3][1][1] and found.next_node(nodes.image)["uri"] == "a.png"
    assert figure_captions.drawn(figure_captions.following_cell(section[3])) is None
    assert figure_captions.drawn(cell(nodes.paragraph())) is None


@pytest.mark.parametrize("number, wanted", [(0, "Loss of all"), (2, "Fig. 2 Loss of all")])
def test_the_figure_holds_what_was_shown_and_the_words_of_the_paragraph(section, number, wanted):
    assert figure_captions.is_caption(section[1])
    shown = section[3][1][1]
    figure = figure_captions.captioned(section[1], shown, "fig-a-1", number)
    assert section[3][1][1] is figure and figure["ids"] == ["fig-a-1"] and figure[0] is shown
    assert figure[1].astext() == wanted and isinstance(figure[1], nodes.caption)
