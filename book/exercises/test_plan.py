import torch
from plan import choose_groups, choose_neurons, neurons_for


def test_the_least_important_neurons_are_chosen_block_by_block():
    importance = torch.tensor([[5.0, 1.0, 4.0, 2.0], [0.1, 9.0, 0.2, 0.3]])
    assert choose_neurons(importance, 2).tolist() == [[1, 3], [0, 2]]
    assert choose_neurons(importance, 0).shape == (2, 0)


def test_a_group_is_removed_with_all_its_queries():
    importance = torch.tensor([[9.0, 0.0, 3.0, 3.0, 7.0, 7.0]])  # means: 4.5, 3, 7
    assert choose_groups(importance, 3, 1).tolist() == [[2, 3]]
    assert choose_groups(importance, 3, 2).tolist() == [[0, 1, 2, 3]]


def test_without_grouping_a_group_is_a_head():
    importance = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose_groups(importance, 8, 3), choose_neurons(importance, 3))


def test_the_fraction_counts_all_parameters():
    assert neurons_for(0.2, 134_515_008, 30, 576) == 519  # the default model of this book, from neurons alone
    assert neurons_for(0.0, 134_515_008, 30, 576) == 0


def test_removed_heads_leave_fewer_neurons_to_remove():
    group = 64 * 576 * (2 * 3 + 2)  # three queries and their share of o_proj, and one key and one value
    assert neurons_for(0.2, 134_515_008, 30, 576, heads_parameters=group) == 348
