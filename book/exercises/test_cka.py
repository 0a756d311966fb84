import torch
from cka import cka_distance

from pruning_lib.pruning import similarity

DRAW = torch.Generator().manual_seed(2)
X, Y = (torch.randn(40, features, generator=DRAW, dtype=torch.float64) for features in (5, 7))


def test_a_representation_is_at_no_distance_from_itself():
    assert abs(cka_distance(X, X)) < 1e-12


def test_rotation_scale_and_shift_are_forgiven():
    turn = torch.linalg.qr(torch.randn(5, 5, generator=DRAW, dtype=torch.float64))[0]
    assert abs(cka_distance(X, 3 * X @ turn + 7)) < 1e-12


def test_other_linear_maps_are_not_forgiven():
    assert cka_distance(X, X * torch.tensor([10.0, 1, 1, 1, 1])) > 0.05


def test_unrelated_columns_are_at_distance_one():
    x = torch.tensor([[1.0], [1], [-1], [-1]])
    y = torch.tensor([[1.0], [-1], [1], [-1]])
    assert abs(cka_distance(x, y) - 1) < 1e-12


def test_the_library_has_the_same_number():
    assert abs(cka_distance(X, Y) - similarity.cka_distance(X, Y)) < 1e-10
    assert abs(cka_distance(X, Y) - cka_distance(Y, X)) < 1e-12
