"""The examples in the docstrings of the public functions run in a folder with toy models."""

import doctest

import pytest

import pruning_lib as pl

UNTOUCHED = {"plots", "zero_shot", "record", "records"}  # a module; minutes of work; shown with ``read_record``
DOCUMENTED = sorted(set(pl._PUBLIC) - UNTOUCHED)


@pytest.fixture
def toys(tmp_path, tiny, tokenizer, monkeypatch):
    """Change into a folder that holds a toy LLaMA and a toy ResNet."""
    from conftest import image_network

    pl.save(tiny("llama", heads=6, groups=3, n_blocks=3, neurons=64, fields={"max_position_embeddings": 512}),
            tokenizer, tmp_path / "toy")
    pl.save(image_network("cifar_resnet", depth=14), None, tmp_path / "toy-resnet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNING_RECORDS", str(tmp_path / "results"))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_examples_of_a_public_function_run_and_show_what_it_returns(name, toys):
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(pl, name), name, globs={})
    assert found.examples, f"pl.{name} has no example"
    report = []
    result = doctest.DocTestRunner().run(found, out=report.append)
    assert result.failed == 0, "".join(report)
