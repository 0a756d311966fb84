"""Records of runs: one per run, written, read, and collected into tables.

A record has the name of the run, its parameters, its measurements, and its provenance.  Records are in the folder
``PRUNING_RESULTS`` (set by ``execution``), or else in ``results`` in the current folder.  A run that needs an earlier
record reads it from ``PRUNING_RECORDS``, the folder of published records.
A checksum in a record reveals later edits; old records without a checksum remain readable.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pruning_lib
from pruning_lib._extras import extra
from pruning_lib._files import digest, replacing

if TYPE_CHECKING:
    import pandas as pd

VERSIONS = ("torch", "transformers", "lm-eval")


def folder() -> Path:
    """Return the folder for writing and reading records."""
    return Path(os.environ.get("PRUNING_RESULTS") or "results")


def write(notebook: str, *, values: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = (),
          data: Mapping[str, str] | None = None, items: Mapping[str, str] | None = None,
          parameters: Mapping[str, Any] | None = None) -> Path:
    """Write the record of a run atomically.

    Parameters
    ----------
    notebook : name of the notebook; also the name of the record unless ``PRUNING_RUN`` is set
    values : numbers with the unit in the key
    rows : small table of a run that measures several models: one mapping per line
    data : data set -> fingerprint of the samples used
    items : task -> packed correctness of items, for paired comparisons
    parameters : parameters of the run; by default those that the runner executes the notebook with

    Raises
    ------
    ValueError
        for a value that JSON cannot represent (NaN, infinity).
    """
    run = os.environ.get("PRUNING_RUN") or notebook
    given = json.loads(os.environ.get("PRUNING_PARAMETERS") or "{}") if parameters is None else dict(parameters)
    record = {"run": run, "notebook": notebook, "parameters": given, "values": _plain(values),
              "rows": [_plain(row) for row in rows], "items": dict(items or {}),
              "made_with": {**made_with(data or {}), **local_weights(given)}}
    path = folder() / f"{_checked(run)}.json"
    record["checksum"] = checksum(record)
    with replacing(path) as beside:
        beside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path


def read(run: str) -> dict[str, Any]:
    """Return the record of one run; raise ValueError if it is missing, not a record, or edited.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> _ = pl.record("doubling", values={"twice_number": 4})
    >>> pl.read_record("doubling")["values"]
    {'twice_number': 4}
    """
    places = _places()
    paths = [place / f"{_checked(run)}.json" for place in places]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted({p.stem for place in places for p in place.glob("*.json")})) or "none yet"
        raise ValueError(f"no record of run {run!r}; recorded: {known}. Create it with: pruning-lib run {run}")
    return _verified(path, run)


def _places() -> list[Path]:
    """Return the folders to read records from; a notebook opened in its own folder also sees the published ones."""
    published = os.environ.get("PRUNING_RECORDS")
    if not os.environ.get("PRUNING_RESULTS") and Path("runs.yml").is_file():
        published = os.path.join("..", "data", "results")
    return [folder(), *([Path(published)] if published else [])]


def _verified(path: Path, run: str) -> dict[str, Any]:
    """Return the record in a file; raise ValueError if it is not a record of ``run``, or edited."""
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not text, or huge numbers
        raise ValueError(f"{path.name} is not a record ({error}); delete it and run {run} again") from error
    if not _has_form(record):
        raise ValueError(f"{path.name} is not a record: it needs run, parameters, values and made_with; "
                         f"run {run} again")
    if record["run"] != run:
        raise ValueError(f"{path.name} is not a record of {run} but of {record['run']!r}; run {run} again")
    if "checksum" in record and not checksum_ok(record):
        raise ValueError(f"{path.name} is not a record as it was written: it was edited; run {run} again")
    record.pop("checksum", None)
    return record


def checksum(record: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of a record without its checksum."""
    plain = json.loads(json.dumps({k: v for k, v in record.items() if k != "checksum"}, allow_nan=False))
    return digest(json.dumps(plain, sort_keys=True))


def checksum_ok(record: Mapping[str, Any]) -> bool:
    """Return True if a record has a checksum that matches its contents."""
    try:
        return record.get("checksum") == checksum(record)
    except ValueError:  # a number that JSON cannot represent
        return False


def contents(path: Path) -> dict[str, Any]:
    """Return the contents of a record file without validation; empty if it is not a JSON object."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _has_form(record: Any) -> bool:
    """Return True if ``record`` has all parts of a record with the expected types."""
    kinds = {"run": str, "parameters": dict, "values": dict, "made_with": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), kind) for k, kind in kinds.items()):
        return False
    rows = record.get("rows") or []
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def to_dataframe(notebook: str) -> pd.DataFrame:
    """Collect all records of one notebook into a table: a line per record, or per row of a record with rows.

    Columns are ``run``, the parameters, the values and those of the row; columns of the row override parameters.
    """
    with extra("report"):
        import pandas as pd

    return pd.DataFrame([line for record in _all(notebook) for line in _lines(record)])


def _all(*notebooks: str) -> list[dict[str, Any]]:
    """Return the records of notebooks: the user's own of each if there are any, else those Jupyter also sees."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for place in [folder()] if os.environ.get("PRUNING_RESULTS") else _places():
        if wanted := [name for name in notebooks if name not in chosen]:
            for record in [_verified(path, path.stem) for path in sorted(place.glob("*.json"))]:
                if record.get("notebook") in wanted:
                    chosen.setdefault(record["notebook"], []).append(record)
    return [record for found in chosen.values() for record in found]


def _lines(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    common = {"run": record["run"], **record["parameters"], **record["values"]}
    return [{**common, **row} for row in record.get("rows") or [{}]]


def recipes(*, every_format: bool = False) -> pd.DataFrame:
    """Collect all records of ``recipe`` and ``zero_shot`` into a table of every pruned language model.

    Columns in addition to those of ``to_dataframe``: ``notebook``; ``label``, name of the pipeline; ``recipe``, the
    name without tuning; ``split``, the number of removed heads if it differs from most runs of this model and size;
    ``other_model``, the model if it differs from most runs; ``text_used``, text of the reconstruction.  ``split`` and
    ``other_model`` are "" by default and are part of ``label`` and ``recipe``.  Lines that differ only in the number
    format are merged, with bfloat16 first, unless ``every_format`` is set.
    """
    with extra("report"):
        import pandas as pd

    wanted = {"method": "none", "criterion": "none", "reconstruction": "none", "tasks": "none", "recovery_pairs": 0}
    records = sorted(_all("recipe", "zero_shot"), key=lambda record: record["run"])
    asked = {name for record in records for name in record["parameters"]} - {"dtype"}
    table = pd.DataFrame([{**line, "notebook": record["notebook"]} for record in records for line in _lines(record)])
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *_RECIPE_COLUMNS, *wanted]))).fillna(wanted)
    usual = table[~table.method.isin({"none", "dense"})].groupby(["model", "removed_fraction"]).heads_removed
    usual = usual.agg(_most_common).to_dict()
    model = next(iter(table.model.mode()), "")
    lines = table.to_dict("records")
    table["split"] = splits = [_split(line, usual) for line in lines]
    table["other_model"] = models = ["" if line["model"] == model else f" ({line['model']})" for line in lines]
    ends = [split + other for split, other in zip(splits, models, strict=True)]
    table["label"] = [recipe(line) + end for line, end in zip(lines, ends, strict=True)]
    table["recipe"] = [recipe({**line, "recovery_pairs": 0}) + end for line, end in zip(lines, ends, strict=True)]
    table["text_used"] = ["" if line["reconstruction"] == "none" else
                          f"{line['reconstruction_samples']:.0f} texts of {line['reconstruction_text']}"
                          for line in lines]
    table = table.sort_values(["dtype", "run"], ignore_index=True)
    return table if every_format else table.drop_duplicates(["notebook", *sorted(asked)], ignore_index=True)


_RECIPE_COLUMNS = ("run", "notebook", "dtype", "seed", "model", "removed_fraction", "reached_fraction",
                   "heads_removed", "perplexity", "perplexity_low", "perplexity_high", "text", "reconstruction_samples",
                   "reconstruction_text", "reconstruction_s", "first_loss", "last_loss")


def _most_common(heads: pd.Series) -> int | str:
    """Return the most common number of removed heads; of several, the largest."""
    counts = heads.value_counts()
    return max(counts[counts == counts.max()].index, key=lambda one: -1 if one == "same_share" else one)


def _split(line: Mapping[str, Any], usual: Mapping[tuple[str, float], int | str]) -> str:
    """Return the number of removed heads as text if it differs from most runs of this model and size."""
    heads = line["heads_removed"]
    if line["method"] in {"none", "dense"} or heads in (None, usual.get((line["model"], line["removed_fraction"]))):
        return ""
    if heads == "same_share":
        return ", same share of heads"
    return f", {heads:.0f} heads a block" if heads else ", neurons only"


def recipe(parameters: Mapping[str, Any]) -> str:
    """Return the name of a pipeline for tables and figures, such as ``"amp + reconstruction + LoRA"``.

    ``parameters`` are those of ``recipe`` or ``zero_shot``, or a line of their table with NaN for missing values.
    """
    said = {"method": "none", "criterion": "none", "reconstruction": "none", "recovery_pairs": 0, "kd_weight": 0,
            **{key: value for key, value in parameters.items() if value == value}}
    parts = [said["method"]] if said["method"] != "none" else []
    parts += [f"{said['criterion']} blocks"] if said["criterion"] != "none" else []
    parts += {"none": [], "one_pass": ["reconstruction in one pass"],
              "sequential": ["reconstruction"], "asymmetric": ["asymmetric reconstruction"]}[said["reconstruction"]]
    parts += ["distilled LoRA" if said["kd_weight"] else "LoRA"] if said["recovery_pairs"] else []
    return " + ".join(parts).replace("_", " ")


def format_interval(middle: float, low: float, high: float, form: str = ".3f") -> str:
    """Format a number with its interval, ``"0.462 [0.448, 0.476]"``; ``form`` as in an f-string."""
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def made_with(data: Mapping[str, str]) -> dict[str, Any]:
    """Return commit, versions, device, threads, minutes since the import of the package, and data fingerprints."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {_processor()}"
    return {"commit": commit() or "unknown", **versions(), "python":
            platform.python_version(), "device": device, "threads": torch.get_num_threads(),
            "minutes": round((time.monotonic() - pruning_lib._started) / 60, 2), "data": dict(data)}


def local_weights(parameters: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return digests of the weights of models that were taken from ``PRUNING_MODELS``, by their names; {} for none.

    A folder there stands for the model of that name and may hold other weights, such as dequantised ones.
    """
    place = Path(os.environ.get("PRUNING_MODELS") or os.devnull)
    names = {text for text in parameters.values() if isinstance(text, str) and text}
    found = {name: sorted((place / name).glob("*.safetensors")) for name in sorted(names)}
    digests = {name: digest(digest(path).encode() for path in paths) for name, paths in found.items() if paths}
    return {"local_weights": digests} if digests else {}


def finite(value: Any) -> Any:
    """Return ``value`` with null for every infinity and NaN; in a dict ``<key>_reason`` says which ones they were."""
    if isinstance(value, dict):
        reasons = {f"{key}_reason": _reason(item) for key, item in value.items() if _reason(item)}
        return {**{key: finite(item) for key, item in value.items()}, **reasons}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if _reason(value) else value


def _reason(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(f"item {i}: {found}" for i, item in enumerate(value) if (found := _reason(item)))
    if not isinstance(value, float) or math.isfinite(value):
        return ""
    return "not a number" if math.isnan(value) else "infinite: too large for a floating-point number"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to JSON types, infinities and NaN to null with a reason; raise ValueError for other types."""
    plain = {}
    for key, value in values.items():
        if hasattr(value, "item"):
            value = value.item()
        if not isinstance(value, (int, float, str, bool, type(None))):
            raise ValueError(f"{key} is a {type(value).__name__}; a record takes numbers, texts, true, false and null")
        plain[key] = value
    return finite(plain)


def _checked(run: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run):
        raise ValueError(f"run name {run!r}: use letters, digits, dot, dash and underscore, 100 at most")
    return run


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that numbers depend on; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """Return the commit of this repository, ``"+changes"`` where files differ; "" for an installed package.

    An installed package may lie inside any other repository, say in its ``.venv``; that one's commit says nothing.
    """
    package = Path(__file__).resolve().parents[1]
    top = _git("rev-parse", "--show-toplevel", where=package)
    if not top or Path(top).resolve() != package.parent or not _git("ls-files", "--", Path(__file__), where=package):
        return ""
    changed = _git("status", "--porcelain", "--", package, where=package)
    return _git("rev-parse", "--short", "HEAD", where=package) + "+changes" * bool(changed)


def _git(*arguments: str | Path, where: Path) -> str:
    """Return the output of git; "" on an error, or where it is not installed."""
    try:
        return subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
