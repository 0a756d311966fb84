"""The chapter *Run it on your model*, executed from its first line to a rebuilt book.

The test reads code and commands from the chapter and only reduces the amount of computation.  It downloads nothing and
uses a tiny LLaMA and a ResNet-18 of torchvision, both with random weights.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pruning_lib.cli import main
from pruning_lib.models import loading

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = (ROOT / "book" / "chapters" / "your_model.md").read_text()
LITTLE = {"prune": ["--tokens", "300", "--window", "100"], "compare": ["--tokens", "300", "--tasks", "none"],
          "amp_prune": ["methods=amp", "tasks=none", "tokens=300", "window=100", "prompts=8"],
          "consensus_prune": ["rounds=1", "round_epochs=0", "final_epochs=0", "per_class=4", "test_images=20",
                              "probe_images=20", "image_set=digits", "criterion=cka"]}


def section(name):
    """Return the text below a heading of the chapter."""
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", CHAPTER, re.M | re.S)[1]


def code(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """Return the arguments of every call of ``pruning-lib`` in a text."""
    lines = re.findall(r"^    \.venv/bin/pruning-lib ((?:.*\\\n)*.*)$", text, re.M)
    return [shlex.split(line.replace("\\\n", " ")) for line in lines]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return a working folder with the notebooks, the library and a book of one chapter, which lists the runs."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "pruning_lib", tmp_path / "pruning_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data" / "inputs", tmp_path / "data" / "inputs")
    (tmp_path / "book" / "chapters").mkdir(parents=True)
    intro = "# Mine\n\nA book of my own.\n\n```{include} ../_runs.md\n```\n"
    (tmp_path / "book" / "chapters" / "intro.md").write_text(intro)
    contents = {"format": "jb-book", "root": "chapters/intro"}
    (tmp_path / "book" / "_toc.yml").write_text(yaml.safe_dump(contents, sort_keys=False))
    for name in ("_config.yml", "references.bib"):
        shutil.copyfile(ROOT / "book" / name, tmp_path / "book" / name)
    for name in ("_static", "extensions", "drawings"):
        shutil.copytree(ROOT / "book" / name, tmp_path / "book" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNING_CACHE", str(tmp_path / "cache"))
    return tmp_path


def follow(text, do):
    """Execute the commands named in ``do`` with the options of ``LITTLE``; all of them must occur in this order."""
    done = []
    for arguments in commands(text):
        name = arguments[1] if arguments[0] == "run" else arguments[0]
        if name in do:
            less = LITTLE.get(name, [])
            done.append(name)
            assert main.main([*arguments, *(part for v in less for part in (["-p", v] if "=" in v else [v]))]) == 0
    assert done == do


def test_a_language_model_from_its_folder_to_a_page_in_a_rebuilt_book(here, capsys):
    text = section("A language model")
    make, load, call, steps = code(text)
    exec(make, {})
    follow(text, ["inspect", "prune", "compare", "amp_prune", "book"])
    said = capsys.readouterr().out
    assert "heads that can be removed from every block" in said and "first / second: parameters 0.8" in said
    exec(load, found := {})
    assert found["model"].num_parameters() < 0.85 * loading.load_model("my-llama")[0].num_parameters()
    assert (here / "my-smaller" / "README.md").is_file()
    record = json.loads((here / "build" / "own" / "results" / "amp_prune.json").read_text())
    assert record["parameters"]["model"] == "my-llama" and record["values"]["pruned_parameters"] > 0
    index = Path(said.splitlines()[-1])
    assert "executed/amp_prune.html" in index.read_text() or "amp_prune.html" in index.with_name(
        "chapters").joinpath("intro.html").read_text()
    page = (index.parent / "executed" / "amp_prune.html").read_text()
    assert "my-llama" in page and "<img" in page
    exec(call, pruned := {})
    assert pruned["result"].reached_fraction == pytest.approx(0.2, abs=0.04)  # neurons come in multiples of 32
    exec(steps, {})
    assert AutoModelForCausalLM.from_pretrained("my-smaller-too").num_parameters() == found["model"].num_parameters()


def test_an_image_network_of_torchvisions_from_its_weights_to_a_smaller_folder_and_a_page(here, capsys):
    text = section("An image network")
    make, prune = code(text)
    exec(make, found := {})
    yours = found["yours"].eval()
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found["config"].mean, found["config"].std))
    with torch.no_grad():  # same outputs as torchvision's network, for pixels instead of normalised input
        assert torch.allclose(loading.load_model("my-resnet")[0](pixels), yours((pixels - mean) / std), atol=1e-4)
    follow(text, ["inspect", "consensus_prune"])
    assert "8 blocks; 4 can be removed together" in capsys.readouterr().out
    record = json.loads((here / "build" / "own" / "results" / "consensus_prune.json").read_text())
    assert record["values"]["removed_macs_fraction"] > 0
    exec(prune.replace("epochs=0.5", "epochs=0.05").replace('"test", 200', '"test", 20'), {})
    assert len(loading.load_model("my-smaller-resnet")[0].config.kept_blocks) == 6


@pytest.mark.parametrize("command", ["prune", "evaluate", "compare"])
def test_a_command_for_language_models_says_what_to_do_with_an_image_network(command, here, capsys):
    exec(code(section("An image network"))[0], {})
    arguments = {"prune": ["--model", "my-resnet", "--removed-fraction", "0.2", "--out", "small", "--calibration",
                           "mini_prompts"], "evaluate": ["my-resnet"], "compare": ["my-resnet", "my-resnet"]}[command]
    assert main.main([command, *arguments, "--text", "mini_text"]) == 1
    assert "is an image network" in (said := capsys.readouterr().err) and "consensus_prune" in said
    assert not (here / "small").exists()
