import torch
from reconstruction import reconstruct

from pruning_lib.pruning import least_squares

DRAW = torch.Generator().manual_seed(1)
MIX = torch.randn(6, 6, generator=DRAW, dtype=torch.float64)
X = torch.randn(200, 6, generator=DRAW, dtype=torch.float64) @ MIX  # six inputs that depend on each other
W = torch.randn(3, 6, generator=DRAW, dtype=torch.float64)


def error(weight):
    return ((X @ (weight - W).T) ** 2).sum()


def test_removed_columns_are_zero_and_the_given_weight_is_unchanged():
    before = W.clone()
    assert (reconstruct(X, W, [1, 4], 0.1)[:, [1, 4]] == 0).all() and torch.equal(W, before)


def test_without_removed_columns_nothing_changes():
    torch.testing.assert_close(reconstruct(X, W, [], 0.1), W)


def test_a_copy_of_a_column_replaces_it_without_loss():
    x = torch.cat([X, X[:, :1]], 1)  # column 6 is a copy of column 0
    w = torch.cat([W, W[:, :1] + 1], 1)
    torch.testing.assert_close(x @ reconstruct(x, w, [6], 0.0).T, x @ w.T)


def test_the_error_is_the_smallest_there_is():
    best = reconstruct(X, W, [1, 4], 0.0)
    cut = W.clone()
    cut[:, [1, 4]] = 0
    assert error(best) < error(cut)
    for _ in range(20):
        step = 1e-3 * torch.randn(3, 6, generator=DRAW, dtype=torch.float64)
        step[:, [1, 4]] = 0
        assert error(best + step) >= error(best)


def test_a_large_ridge_leaves_the_kept_columns_alone():
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(reconstruct(X, W, [1, 4], 1e9)[:, kept], W[:, kept], atol=1e-6, rtol=0)


def test_the_library_has_the_same_solution():
    layer = torch.nn.Linear(6, 3, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(W)
    sums = least_squares.GramAccumulator(layer)
    sums.add(X)
    wanted, _ = least_squares.solve(layer, torch.tensor([1, 4]), sums.gram(), 0.3)
    torch.testing.assert_close(reconstruct(X, W, [1, 4], 0.3), wanted)
