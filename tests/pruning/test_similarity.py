"""Every distance has the properties of its entry, and agrees with known closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import orthogonal_procrustes

from pruning_lib.pruning import gaussian_alignment, sides, similarity
from pruning_lib.pruning.similarity import METRICS

N, P = 60, 5
KEYS = list(METRICS)


def draw(seed, *, n=N, p=P):
    """Return class clouds that differ in place and shape."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    spread = torch.rand(3, p, generator=generator, dtype=torch.float64) + 0.3
    place = torch.randn(3, p, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, p, generator=generator, dtype=torch.float64)
    mix = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return (place[labels] + spread[labels] * noise) @ mix, labels


def turn(p=P, seed=0):
    noise = torch.randn(p, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def distance(key, x, y, labels):
    return METRICS[key].distance(x, y, labels)


MOVES = {
    "rotation": lambda x: x @ turn(x.shape[1], 5),
    "permutation": lambda x: x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))],
    "scale": lambda x: 2.5 * x,
    "translation": lambda x: x + torch.arange(1.0, 1 + x.shape[1], dtype=x.dtype),
    "linear": lambda x: x @ (turn(x.shape[1], 6) + 2 * torch.diag(torch.arange(1.0, 1 + x.shape[1], dtype=x.dtype))),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_representation_is_at_no_distance_from_itself(key):
    x, labels = draw(0)
    assert distance(key, x, x, labels) == pytest.approx(0, abs=2e-6)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_directions_are_equally_far_and_the_order_of_samples_does_not_matter(key, seed):
    (x, labels), (y, _) = draw(seed), draw(seed + 100)
    there = distance(key, x, y, labels)
    assert there > 0.01
    assert METRICS[key].symmetric and distance(key, y, x, labels) == pytest.approx(there, rel=1e-3)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    assert distance(key, x[order], y[order], labels[order]) == pytest.approx(there, rel=1e-6)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("key", KEYS)
def test_what_a_metric_claims_to_forgive_it_forgives_and_nothing_else(key, move):
    (x, labels), (y, _) = draw(0), draw(7)
    before, after = distance(key, x, y, labels), distance(key, x, MOVES[move](y), labels)
    if move in METRICS[key].invariances:
        assert after == pytest.approx(before, rel=2e-3)
    else:
        assert abs(after - before) > 1e-3 * before


@pytest.mark.parametrize("key", [k for k in KEYS if METRICS[k].triangle])
def test_no_way_round_is_shorter(key):
    for seed in range(6):
        (x, labels), (y, _), (z, _) = draw(seed), draw(seed + 20), draw(seed + 40)
        xy, yz, xz = (distance(key, a, b, labels) for a, b in ((x, y), (y, z), (x, z)))
        assert xz <= (xy + yz) * (1 + 1e-6)


def test_many_at_once_gives_the_numbers_of_each_pair_whatever_the_width():
    x, labels = draw(0)
    others = [draw(1)[0], draw(2, p=7)[0], draw(3, p=3)[0]]
    found = similarity.distances(x, others, labels)
    assert list(found) == KEYS
    for key in KEYS:
        assert found[key].tolist() == pytest.approx([distance(key, x, y, labels) for y in others], rel=1e-9)


def test_cka_is_the_alignment_of_the_gram_matrices():
    (x, _), (y, _) = draw(0), draw(1, p=8)
    centre = torch.eye(N, dtype=torch.float64) - 1 / N
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert similarity.cka_distance(x, y) == pytest.approx(1 - ((k * m).sum() / (k.norm() * m.norm())).item())


def test_whitened_shapes_are_apart_by_the_mean_canonical_correlation():
    (x, _), (y, _) = draw(0), draw(1)
    bases = [torch.linalg.qr(side - side.mean(0))[0] for side in (x, y)]
    correlations = torch.linalg.svdvals(bases[0].T @ bases[1])
    assert similarity.linear_shape_distance(x, y, alpha=0) == pytest.approx(math.acos(correlations.mean()))


def test_rotated_shapes_are_apart_by_procrustes():
    (x, _), (y, _) = draw(0), draw(1)
    a, b = ((side - side.mean(0)) / (side - side.mean(0)).norm() for side in (x, y))
    turned, _ = orthogonal_procrustes(b.numpy(), a.numpy())
    wanted = math.acos((a.numpy() * (b.numpy() @ turned)).sum())
    assert similarity.linear_shape_distance(x, y, alpha=1) == pytest.approx(wanted)


def test_the_best_matching_is_the_best_of_all():
    (x, _), (y, _) = draw(0), draw(1)
    a, b = ((side - side.mean(0)) / (side - side.mean(0)).norm() for side in (x, y))
    best = max((a * b[:, list(p)]).sum().item() for p in itertools.permutations(range(P)))
    assert similarity.permutation_distance(x, y) == pytest.approx(math.acos(best))


@pytest.mark.parametrize("p", [P, 3])
def test_wasserstein_is_scipys(p):
    (x, _), (y, _) = draw(0), draw(1, p=p)
    wanted = stats.wasserstein_distance(x.flatten().numpy(), y.flatten().numpy())
    assert similarity.wasserstein_distance(x, y) == pytest.approx(wanted)


def test_means_alone_are_matched_by_procrustes():
    (x, labels), (y, _) = draw(0), draw(1)
    a, b = (torch.stack([side[labels == c].mean(0) for c in range(3)]).numpy() for side in (x, y))
    turned, _ = orthogonal_procrustes(b, a)
    wanted = math.sqrt(2 * np.square(a - b @ turned).sum(1).mean())
    assert similarity.gaussian_distance(x, y, labels, alpha=2) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(4))
def test_one_cloud_is_turned_into_another_by_its_axes(seed):
    """Reach a known global minimum: with one class, the best rotation pairs the axes by length."""
    (x, _), (y, _) = draw(seed), draw(seed + 50)
    labels, jitter = torch.zeros(N, dtype=torch.long), (1e-6, 0.5)[seed % 2]
    roots = [torch.linalg.eigvalsh(torch.cov(side.T) + jitter * torch.eye(P, dtype=torch.float64)).sqrt()
             for side in (x, y)]
    wanted = math.sqrt(2) * (roots[0] - roots[1]).norm().item()
    assert similarity.gaussian_distance(x, y, labels, alpha=0, jitter=jitter) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_hidden_rotation_is_found(alpha):
    x, labels = draw(0, n=300, p=8)
    assert similarity.gaussian_distance(x, x @ turn(8), labels, alpha=alpha) < 1e-3


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_minimum_kept_is_as_good_as_that_of_many_more_starts(alpha):
    for seed in range(3):
        (x, labels), (y, _) = draw(seed), draw(seed + 70)
        found = similarity.gaussian_distance(x, y, labels, alpha=alpha)
        thorough = similarity.gaussian_distance(x, y, labels, alpha=alpha, starts=600, seed=9)
        assert found <= thorough * (1 + 1e-3)


def test_hard_alignments_are_searched_from_many_starts_and_the_same_in_both_directions():
    """Compare many classes of unrelated shape: a single start ends in a worse minimum, different for each direction."""
    better = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(240) % 12
        x, y = (torch.einsum("np,npq->nq", torch.randn(240, 10, generator=generator, dtype=torch.float64),
                             torch.randn(12, 10, 10, generator=generator, dtype=torch.float64)[labels].matrix_exp())
                for _ in range(2))
        there, back = (similarity.gaussian_distance(a, b, labels, alpha=0) for a, b in ((x, y), (y, x)))
        assert there == pytest.approx(back, rel=2e-3)
        few = similarity.gaussian_distance(x, y, labels, alpha=0, starts=0)
        assert there <= few * (1 + 1e-6)
        better.append(few / there)
    assert max(better) > 1.003


@pytest.mark.parametrize("key", KEYS)
def test_dead_features_and_constant_representations_have_a_distance(key):
    x, labels = draw(0)
    dead = torch.cat([x, torch.zeros(N, 2, dtype=x.dtype)], 1)
    assert distance(key, x, dead, labels) == pytest.approx(0, abs=2e-6) or key == "wasserstein"
    constant = torch.ones_like(x)
    assert distance(key, constant, constant, labels) == pytest.approx(0, abs=2e-6)
    assert math.isfinite(distance(key, x, constant, labels))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda x: x[0], "give"), (lambda x: x.long(), "float"), (lambda x: x[:1], "at least 2 samples"),
    (lambda x: torch.full_like(x, math.nan), "NaN"), (lambda x: x[:-1], "same samples")])
def test_what_is_no_representation_is_refused(spoil, message):
    x, labels = draw(0)
    for key in KEYS:
        with pytest.raises(ValueError, match=message):
            distance(key, x, spoil(x), labels)


def test_labels_and_classes_that_do_not_serve_are_refused():
    (x, labels), (y, _) = draw(0), draw(1)
    with pytest.raises(ValueError, match="needs labels"):
        similarity.distances(x, [y], metrics=["gaussian_1"])
    with pytest.raises(ValueError, match=f"{N} integers"):
        similarity.gaussian_distance(x, y, labels[:-1], alpha=1)
    alone = labels.clone()
    alone[0] = 8
    with pytest.raises(ValueError, match="class 8 has a single sample"):
        similarity.gaussian_distance(x, y, alone, alpha=1)
    assert similarity.gaussian_distance(x, y, alone, alpha=2) > 0
    with pytest.raises(ValueError, match="more samples than features"):
        similarity.linear_shape_distance(x[:5], y[:5], alpha=0)
    for alpha in (-0.1, 2.1):
        with pytest.raises(ValueError, match="alpha"):
            similarity.gaussian_distance(x, y, labels, alpha=alpha)


# --- fewer samples than features --------------------------------------------------------------------------------------


def wide(seed, *, n=40, p=90, near=None):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(4, p, generator=generator, dtype=torch.float64)[torch.arange(n) % 4]
    x = base + torch.randn(n, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, p, generator=generator, dtype=torch.float64) + 0.3 * torch.randn(n, p, generator=generator,
                                                                            dtype=torch.float64)
    return x if near is None else near + 0.2 * x


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("jitter", [0.0, 1e-6, 0.3])
def test_in_the_span_of_the_samples_an_alignment_has_the_value_it_has_among_all_features(alpha, jitter):
    """Any alignment, also bad ones: the formula for few samples against the plain one with P x P roots."""
    x, y, labels = wide(0), wide(1), torch.arange(40) % 4
    one, other = sides.sides(x, y, labels, jitter=jitter)
    inside = one.in_span, other.in_span
    r, P = inside[0].raw.shape[1], x.shape[1]
    assert r == inside[1].raw.shape[1] == 40
    bases = [torch.linalg.lstsq(side.raw, full).solution for side, full in zip(inside, (x, y), strict=True)]  # (r, P)
    T = turn(r, 3)
    completed = [torch.linalg.qr(torch.cat([basis.T, torch.randn(P, P - r, dtype=torch.float64)], 1))[0]
                 for basis in bases]
    for basis, whole in zip(bases, completed, strict=True):
        whole[:, :r] = basis.T
    bend = torch.eye(P, dtype=torch.float64)
    bend[:r, :r] = T
    full = completed[0] @ bend @ completed[1].T  # the same alignment among all features
    small = gaussian_alignment._bures(*inside, T)
    turned = full @ other.roots @ full.T
    slow = torch.stack([s.square().sum() + t.square().sum() - 2 * torch.linalg.svdvals(s @ t).sum()
                        for s, t in zip(one.roots, turned, strict=True)])
    torch.testing.assert_close(small, slow, rtol=1e-6, atol=1e-8)
    means = (inside[0].means - inside[1].means @ T.T).square().sum()
    assert means.item() == pytest.approx((one.means - other.means @ full.T).square().sum().item())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_search_among_all_features_finds_nothing_better_than_the_one_in_the_span(alpha):
    x = wide(0, n=24, p=40)
    y, labels = wide(1, n=24, p=40, near=x), torch.arange(24) % 4
    found = similarity.gaussian_distance(x, y, labels, alpha=alpha)
    one, other = sides.sides(x, y, labels)
    slow = gaussian_alignment._compare(one, other, alpha * one.means.T @ other.means, alpha, 2, 0)
    assert found == pytest.approx(slow, rel=1e-4) and found <= slow * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_one_wide_cloud_is_turned_into_another_by_its_axes(seed):
    """The global minimum is known: axes paired by length."""
    x, y, labels = wide(seed), wide(seed + 9), torch.zeros(40, dtype=torch.long)
    roots = [torch.linalg.eigvalsh(torch.cov(side.T) + 1e-6 * torch.eye(90, dtype=torch.float64)).clamp(min=0).sqrt()
             for side in (x, y)]
    wanted = math.sqrt(2) * (roots[0] - roots[1]).norm().item()
    assert similarity.gaussian_distance(x, y, labels, alpha=0) == pytest.approx(wanted, rel=1e-6)


def test_means_of_wide_clouds_are_matched_as_among_all_features():
    x, y, labels = wide(0), wide(1), torch.arange(40) % 4
    one, other = sides.sides(x, y, labels)
    T = sides.polar(one.means.T @ other.means)[0]
    wanted = math.sqrt(2 * (one.means - other.means @ T.T).square().sum(1).mean().item())
    assert similarity.gaussian_distance(x, y, labels, alpha=2) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("key", KEYS)
def test_wide_representations_keep_their_properties(key):
    if METRICS[key].needs_samples:
        return
    x, labels = wide(0), torch.arange(40) % 4
    y = torch.cat([wide(1, near=x), torch.ones(40, 3, dtype=torch.float64)], 1)  # also of another width
    assert distance(key, x, x, labels) == pytest.approx(0, abs=2e-6)
    there = distance(key, x, y, labels)
    assert distance(key, y, x, labels) == pytest.approx(there, rel=1e-3)
    if "rotation" in METRICS[key].invariances:
        assert distance(key, x, y @ turn(93), labels) == pytest.approx(there, rel=2e-3)
    assert math.isfinite(distance(key, x, torch.zeros_like(x), labels))


def test_the_expected_cost_names_every_metric_of_the_paper_and_sees_the_span(monkeypatch):
    monkeypatch.setattr(similarity, "_product_rate", lambda: 1e10)
    all_features, few_samples = (similarity.expected_seconds(N, 512, 10) for N in (513, 128))
    assert list(all_features) == list(similarity.PAPER_METRICS) and all(all_features.values())
    assert all_features["gaussian_0"] > 20 * few_samples["gaussian_0"] > few_samples["cka"]
    assert all(similarity.expected_seconds(100, 10, 2, list(METRICS)).values())  # every entry states its cost


@pytest.mark.parametrize("form", [
    lambda y: y[:, None], lambda y: torch.nn.functional.one_hot(y), lambda y: y.float(), lambda y: y.int(),
    lambda y: torch.nn.functional.one_hot(y).double()])
def test_labels_may_be_columns_one_hot_or_floats(form):
    (x, labels), (y, _) = draw(0), draw(1)
    assert similarity.gaussian_distance(x, y, form(labels), alpha=2) == similarity.gaussian_distance(
        x, y, labels, alpha=2)
