"""The command ``export``: a checkpoint as a file for another program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pruning_lib.cli import output
from pruning_lib.models import gguf_export, loading


def export(arguments: argparse.Namespace) -> int:
    """Write a GGUF file; return the exit status."""
    return output.answer(_export, arguments)


def _export(a: argparse.Namespace) -> tuple[dict[str, Any], str]:
    source = Path(loading.find(a.model))
    if not source.is_dir():
        raise ValueError(f"{a.model!r} is no local folder; get it first with: hf download {a.model} --local-dir FOLDER")
    found = gguf_export.export(source, a.out, format=a.gguf)
    lines = [f"{found.path}: {found.size_bytes:,} bytes, {a.gguf}"]
    if found.unquantised:
        lines.append(f"{len(found.unquantised)} matrices are f16, their rows are no multiple of 32 (prune with "
                     f"--multiple-of 32): {', '.join(found.unquantised[:3])}" + " ..." * (len(found.unquantised) > 3))
    facts = {"path": str(found.path), "size_bytes": found.size_bytes, "format": a.gguf,
             "unquantised": list(found.unquantised)}
    return facts, "\n".join(lines)
