"""One page of the book, rendered alone."""

import pytest
from test_execution import executed, make_tree  # noqa: F401  (a fixture among them)

from pruning_lib.report import book


def test_one_page_is_rendered_alone_with_its_outputs(executed):  # noqa: F811
    root = executed.notebooks.parent
    (root / "book").mkdir(exist_ok=True)
    (root / "book" / "_config.yml").write_text("title: T\nexecute: {execute_notebooks: 'off'}\n")
    page = book.build_page(root, "small")
    assert page.name == "small.html" and "count is 7" in page.read_text()
    with pytest.raises(SystemExit, match="pruning-lib run plain"):
        book.build_page(root, "plain")
