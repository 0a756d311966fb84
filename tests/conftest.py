"""Shared fixtures: tiny models with random weights and biases, a tiny tokenizer, and no internet access.

Everything runs on one thread and offline; only tests marked ``model`` need the default model (``PRUNING_CACHE``).
"""

import gc
import os
import subprocess

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from pruning_lib.models import families, image_networks, loading, surgery
from pruning_lib.models.block_plan import BlockPlan
from pruning_lib.pruning import selection

torch.set_num_threads(1)
disable_progress_bar()

# files whose tests take longest, begun first so that no worker is left with one alone at the end
LONGEST = ("test_reader", "test_dask_cluster", "test_install", "test_local", "test_readings", "test_bad_input",
           "test_quality", "test_your_model", "test_reconstruction", "test_prune", "test_described_networks",
           "test_offload")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
    gc.freeze()  # else every full collection goes through all modules and all tests


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_data_of_the_user(monkeypatch):
    """Remove PRUNING_DATA; tests that need it set it."""
    monkeypatch.delenv("PRUNING_DATA", raising=False)
    monkeypatch.delenv("PRUNING_MODELS", raising=False)


@pytest.fixture(params=list(families.FAMILIES))
def family(request):
    """Return the name of each family in turn, so that a new entry of the table is tested at once."""
    return request.param


def build(config, *, seed=0, dtype=torch.float32):
    """Return a model without zero parameters, so that a dropped bias or a wrong slice changes the logits."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.25 * noise)
    return model


@pytest.fixture(scope="session")
def tiny():
    """Return ``tiny(family, dtype=, seed=, <config field>=..., heads=, groups=, ...)``, tiny models of width 48."""

    def make(name, *, dtype=torch.float32, seed=0, fields=None, **sizes):
        config = families.tiny(name, **{"width": 48, "vocabulary": 128, **sizes})
        for field, value in (fields or {}).items():
            setattr(config, field, value)
        return build(config, seed=seed, dtype=dtype)

    return make


def image_network(name, *, seed=0, mean=(0.4, 0.5, 0.3), std=(0.2, 0.3, 0.25), **arguments):
    """Return an image network without parameters or statistics of 0 or 1, so that a dropped one is noticed."""
    network = image_networks.build(image_networks.ImageConfig(name, arguments, mean, std), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, middle in ((module.weight, 0.4), (module.bias, 0), (module.running_mean, 0),
                                   (module.running_var, 1)):
                tensor.data.copy_(middle + 0.2 * torch.rand(tensor.shape, generator=generator) - 0.1)
    return network


def pixels(size=32, *, channels=3, dtype=torch.float32):
    """Return three random images with values in [0, 1]."""
    return torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture(scope="session")
def random_importance():
    """Return ``random_importance(model, seed=)``, which returns distinct scores."""

    def make(model, *, seed=0):
        s, generator = families.sizes(model), torch.Generator().manual_seed(seed)
        return selection.Importance(torch.rand(len(s.head_blocks), s.heads, generator=generator),
                                torch.rand(len(s.neuron_blocks), s.neurons, generator=generator), {"seed": seed})

    return make


@pytest.fixture
def llama2_7b():
    """Return LLaMA-2-7B of the AMP paper without weights (on the meta device)."""
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=32, intermediate_size=11008, tie_word_embeddings=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def tokenizer():
    """Return a tokenizer with one token per ASCII character, after four special tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(special + characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def smollm():
    """Return the default model and its tokenizer, for tests marked ``model``; tests must not change it."""
    return loading.load_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def short_smollm(smollm):
    """Return the first ten blocks of the default model and its tokenizer, for tests that need trained weights only."""
    model, tokenizer = smollm
    return surgery.remove(model, BlockPlan.of(model, [f"model.layers.{i}" for i in range(10, 30)])), tokenizer


@pytest.fixture
def prompts():
    """Return the token ids of four prompts of different lengths, one of a single token."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (5, 17, 1, 9)]


def hooks_of(model):
    """Return all hooks on the modules of ``model``."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here; as root in a container with CAP_SYS_ADMIN this test runs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


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
    """Return ``call(*arguments)`` -> (exit status, standard output, standard error) of a command."""
    from pruning_lib.cli import main

    def run(*arguments):
        status = main.main([*map(str, arguments)])
        return status, *capsys.readouterr()

    return run
