"""A model in pieces is put together in order and checked whole; terms are accepted before anything is downloaded."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

from pruning_lib.models import loading, packaged
from pruning_lib.models.packaged import PackagedModel, Wheel

PIECES = [b"GGUF" + bytes(500), bytes(range(256)) * 3, b"the end"]
WHOLE = hashlib.sha256(b"".join(PIECES)).hexdigest()
ENTRY = PackagedModel(tuple(Wheel(f"toy-part{i}", "1.0", "", f"toy{i}/data") for i in range(3)), "Toy terms",
                      "toy/base", terms="Be kind.", sha256=WHOLE)


@pytest.fixture
def wheels(tmp_path):
    paths = [tmp_path / f"{i}.whl" for i in range(3)]
    for i, (path, piece) in enumerate(zip(paths, PIECES, strict=True)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"toy{i}/data", piece)
            archive.writestr(f"toy{i}/__init__.py", "raise SystemExit('never run')")
    return paths


def test_the_pieces_make_the_file(tmp_path, wheels):
    assert packaged.assemble(wheels, ENTRY, tmp_path / "toy.gguf").read_bytes() == b"".join(PIECES)


@pytest.mark.parametrize(("changed", "message"), [
    ({"sha256": "0" * 64}, "not the file expected"),
    ({"wheels": ENTRY.wheels[::-1]}, "has no toy2/data"),
    ({"wheels": (*ENTRY.wheels[:2], replace(ENTRY.wheels[2], member="toy2/__init__.py"))}, "not the file expected")])
def test_pieces_of_another_file_are_refused(tmp_path, wheels, changed, message):
    with pytest.raises(ValueError, match=message):
        packaged.assemble(wheels, replace(ENTRY, **changed), tmp_path / "toy.gguf")


def test_several_wheels_without_a_digest_of_the_whole_are_no_entry():
    with pytest.raises(ValueError, match="SHA-256 of the whole"):
        replace(ENTRY, sha256="")


@pytest.mark.parametrize("accepted", [None, "", "another-model", "gemma3"])
def test_without_consent_nothing_is_downloaded_and_the_terms_are_shown(tmp_path, monkeypatch, accepted):
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "download", lambda *_, **__: pytest.fail("downloaded without consent"))
    monkeypatch.delenv(packaged.ACCEPT, raising=False)
    if accepted is not None:
        monkeypatch.setenv(packaged.ACCEPT, accepted)
    with pytest.raises(PermissionError, match=r"(?s)nothing was downloaded.*Gemma Prohibited Use.*set \w+=gemma3-270m"):
        loading.load_model("gemma3-270m")
    assert not list(tmp_path.rglob("*"))


def test_consent_is_a_name_in_the_environment_or_a_typed_yes(monkeypatch):
    monkeypatch.setenv(packaged.ACCEPT, "other toy")
    packaged.ask_for_consent("toy", ENTRY)
    monkeypatch.delenv(packaged.ACCEPT)
    monkeypatch.setattr("sys.stdin", type("Keyboard", (), {"isatty": lambda self: True})())
    for typed, accepted in (("yes", True), ("Yes ", True), ("no", False), ("", False)):
        monkeypatch.setattr("builtins.input", lambda _, typed=typed: typed)
        if accepted:
            packaged.ask_for_consent("toy", ENTRY)
        else:
            with pytest.raises(PermissionError, match="Be kind"):
                packaged.ask_for_consent("toy", ENTRY)


def test_models_without_terms_ask_nothing(monkeypatch):
    monkeypatch.delenv(packaged.ACCEPT, raising=False)
    packaged.ask_for_consent("smollm2-135m-instruct", loading.MODELS["smollm2-135m-instruct"])
