import torch
from bures import bures, root

DRAW = torch.Generator().manual_seed(4)


def covariance(features=4):
    a = torch.randn(10, features, generator=DRAW, dtype=torch.float64)
    return a.T @ a / 10


def test_the_root_times_itself_is_the_matrix():
    s = covariance()
    torch.testing.assert_close(root(s) @ root(s), s)
    torch.testing.assert_close(root(s), root(s).T)


def test_in_one_dimension_it_is_the_difference_of_standard_deviations():
    assert abs(bures(torch.tensor([[9.0]]).double(), torch.tensor([[4.0]]).double()) - 1) < 1e-9


def test_of_diagonal_matrices_too():
    s, r = torch.diag(torch.tensor([9.0, 1.0]).double()), torch.diag(torch.tensor([1.0, 4.0]).double())
    assert abs(bures(s, r) - 5**0.5) < 1e-9


def test_a_matrix_is_at_no_distance_from_itself_and_the_order_does_not_matter():
    s, r = covariance(), covariance()
    assert abs(bures(s, s)) < 1e-6 and abs(bures(s, r) - bures(r, s)) < 1e-9


def test_it_is_the_best_match_of_two_roots():
    """Compare with the definition by alignment: min over orthogonal W of the norm of A - B W."""
    s, r = covariance(), covariance()
    a, b = root(s), root(r)
    u, _, v = torch.linalg.svd(b.T @ a)
    assert abs(bures(s, r) - (a - b @ u @ v).norm().item()) < 1e-9


def test_a_turned_cloud_is_further_than_none_and_nearer_than_the_sum_of_sizes():
    s, turn = torch.diag(torch.tensor([4.0, 1.0]).double()), torch.tensor([[0.0, -1], [1, 0]]).double()
    assert abs(bures(s, turn @ s @ turn.T) - 2**0.5) < 1e-9
