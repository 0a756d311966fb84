"""A toy model in a folder, and commands called as by a user."""

import pytest

from pruning_lib.cli import main


@pytest.fixture
def dense(tmp_path, tiny, tokenizer):
    """Return a folder with a toy LLaMA whose tokens are characters."""
    folder = tmp_path / "dense"
    model = tiny("llama", heads=6, groups=3, n_blocks=3, neurons=60, fields={"max_position_embeddings": 512})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def call(capsys):
    """Return ``call(*arguments)`` -> (exit status, standard output, standard error)."""

    def run(*arguments):
        status = main.main([*map(str, arguments)])
        return status, *capsys.readouterr()

    return run
