"""Carry pages over a change of code that changed no number, instead of running them again.

A definition, or the notebook, is carried over only if the page was up to date with it at an earlier commit, and if
either it is the same but for names (a map of old to new names says which), or a *witness* shows it: the same row, or
another row of the same notebook, run before and after the change, with equal records.  Everything else stays as stale
as it was.  Each page says how it was carried over.
Run as ``python -m pruning_lib.experiments.carry_over --help``.
Order of this file: names · witnesses · one page · command.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra
from pruning_lib._files import replacing
from pruning_lib.experiments import code_digests, records, runs, staleness
from pruning_lib.experiments.runs import Row, Tree

with extra("report"):
    import nbformat
    import yaml
    from papermill.translators import translate_parameters

NAMES = "same code but for names"
# keys of measured times, energies and memory, their intervals, and values computed from them: no two runs agree
MEASURED = re.compile(r"(_(s|ms|j|wh|w)|kgco2e?|(peak|memory)_bytes|minutes|gain)(_low|_high|_most)?$"
                      r"|^less_\w+_fraction$|_time_fraction$|^(gain|share)_over_\w+$|^(calls|reached|seconds)$")


@dataclass(frozen=True)
class Page:
    """Digests around one page: those stored in it, those at the earlier commit, and today's.

    Attributes
    ----------
    stored : name -> digest of the definitions that the page was made with
    stored_cells : fingerprint of the notebook and the parameters that the page was made with
    then : name -> digest at the earlier commit
    renamed : the same after the map of names
    then_cells : fingerprint at the earlier commit, for the parameters of the page
    same_cells : True if the notebook is the same but for names
    today : name -> digest of today
    """

    stored: Mapping[str, str]
    stored_cells: str
    then: Mapping[str, str]
    renamed: Mapping[str, str]
    then_cells: str
    same_cells: bool
    today: Mapping[str, str]

    def differences(self) -> list[str]:
        """Return the definitions that differ between the earlier commit and today, apart from names."""
        return code_digests.changed(self.renamed, self.today) + ([] if self.same_cells else ["the notebook"])

    def code_after(self, names: Mapping[str, str], witnessed: bool) -> dict[str, str]:
        """Return the digests to store: today's for every definition whose change is established.

        A definition that was stale at the earlier commit keeps the digest of its page, and stays stale.
        """
        kept = {}
        for name, digest in self.stored.items():
            new = code_digests.name_today(name, names)
            fresh = self.then.get(name) == digest
            established = fresh and (witnessed or self.renamed.get(new) == self.today.get(new))
            if not established:
                kept[new] = digest
            elif new in self.today:
                kept[new] = self.today[new]
        return {**{name: digest for name, digest in self.today.items() if name not in self.renamed}, **kept}

    def cells_after(self, witnessed: bool) -> bool:
        """Return True if the change of the notebook's code is established."""
        return self.stored_cells == self.then_cells and (witnessed or self.same_cells)


def page_of(row: Row, tree: Tree, before: Tree, package: Path, names: Mapping[str, str]) -> Page:
    """Return the digests around the page of a row.

    Where the page was made at the very commit of ``before``, as its record says, all of it was up to date there.

    Parameters
    ----------
    before : tree of the earlier commit
    package : folder of the package at that commit
    names : as in ``code_digests.digests``
    """
    stored = staleness.stored_provenance(tree.page(row))
    old, new = (staleness.code_cells(runs.source(row, at)) for at in (before, tree))
    then = staleness.relevant(code_digests.digests(old, package), row)
    then_cells = staleness.fingerprint(replace(row, parameters=stored.get("parameters", {})), before, package)
    mine = _made_at(tree.record(row), package)
    return Page(
        stored=then if mine else staleness.relevant(stored.get("code") or {}, row),
        stored_cells=then_cells if mine else stored.get("fingerprint", ""),
        then=then, renamed=staleness.relevant(code_digests.digests(old, package, names), row), then_cells=then_cells,
        same_cells=code_digests.of_notebook(old, package, names) == code_digests.of_notebook(new),
        today=staleness.code_of(row, tree))


def _made_at(record: Path, package: Path) -> bool:
    """Return True if a record was made at the commit that the folder of ``package`` is a checkout of."""
    made = str(records.contents(record).get("made_with", {}).get("commit", ""))
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package.parent, capture_output=True, text=True).stdout
    return re.fullmatch("[0-9a-f]{7,40}", made) is not None and head.startswith(made)


# --- witnesses --------------------------------------------------------------------------------------------------------


def differences(before: Mapping[str, Any], after: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return the places where two records differ, apart from times and provenance; [] for equal ones."""
    kept = ("values", "rows", "items")
    old = renamed({part: before.get(part) for part in kept}, names)
    return list(_differ(old, {part: after.get(part) for part in kept}, ""))


def _differ(a: Any, b: Any, at: str) -> Sequence[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in a if not MEASURED.search(str(key))]  # further measurements change nothing
        return [place for key in keys for place in _differ(a.get(key), b.get(key), f"{at}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in _differ(*pair, f"{at}[{i}]")]
    if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-12):
        return []
    return [] if a == b else [f"{at}: {a} and {b}"]


def renamed(value: Any, names: Mapping[str, Any]) -> Any:
    """Return a value of JSON with the keys of its objects renamed, and texts that are exactly a renamed key.

    An entry ``"key=value"`` of ``names``, with the value as in JSON, replaces that value under that key.
    """
    if isinstance(value, dict):
        return {names.get(code_digests.WORD + key, key): names.get(f"{key}={json.dumps(v)}", renamed(v, names))
                for key, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, names) for v in value]
    return names.get(code_digests.TEXT + value, value) if isinstance(value, str) else value


# --- one page ---------------------------------------------------------------------------------------------------------


def carry(row: Row, tree: Tree, page: Page, how: str, names: Mapping[str, Any]) -> None:
    """Give a row's page today's digests for all changes that are established, and today's code around its outputs.

    Parameters
    ----------
    how : how it was established that no number changed; kept in the page
    names : of parameters and values, which are renamed in record and page
    """
    stored = nbformat.read(tree.page(row), as_version=4)
    made = stored.metadata["pruning_lib"]
    inputs = {**staleness.provenance(row, tree)["inputs"], **(made.get("inputs") or {})}
    before = made.get("code"), made.get("fingerprint")
    made.update(code=page.code_after(names, how != NAMES), inputs=inputs)
    if page.cells_after(how != NAMES) and not other_parameters(row, tree, names):
        record = _record_after(row, tree, names)
        _take_code(stored, nbformat.read(runs.source(row, tree), as_version=4), row)
        made.update(fingerprint=staleness.fingerprint(row, tree), record=record["checksum"],
                    parameters=dict(row.parameters))
        with replacing(tree.record(row)) as beside:
            beside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if before == (made["code"], made.get("fingerprint")):
        return  # nothing was established
    made["carried_over"] = _ways(made, how)
    with replacing(tree.page(row)) as beside:
        beside.write_text(nbformat.writes(stored) + "\n")


def _ways(made: Mapping[str, Any], how: str) -> str:
    """Return how a page was carried over, earlier times included, each way once."""
    return "; ".join(dict.fromkeys([*filter(None, str(made.get("carried_over") or "").split("; ")), how]))


def other_parameters(row: Row, tree: Tree, names: Mapping[str, Any]) -> list[str]:
    """Return the parameters whose values today are not those of the record, say because a default changed."""
    made = renamed(records.contents(tree.record(row)).get("parameters", {}), names)
    return [name for name, value in _parameters(row, tree).items() if name in made and made[name] != value]


def _record_after(row: Row, tree: Tree, names: Mapping[str, Any]) -> dict[str, Any]:
    record = records.contents(tree.record(row))
    new = {**record, **{part: renamed(record.get(part), names) for part in ("values", "rows", "items")},
           "parameters": _parameters(row, tree)}
    return {**new, "checksum": records.checksum(new)}


def _parameters(row: Row, tree: Tree) -> dict[str, Any]:
    return {**runs.parameters_of(runs.source(row, tree)), **row.parameters}


def _take_code(page: Any, notebook: Any, row: Row) -> None:
    """Replace the source of the page's code cells by the notebook's, and the injected parameters by the row's."""
    today = {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}
    for cell in page.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = translate_parameters("python3", "python", dict(row.parameters), "Parameters")
        elif cell.cell_type == "code" and cell.id in today:
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
    table = runs.rows(tree)
    left = [name for name in given.rows if not _one(table[name], tree, before, given, names)]
    return 1 if left else 0


def _one(row: Row, tree: Tree, before: Tree, given: argparse.Namespace, names: Mapping[str, Any]) -> bool:
    """Update the page of one row as far as possible; print the result; return True if it is up to date afterwards."""
    if broken := staleness.corruption(row, tree):
        print(f"{row.name}: stays stale: {broken}")
        return False
    page = page_of(row, tree, before, given.before / "pruning_lib", names)
    differ = page.differences()
    how = NAMES if not differ else _witness(row, given.witness, names)
    carry(row, tree, page, how or NAMES, names)
    why = "; ".join(filter(None, [staleness.staleness_of(row, tree).why, *(
        f"{name} has another value" for name in other_parameters(row, tree, names))]))
    print(f"{row.name}: {how or 'differs in ' + ', '.join(differ[:5])}" + (f"; stays stale: {why}" if why else ""))
    return not why


def _witness(row: Row, folders: Sequence[Path] | None, names: Mapping[str, Any]) -> str:
    """Return how a witness shows that no number changed; empty without one, or if it shows that one did."""
    for run in (row.name, row.notebook) if folders else ():
        old, new = (records.contents(folder / f"{run}.json") for folder in folders or ())
        if old and new:
            if found := differences(old, new, names):
                print(f"{run}: the witness differs at {', '.join(found[:3])}")
                return ""
            return f"equal records of {run}, run before and after"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
