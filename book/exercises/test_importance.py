import torch
from importance import contribution, head_importance

X = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])  # two tokens, two heads of width 1: the example of the chapter
W = torch.tensor([[1.0, 0.0], [1.0, 3.0]])


def test_contributions_of_the_example():
    added = contribution(X, W, 1)
    assert added.shape == (2, 2, 2)
    assert added[0].tolist() == [[2, 2], [-1, -1]] and added[1].tolist() == [[0, 0], [0, 3]]


def test_contributions_add_up_to_the_output_of_the_projection():
    x, w = torch.randn(5, 12), torch.randn(7, 12)
    torch.testing.assert_close(contribution(x, w, 4).sum(0), x @ w.T)


def test_importance_of_the_example():
    torch.testing.assert_close(head_importance([X], W, 1), torch.tensor([3.0, 1.5]))


def test_positive_and_negative_contributions_do_not_cancel():
    x, w = torch.tensor([[1.0]]), torch.tensor([[3.0], [-4.0]])
    torch.testing.assert_close(head_importance([x], w, 1), torch.tensor([7.0]))


def test_every_prompt_weighs_the_same():
    long = X.repeat(10, 1)  # ten times as many tokens, and the same mean
    short = torch.tensor([[0.0, 4.0]])
    torch.testing.assert_close(head_importance([long, short], W, 1), torch.tensor([1.5, 6.75]))


def test_the_scale_may_move_from_the_weight_to_its_input():
    scale = torch.tensor([10.0, 1.0])
    torch.testing.assert_close(head_importance([X / scale], W * scale, 1), head_importance([X], W, 1))
