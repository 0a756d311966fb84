"""Sources of networks: a name of torchvision or timm, or an import path, that builds one without its weights.

A source is written beside the weights of a pruned network.  A file can only name: builders of the two libraries, called
with plain arguments and never with weights to fetch, and functions that the caller of the reader has allowed by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pruning_lib._extras import extra

LIBRARIES = ("torchvision", "timm", "import")
# arguments that fetch or unpickle weights, or write to disk; they are no part of an architecture
REFUSED = {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
           "cache_dir", "progress"}


@dataclass(frozen=True)
class Source:
    """A builder of networks and its arguments.

    Attributes
    ----------
    library : "torchvision", "timm" or "import"
    name : of the model in that library; for "import" a path "package.module:function"
    arguments : of the builder: numbers, texts, booleans, None, and lists and dicts of them

    Raises
    ------
    ValueError
        for another library, an argument that is not plain, or one that loads weights.
    """

    library: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise ValueError(f"unknown library {self.library!r}; give torchvision:NAME, timm:NAME, or "
                             f"import:package.module:function")
        refused = REFUSED & set(self.arguments)
        if refused:
            raise ValueError(f"{', '.join(sorted(refused))}: a source describes a network without weights; leave this "
                             f"out, the weights are saved from the network itself")
        odd = [key for key, value in self.arguments.items() if not _plain(value)]
        if odd:
            raise ValueError(f"argument {', '.join(odd)} of {self.name} cannot be written to a file; give numbers, "
                             f"texts, booleans, and lists or dicts of them, for example through a function of your own")

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


def parse(text: str, arguments: dict[str, Any]) -> Source:
    """Return the source that ``"library:name"`` names."""
    library, _, name = text.partition(":")
    return Source(library, name, arguments)


def build(source: Source, *, allow_import: Collection[str] = (), weights: bool = True) -> nn.Module:
    """Return the network of a source, with random weights, ready to evaluate.

    Parameters
    ----------
    allow_import : paths "package.module:function" that may be imported and called; importing runs code
    weights : False leaves out most weights (they are on the meta device), to see their names and shapes

    Raises
    ------
    ValueError
        for an unknown name, arguments that the builder does not accept, or an import that is not allowed.
    ImportError
        if the library is not installed.
    """
    make = {"torchvision": _torchvision, "timm": _timm}.get(source.library)
    make = make(source.name) if make else _imported(source.name, allow_import)
    with torch.random.fork_rng(devices=[]), nullcontext() if weights else _EmptyOnMeta():
        try:
            network = make(**source.arguments)
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, AttributeError) as error:
            raise ValueError(f"{source} does not accept the arguments {source.arguments}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{source} returns a {type(network).__name__}; a source has to return a torch.nn.Module")
    return network.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Create no memory for weights; unlike with the meta device, builders can still compute with numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **{**(kwargs or {}), **({"device": "meta"} if function is torch.empty else {})})


def guess(network: nn.Module, prune: Callable[[nn.Module], object]) -> Source | None:
    """Return a torchvision or timm source whose network, after ``prune``, has weights of the same shapes, or None."""
    library = type(network).__module__.partition(".")[0]
    for source in {"torchvision": _torchvision_guesses, "timm": _timm_guesses}.get(library, lambda _: [])(network):
        try:
            other = build(source, weights=False)
            prune(other)
        except (ValueError, ImportError, AttributeError):
            continue
        if type(other) is type(network) and _shapes(other) == _shapes(network):
            return source
    return None


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _torchvision_guesses(network: nn.Module) -> list[Source]:
    with extra("vision"):
        from torchvision import models

    classes = [m.out_features for m in network.modules() if isinstance(m, nn.Linear)]
    home = type(network).__module__
    names = [name for name in models.list_models(models) if models.get_model_builder(name).__module__ == home]
    return [Source("torchvision", name, {"num_classes": classes[-1]}) for name in names if classes]


def _timm_guesses(network: Any) -> list[Source]:
    settings = getattr(network, "pretrained_cfg", None) or {}
    convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if "architecture" not in settings or convolution is None:
        return []
    arguments = {"num_classes": getattr(network, "num_classes", 1000), "in_chans": convolution.in_channels}
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    sized = [{**arguments, "img_size": list(size)}] if size else []
    return [Source("timm", settings["architecture"], given) for given in (*sized, arguments)]


def _torchvision(name: str) -> Any:
    with extra("vision"):
        from torchvision import models

    known = models.list_models(models)
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}; it has {', '.join(known)}")
    return models.get_model_builder(name)


def _timm(name: str) -> Any:
    try:
        timm: Any = importlib.import_module("timm")  # a library of the user's own, which no extra brings
    except ImportError as error:
        raise ImportError(f"the network timm:{name} needs timm; install it with: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() lists those it has")
    return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)


def _imported(path: str, allowed: Collection[str]) -> Any:
    if path not in allowed:
        raise ValueError(f"this network is built by {path!r}, and importing it runs code.  If you trust that function, "
                         f"allow it by name: load_model(folder, allow_import=[{path!r}])")
    module, _, name = path.partition(":")
    try:
        found = inspect.getattr_static(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}; give package.module:function, with the package "
                         f"installed or on PYTHONPATH") from error
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    return isinstance(value, str | int | float | bool | None) or isinstance(value, list) and all(map(_plain, value))
