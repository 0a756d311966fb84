"""Carry pages over a change of code that changed no number, instead of running them again.

A page is carried over only if it was up to date at an earlier commit, and if either its code is the same but for names
(a map of old to new names says which), or a *witness* shows it: the same row, or another row of the same notebook, run
before and after the change, with equal records.  Each page says how it was carried over.  Others stay stale.
Run as ``python -m pruning_lib.experiments.carry_over --help``.
Order of this file: names · witnesses · one page · command.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra
from pruning_lib._files import replacing
from pruning_lib.experiments import code_digests, records, runs, staleness
from pruning_lib.experiments.runs import Row, Tree

with extra("report"):
    import nbformat
    import yaml

TIMES = ("_s", "_ms", "_j", "_wh", "_kgco2", "_w", "_bytes_peak", "minutes")  # ends of keys of measured times


def same_but_names(row: Row, tree: Tree, before: Tree, package: Path, names: Mapping[str, str]) -> list[str]:
    """Return the definitions a row uses whose code differs from ``package``, apart from names; [] if none does.

    Parameters
    ----------
    before : tree of the earlier commit
    package : folder of the package at that commit
    names : as in ``code_digests.digests``
    """
    old = staleness.code_cells(runs.source(row, before))
    then = staleness.relevant(code_digests.digests(old, package, names), row)
    differ = code_digests.changed(then, staleness.code_of(row, tree))
    new = staleness.code_cells(runs.source(row, tree))
    same = code_digests.of_notebook(old, package, names) == code_digests.of_notebook(new)
    return differ if same else [*differ, f"the notebook {row.notebook}"]


# --- witnesses --------------------------------------------------------------------------------------------------------


def differences(before: Mapping[str, Any], after: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return the places where two records differ, apart from times and provenance; [] for equal ones."""
    kept = ("values", "rows", "items")
    old = renamed({part: before.get(part) for part in kept}, names)
    return list(_differ(old, {part: after.get(part) for part in kept}, ""))


def _differ(a: Any, b: Any, at: str) -> Sequence[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in a if not str(key).endswith(TIMES)]  # further measurements change nothing
        return [place for key in keys for place in _differ(a.get(key), b.get(key), f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in _differ(*pair, f"{at}[{i}]")]
    if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-12):
        return []
    return [] if a == b else [f"{at}: {a} and {b}"]


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return a value of JSON with the keys of its objects renamed, and texts that are exactly a renamed key."""
    if isinstance(value, dict):
        return {names.get(code_digests.WORD + key, key): renamed(v, names) for key, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, names) for v in value]
    return names.get(code_digests.TEXT + value, value) if isinstance(value, str) else value


# --- one page ---------------------------------------------------------------------------------------------------------


def carry(row: Row, tree: Tree, how: str, names: Mapping[str, str]) -> None:
    """Give a row's page the provenance it would have if it were run now, and today's code around its outputs.

    Parameters
    ----------
    how : how it was established that no number changed; kept in the page
    names : of parameters and values, which are renamed in record and page
    """
    record = json.loads(tree.record(row).read_text())
    new = {**record, **{part: renamed(record.get(part), names) for part in ("values", "rows", "items")},
           "parameters": {**_parameters(row, tree)}}
    new["checksum"] = records.checksum(new)
    page = nbformat.read(tree.page(row), as_version=4)
    notebook = nbformat.read(runs.source(row, tree), as_version=4)
    _take_code(page, notebook)
    page.metadata["pruning_lib"] = {**staleness.provenance(row, tree), "record": new["checksum"], "row": row.name,
                                    "notebook": row.notebook, "parameters": dict(row.parameters), "carried_over": how}
    with replacing(tree.record(row)) as beside:
        beside.write_text(json.dumps(new, indent=1, allow_nan=False) + "\n")
    with replacing(tree.page(row)) as beside:
        beside.write_text(nbformat.writes(page) + "\n")


def _parameters(row: Row, tree: Tree) -> dict[str, Any]:
    return {**runs.parameters_of(runs.source(row, tree)), **row.parameters}


def _take_code(page: Any, notebook: Any) -> None:
    """Replace the source of the page's code cells by the notebook's; the injected parameters follow the new names."""
    today = {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}
    for cell in page.cells:
        if cell.cell_type == "code" and cell.id in today:
            cell.source = today[cell.id]


# --- command ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Update the pages of the named rows; print the rows that stay stale, with the reasons."""
    parser = argparse.ArgumentParser(prog="python -m pruning_lib.experiments.carry_over", description=(
        "Carry pages over a change of code that changed no number."))
    parser.add_argument("rows", nargs="+", help="rows whose pages were up to date at the earlier commit")
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier commit")
    parser.add_argument("--names", type=Path, help="YAML file: old name -> new name")
    parser.add_argument("--witness", type=Path, nargs=2, metavar=("BEFORE", "AFTER"),
                        help="folders of records of the same rows, run before and after the change")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository")
    given = parser.parse_args(argv)
    tree, before = Tree.at(given.root), Tree.at(given.before)
    names = yaml.safe_load(given.names.read_text()) if given.names else {}
    table, left = runs.rows(tree), 0
    for name in given.rows:
        row = table[name]
        differ = same_but_names(row, tree, before, given.before / "pruning_lib", names)
        how = "same code but for names" if not differ else _witness(row, given.witness, names)
        if how:
            carry(row, tree, how, names)
        left += not how
        print(f"{name}: {how or 'stays stale: ' + ', '.join(differ[:5])}")
    return 1 if left else 0


def _witness(row: Row, folders: Sequence[Path] | None, names: Mapping[str, str]) -> str:
    """Return how a witness shows that no number changed; empty without one, or if it shows that one did."""
    for run in (row.name, row.notebook) if folders else ():
        old, new = (records.contents(folder / f"{run}.json") for folder in folders or ())
        if old and new:
            found = differences(old, new, names)
            return "" if found else f"equal records of {run}, run before and after"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
