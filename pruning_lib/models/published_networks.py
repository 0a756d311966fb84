"""The ResNet-56 networks that the authors of the Consensus and CKA papers published, by name.

The authors publish Keras files.  They are not fetched here: a Keras file can hold code.  As safetensors in a folder
``published-resnet56``, with the names below, they load like any other network; ``HOW_TO_GET`` says where the authors'
files are and how the weights have to be named.

A name ends with the number of blocks that are gone.  ``consensus-00`` is the whole network; the one that the CKA
networks come from is not published.

References
----------
.. [1] Mugnaini et al., "Layer Pruning with Consensus: A Triple-Win Solution", 2024, arXiv 2411.14345.
.. [2] Pons et al., "Effective Layer Pruning Through Similarity Metric Perspective", ICPR 2024, arXiv 2405.17081.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from pruning_lib._files import cache
from pruning_lib.models import image_networks
from pruning_lib.models.image_networks import ImageConfig
from pruning_lib.models.keras_resnet import blocks_of

FOLDER = "published-resnet56"
MEAN = "pixel_mean"  # the file beside the networks, and its one tensor, (3, 32, 32)
REMOVED = {"consensus": (0, 1, 3, 5, 8, 10, 12, 15, 18, 20, 21), "cka": (1, 3, 5, 8, 10, 12, 15, 18, 20)}
AUTHORS_FILES = {
    "consensus": "github.com/CarolinaTavaresDuarte/Consensus-Layer-Pruning, commit 1ac34468: ResNet56++.h5 (whole) and "
                 "pruned_models/ResNet56/*_iterations[k].h5 (k + 1 blocks gone)",
    "cka": "github.com/IanPons/CKA-Layer-Pruning, commit 01ae0929: "
           "pruned_models/ResNet56/ResNet56_CKA_p[1]_iterations[k].h5"}
HOW_TO_GET = """The authors' files (MIT licence) are Keras files:
  {files}
Store the weights of each as <name>.safetensors, float32, with the names of pruning_lib.models.keras_resnet: conv1, bn1,
layer{{1,2,3}}.{{i}}.{{conv1,bn1,conv2,bn2}}, layer{{2,3}}.0.shortcut, linear; kernels as PyTorch lays them out; and the
mean of each pixel over the 50,000 training images, in [0, 1], as {mean}.safetensors. Put them into the folder {folder}
under PRUNING_MODELS, or into {cache}"""


@dataclass(frozen=True)
class PublishedNetwork:
    """One network that its authors published as a Keras file."""

    criterion: str  # key of ``REMOVED``: the paper
    removed_blocks: int
    licence: str = "MIT"

    @property
    def file(self) -> str:
        """Return the name of its file, without the ending."""
        return f"{self.criterion}-{self.removed_blocks:02}"

    @property
    def name(self) -> str:
        """Return its name in the table of models."""
        return f"{FOLDER}/{self.file}"


NETWORKS = {entry.name: entry for criterion, counts in REMOVED.items()
            for entry in (PublishedNetwork(criterion, count) for count in counts)}


def folder_of(entry: PublishedNetwork) -> Path:
    """Return the folder that ``image_networks.read`` takes, made from the converted files on first use.

    Raises
    ------
    ConnectionError
        when nobody has put the files there, with the address of the authors' files.
    ValueError
        for a file of another network.
    """
    folder = cache() / "models" / entry.name
    if not (folder / "config.json").exists():
        image_networks.write_new(_converted(entry), folder)
    return folder


def _converted(entry: PublishedNetwork) -> nn.Module:
    """Return the network from its file and the file of pixel means."""
    weights, mean = load_file(_found(entry, entry.file)), load_file(_found(entry, MEAN))[MEAN]
    blocks = blocks_of(weights)
    if sum(blocks) != 27 - entry.removed_blocks:
        raise ValueError(f"{entry.file}.safetensors has {sum(blocks)} blocks, wanted {27 - entry.removed_blocks}; the "
                         f"number in its name says how many of 27 are gone")
    config = ImageConfig("keras_resnet", {"blocks": list(blocks)}, mean=(0.0,) * 3, std=(1.0,) * 3)
    return image_networks.with_weights(config, {**weights, "pixel_mean.mean": mean})


def _found(entry: PublishedNetwork, file: str) -> Path:
    """Return the place of a file; ConnectionError with the authors' address where there is none."""
    places = [Path(os.environ["PRUNING_MODELS"])] if os.environ.get("PRUNING_MODELS") else []
    for place in (*places, cache() / "models"):
        if (path := place / FOLDER / f"{file}.safetensors").is_file():
            return path
    how = HOW_TO_GET.format(files=AUTHORS_FILES[entry.criterion], mean=MEAN, folder=FOLDER,
                            cache=cache() / "models" / FOLDER)
    raise ConnectionError(f"{file}.safetensors is not there; this package cannot fetch it.\n{how}")
