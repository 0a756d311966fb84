"""Staleness of rows: detection of rows that have to run again, and the reason.

A page stores its provenance: digests of notebook and parameters (for a reading, also the records), of the code in use,
and of the inputs.  A record stores its own checksum.
Order of this file: staleness · notebook, parameters, records · code · inputs · corruption.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning_lib._extras import extra
from pruning_lib._files import digest
from pruning_lib.experiments import code_digests, input_digests, records
from pruning_lib.experiments.runs import Row, Tree, source

with extra("report"):
    import nbformat

# code that shows, stores or waits; a notebook's own code is in its fingerprint
NO_NUMBERS = ("report.", "experiments.records.", "_locks.", code_digests.NOTEBOOK)
MADE_BEFORE = "made before code was fingerprinted"


@dataclass(frozen=True)
class Staleness:
    """Reason for running a row again (empty if up to date), and whether its code has digests.

    Attributes
    ----------
    why : reason, or ""
    code_known : False for a page that predates digests of code
    """

    why: str
    code_known: bool = True


def staleness_of(row: Row, tree: Tree) -> Staleness:
    """Return the staleness of a row: changed notebook, parameters, records, code or inputs, or corrupt files."""
    why = stale_reason(row, tree)
    if why == "no page yet":
        return Staleness(why)
    stored = stored_provenance(tree.page(row))
    reasons = [why, corruption(row, tree), code_changed(row, tree, stored), inputs_changed(row, tree, stored)]
    return Staleness("; ".join(filter(None, reasons)), "code" in stored)


# --- notebook, parameters, records ------------------------------------------------------------------------------------


def fingerprint(row: Row, tree: Tree, package: Path = code_digests.PACKAGE) -> str:
    """Return a digest of the notebook's code, the row's parameters and, for a reading, all records.

    Prose does not count, because the book uses the current prose of the notebook.
    """
    parts = [code_digests.of_notebook(code_cells(source(row, tree)), package)]
    parts += [json.dumps(dict(row.parameters), sort_keys=True)]
    if row.reading:
        parts += [path.read_text(errors="replace") for path in sorted(tree.records.glob("*.json"))]
    return digest("\0".join(parts))


def stale_reason(row: Row, tree: Tree) -> str:
    """Return the reason if the page does not match notebook, parameters and records; empty if it does."""
    if not tree.page(row).is_file():
        return "no page yet"
    if not row.reading and not tree.record(row).is_file():
        return "no record"
    if stored_provenance(tree.page(row)).get("fingerprint") != fingerprint(row, tree):
        return "notebook or a record changed" if row.reading else "notebook or parameters changed"
    return ""


def provenance(row: Row, tree: Tree) -> dict[str, Any]:
    """Return the provenance of a page made now, for the metadata of the page."""
    return {"fingerprint": fingerprint(row, tree), "code": code_of(row, tree),
            "inputs": input_digests.digests_of(row, tree)}


def stored_provenance(page: Path) -> dict[str, Any]:
    """Return the provenance stored in a page; empty if the page cannot be read."""
    try:
        found = nbformat.read(page, as_version=4).metadata.get("pruning_lib", {})
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError, AttributeError, KeyError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


# --- code -------------------------------------------------------------------------------------------------------------


def code_of(row: Row, tree: Tree) -> dict[str, str]:
    """Return name -> digest of the definitions in use; for a run, without those that cannot change a number."""
    return relevant(code_digests.digests(code_cells(source(row, tree))), row)


def code_cells(notebook: Path) -> list[str]:
    """Return the sources of the code cells of a notebook."""
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def relevant(found: dict[str, str], row: Row) -> dict[str, str]:
    """Return the digests that count for a row: for a run, without code that cannot change a number."""
    return {name: digest for name, digest in found.items() if row.reading or not name.startswith(NO_NUMBERS)}


def code_changed(row: Row, tree: Tree, page: dict[str, Any]) -> str:
    """Return the changed code as text; empty if nothing changed or the page has no digests."""
    names = code_digests.changed(relevant(page.get("code") or {}, row), code_of(row, tree))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"code changed: {', '.join(names[:3])}{more}" if names else ""


# --- inputs -----------------------------------------------------------------------------------------------------------


def inputs_changed(row: Row, tree: Tree, page: dict[str, Any]) -> str:
    """Return the changed inputs as text; empty if nothing changed."""
    names = input_digests.changed(page.get("inputs") or {}, input_digests.digests_of(row, tree))
    return f"inputs changed: {', '.join(names)}" if names else ""


# --- corruption -------------------------------------------------------------------------------------------------------


def corruption(row: Row, tree: Tree) -> str:
    """Return a description of corrupt files of a row, empty if intact; readings have no record."""
    made = stored_provenance(tree.page(row))
    if not made:
        return "the page cannot be read"
    if row.reading or not tree.record(row).is_file():
        return ""
    try:
        record = json.loads(tree.record(row).read_text())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return "the record cannot be read"
    if not records.checksum_ok(record) and ("checksum" in record or "code" in made):
        return "the record was edited after it was written"
    if made.get("record") not in (None, record.get("checksum")):
        return "page and record are of different runs"
    return ""
