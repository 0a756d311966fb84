import torch
from cut import cut_groups, cut_neurons

C, M, H, G, D = 6, 8, 6, 3, 2
DRAW = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


def mlp(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def attention(x, q, k, v, o, groups):
    """The attention of transformers: every key/value head is repeated for a run of query heads."""
    T, heads = len(x), len(q) // D
    queries, keys, values = ((x @ w.T).view(T, -1, D).transpose(0, 1) for w in (q, k, v))
    keys, values = (y.repeat_interleave(heads // groups, 0) for y in (keys, values))
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    pays = (queries @ keys.mT / D**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return (pays @ values).transpose(0, 1).reshape(T, -1) @ o.T


def test_shapes_after_neurons_are_removed():
    gate, up, down = cut_neurons(random(M, C), random(M, C), random(C, M), [1, 6])
    assert gate.shape == up.shape == (M - 2, C) and down.shape == (C, M - 2)


def test_removing_neurons_equals_silencing_them():
    gate, up, down, x, removed = random(M, C), random(M, C), random(C, M), random(5, C), [0, 3, 7]
    silent = down.clone()
    silent[:, removed] = 0
    torch.testing.assert_close(mlp(x, *cut_neurons(gate, up, down, removed)), mlp(x, gate, up, silent))


def test_removing_a_group_equals_silencing_its_queries():
    q, k, v, o, x = random(H * D, C), random(G * D, C), random(G * D, C), random(C, H * D), random(5, C)
    for removed in ([0], [1], [0, 2]):
        silent = o.clone()
        for g in removed:
            silent[:, g * 2 * D:(g + 1) * 2 * D] = 0  # two query heads per group
        cut = cut_groups(q, k, v, o, removed, G)
        assert [len(part) for part in cut] == [(G - len(removed)) * n for n in (2 * D, D, D)] + [C]
        torch.testing.assert_close(attention(x, *cut, G - len(removed)), attention(x, q, k, v, silent, G))


def test_the_given_matrices_are_unchanged():
    parts = [random(M, C), random(M, C), random(C, M)]
    before = [part.clone() for part in parts]
    cut_neurons(*parts, [2])
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
