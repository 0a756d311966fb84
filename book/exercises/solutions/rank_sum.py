"""Solution of exercise 6."""


def ranks(values):
    """Return the rank of each value; equal values share their mean rank."""
    smaller = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    return [below + (same - 1) / 2 for below, same in zip(smaller, equal, strict=True)]


def removal_order(scores):
    """Return the names of the blocks by the sum of their ranks."""
    names = list(next(iter(scores.values())))
    table = [ranks([by_block[name] for name in names]) for by_block in scores.values()]
    sums = dict(zip(names, map(sum, zip(*table, strict=True)), strict=True))
    return sorted(names, key=sums.get)  # sorting is stable: equal sums keep their order
