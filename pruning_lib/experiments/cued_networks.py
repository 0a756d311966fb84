"""Networks trained from the start on images with a spurious cue, then pruned on such images.

A cue that is shown to a finished network is hardly learned.  Here it is there from the first step, as in data that a
user has without knowing of it: training, ranking and tuning all see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from pruning_lib._files import digest
from pruning_lib.data import images
from pruning_lib.evaluation import spurious_cues
from pruning_lib.experiments.recorded_networks import RecordedNetwork, pruned_by_each


@dataclass(frozen=True)
class Schedule:
    """Images with a cue, and how long networks learn from them.

    Attributes
    ----------
    image_set : key of ``images.IMAGES``
    cue : key of ``spurious_cues.CUES``
    agreement : probability that the cue tells the class, 0 to 1
    train_images : how many training images; None for all
    epochs : passes over them before the first cut
    rounds : blocks removed one by one
    round_epochs, final_epochs : passes after each cut, and after the last one besides
    per_class : calibration images of each class
    dtype : of the multiplications of training
    """

    image_set: str
    cue: str
    agreement: float
    train_images: int | None
    epochs: float
    rounds: int
    round_epochs: float
    final_epochs: float
    per_class: int = 16
    dtype: str = "float32"


def train_and_prune(criteria: Sequence[str], schedule: Schedule, *, seed: int) -> list[RecordedNetwork]:
    """Return one ResNet-20 per criterion, all from the same dense one; each is made once and cached.

    Parameters
    ----------
    criteria : keys of ``block_ranking.CRITERIA``, or "none" for the dense network, trained as long as the others
    seed : of the weights at the beginning, the cues, and the order of the images
    """
    train = _marked("train", schedule, seed, schedule.train_images)
    marked, classes = _marked("calibration", schedule, seed, None)
    chosen = images.balanced(classes, schedule.per_class, seed=seed)
    scored = marked[chosen], classes[chosen]
    settings = {"with_cue": asdict(schedule), "seed": seed, "torch": torch.__version__,
                "images": digest(train[0].numpy().tobytes() + scored[0].numpy().tobytes())}

    return pruned_by_each(criteria, train, scored, image_set=schedule.image_set,
                          passes=(schedule.epochs, schedule.round_epochs, schedule.final_epochs),
                          rounds=schedule.rounds, seed=seed, settings=settings, of_the_pruned={}, min_blocks=1,
                          augment=False, dtype=schedule.dtype)


def _marked(part: str, schedule: Schedule, seed: int, number: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of one part of a set with the cue of their class, nearly always, and their classes."""
    plain, classes = images.load(schedule.image_set, part, number)
    return spurious_cues.inject_cue(plain, classes, cue=schedule.cue, agreement=schedule.agreement, seed=seed), classes
