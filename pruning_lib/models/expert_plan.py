"""The plan of experts and of neurons of experts to remove from a model.  Cutting is in ``expert_surgery``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pruning_lib.models.plan import check_indices


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of the experts of one model.

    Attributes
    ----------
    blocks : numbers of the blocks with experts, Lx of them
    experts, neurons : E experts in each of these blocks, M neurons in each of them
    plain : for every block of the model, neurons of the ordinary MLP whose size the same config field states (a shared
        expert, or the MLP of a block without experts); 0 where there is none
    expert_parameters : of one expert, its row of the router included
    neuron_parameters : of one neuron of one expert
    plain_parameters : of one neuron of an ordinary MLP, per block
    parameters : of the whole model
    """

    blocks: tuple[int, ...]
    experts: int
    neurons: int
    plain: tuple[int, ...]
    expert_parameters: int
    neuron_parameters: int
    plain_parameters: tuple[int, ...]
    parameters: int

    def removed_parameters(self, experts: int, neurons: int) -> int:
        """Return the number of parameters of so many experts per block and so many neurons of each other expert."""
        inside = len(self.blocks) * (self.experts - experts) * neurons * self.neuron_parameters
        plain = sum(self.plain_removed(i, neurons) * per for i, per in enumerate(self.plain_parameters))
        return len(self.blocks) * experts * self.expert_parameters + inside + plain

    def plain_removed(self, block: int, neurons: int) -> int:
        """Return the number of neurons to remove from the ordinary MLP of a block with so many of every expert."""
        return self.plain[block] // self.neurons * neurons


@dataclass(frozen=True)
class ExpertPlan:
    """The experts to remove, and the neurons to remove from the others: the same number in every expert.

    Attributes
    ----------
    experts : (Lx, e) numbers of the removed experts
    neurons : (Lx, E, m) numbers of the removed neurons of every expert; those of a removed expert do not count
    plain : for every block of the model, numbers (k*m,) of the removed neurons of its ordinary MLP
    sizes : of the model the plan was made for
    """

    experts: Tensor
    neurons: Tensor
    plain: tuple[Tensor, ...]
    sizes: ExpertSizes

    def __post_init__(self) -> None:
        s, m = self.sizes, self.neurons.shape[-1]
        check_indices("experts", self.experts, (len(s.blocks),), s.experts)
        check_indices("neurons", self.neurons, (len(s.blocks), s.experts), s.neurons)
        for i, places in enumerate(self.plain):
            if len(places) != s.plain_removed(i, m):
                raise ValueError(f"plan.plain[{i}]: {s.plain_removed(i, m)} neurons of the ordinary MLP of block {i} "
                                 f"have to be removed with {m} of every expert, got {len(places)}")
            if len(places):
                check_indices(f"plain[{i}]", places, (), s.plain[i])

    @property
    def kept(self) -> dict[str, int]:
        """Return the numbers afterwards: experts of a block, neurons of an expert."""
        return {"experts": self.sizes.experts - self.experts.shape[1],
                "neurons": self.sizes.neurons - self.neurons.shape[-1]}

    @property
    def removed_parameters(self) -> int:
        """Return the exact number of removed parameters."""
        return self.sizes.removed_parameters(self.experts.shape[1], self.neurons.shape[-1])

    @property
    def removed_fraction(self) -> float:
        """Return the removed fraction of all parameters of the model, exactly."""
        return self.removed_parameters / self.sizes.parameters

    def __str__(self) -> str:
        s, kept = self.sizes, self.kept
        return (f"removes {self.removed_fraction:.4%} of {s.parameters:,} parameters: each of {len(s.blocks)} blocks "
                f"with experts keeps {kept['experts']} of {s.experts} experts, each with {kept['neurons']} of "
                f"{s.neurons} neurons")
