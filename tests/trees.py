"""Small trees for tests of execution; their rows record the time and settings of every run, without torch."""

import json
import os
from pathlib import Path

import psutil
import yaml
from test_execution import notebook

from pruning_lib.experiments.runs import Tree

PARAMETERS = '''folder = "."   # where marks are left
wait_for = ""  # name of a file
act = ""       # how many ways there are to fail'''
RUNS = '''import json, os, pathlib, signal, time
marks, run = pathlib.Path(folder), os.environ["PRUNING_RUN"]
times = len(list(marks.glob(f"{run}.began*")))
began = {"time": time.monotonic(), "kernel": os.getpid(), "runner": os.getppid(), "cwd": os.getcwd(),
         "threads": os.environ.get("OMP_NUM_THREADS"), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
(marks / f"{run}.part").write_text(json.dumps(began))
(marks / f"{run}.part").rename(marks / f"{run}.began{times}")
end = time.monotonic() + 90
while wait_for and not (marks / wait_for).exists() and time.monotonic() < end:
    time.sleep(0.02)
assert time.monotonic() < end, "waited in vain"'''
ACTS = '''if act == "raise":
    raise ValueError("boom")
if act == "kill runner" and not times:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(90)
if act == "kill kernel" and not times:
    os.kill(os.getpid(), signal.SIGKILL)
if act == "kill grandparent" and not times or act == "kill every grandparent":
    parent = pathlib.Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), signal.SIGKILL)
    time.sleep(90)
if act == "fill memory":
    filled = bytearray(b"x" * 1_500_000_000)
    time.sleep(90)
if act == "compute":
    end = time.process_time() + 3
    while time.process_time() < end:
        pass
if act == "fill disk":
    print("x" * 4_000_000)'''
RECORDS = '''from pruning_lib.experiments.records import checksum
results = pathlib.Path(os.environ["PRUNING_RESULTS"])
results.mkdir(parents=True, exist_ok=True)
record = {"run": run, "values": {"times": times}}
written = json.dumps({**record, "checksum": checksum(record)})
(results / f"{run}.json").write_text(written[:9] if act == "write rubbish" else written)
(marks / f"{run}.ended").write_text(str(time.monotonic()))'''
READS = '''import os, pathlib
sorted(path.stem for path in pathlib.Path(os.environ["PRUNING_RESULTS"]).glob("*.json"))'''


def make(root, rows):
    """Return a tree with these rows (name -> parameters, resources, memory_gb) of ``step`` and the reading ``look``."""
    (root / "marks").mkdir(parents=True, exist_ok=True)
    notebook(root / "notebooks" / "step.ipynb", "# Step", PARAMETERS, RUNS, ACTS, RECORDS)
    notebook(root / "notebooks" / "look.ipynb", "# Look", READS)
    table = {}
    for name, entry in rows.items():
        extra = {key: entry.pop(key) for key in ("resources", "memory_gb") if key in entry}
        table[name] = {"notebook": "step", "parameters": {"folder": str(root / "marks"), **entry}, **extra}
    (root / "notebooks" / "runs.yml").write_text(yaml.safe_dump(
        {"look": {"notebook": "look", "reading": True}, **table}, sort_keys=False))
    return Tree.at(root)


def began(root, name):
    """Return the message of every start of a row, in order."""
    return [json.loads(path.read_text()) for path in sorted((root / "marks").glob(f"{name}.began*"))]


def ended(root, name):
    return float((root / "marks" / f"{name}.ended").read_text())


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def published(tree):
    """Return the names of all files under pages and records, including incomplete ones."""
    return sorted(path.name for folder in (tree.pages, tree.records) if folder.exists() for path in folder.iterdir())


def left_over(tree):
    """Return the names of files that remain between runs."""
    return sorted(path.name for path in tree.failed.iterdir()) if tree.failed.exists() else []


def files(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


HERE = {**{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
         "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
