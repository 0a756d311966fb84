"""The metrics of Consensus and the sum of ranks in plain Python, for points with two features.

For learning, in a browser: no NumPy, no PyTorch.  The tests of the book compare every function with the library.
A cloud is a list of (x, y); a matrix of two by two is a list of its rows.
"""

from math import acos, cos, pi, sin, sqrt


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def centred(cloud):
    a, b = mean(p[0] for p in cloud), mean(p[1] for p in cloud)
    return [(x - a, y - b) for x, y in cloud]


def product(x, y):
    """Return X'Y."""
    return [[sum(p[i] * q[j] for p, q in zip(x, y)) for j in (0, 1)] for i in (0, 1)]


def times(m, n):
    return [[sum(m[i][k] * n[k][j] for k in (0, 1)) for j in (0, 1)] for i in (0, 1)]


def transposed(m):
    return [[m[0][0], m[1][0]], [m[0][1], m[1][1]]]


def trace(m):
    return m[0][0] + m[1][1]


def det(m):
    return m[0][0] * m[1][1] - m[0][1] * m[1][0]


def squares(m):
    return sum(value ** 2 for row in m for value in row)


def singular_values(m):
    """Return the sum of the singular values; their product is |det|, the sum of their squares is the sum of squares."""
    return sqrt(squares(m) + 2 * abs(det(m)))


def angle(cosine):
    return acos(max(-1, min(1, cosine)))


def cka(x, y):
    x, y = centred(x), centred(y)
    return max(0, 1 - squares(product(x, y)) / sqrt(squares(product(x, x)) * squares(product(y, y))))


def permutation(x, y):
    x, y = centred(x), centred(y)
    (a, b), (c, d) = product(x, y)
    return angle(max(a + d, b + c) / sqrt(squares(x) * squares(y)))


def linear_shape_1(x, y):
    x, y = centred(x), centred(y)
    return angle(singular_values(product(x, y)) / sqrt(squares(x) * squares(y)))


def linear_shape_0(x, y):
    x, y = centred(x), centred(y)
    xx, xy, yy = product(x, x), product(x, y), product(y, y)
    both = trace(times(times(inverse(xx), xy), times(inverse(yy), transposed(xy))))
    return angle(sqrt(both + 2 * abs(det(xy)) / sqrt(det(xx) * det(yy))) / 2)


def inverse(m):
    (a, b), (c, d) = m
    return [[d / det(m), -b / det(m)], [-c / det(m), a / det(m)]]


def wasserstein(x, y):
    one, other = (sorted(value for point in cloud for value in point) for cloud in (x, y))
    return mean(abs(a - b) for a, b in zip(one, other))


def gaussians(cloud, labels):
    """Return mean and covariance of every class."""
    found = []
    for label in sorted(set(labels)):
        part = [point for point, other in zip(cloud, labels) if other == label]
        c = centred(part)
        cov = [[value / (len(part) - 1) for value in row] for row in product(c, c)]
        cov[0][0], cov[1][1] = cov[0][0] + 1e-6, cov[1][1] + 1e-6  # as in the library
        found.append(((mean(p[0] for p in part), mean(p[1] for p in part)), cov))
    return found


def bures(s, r):
    """Return the squared Bures distance between two covariances."""
    return trace(s) + trace(r) - 2 * sqrt(max(0, trace(times(s, r)) + 2 * sqrt(max(0, det(s) * det(r)))))


def gaussian(x, y, labels, alpha):
    """Return the Gaussian distance: try every angle, with and without a reflection, and refine the best one."""
    one, other = gaussians(x, labels), gaussians(y, labels)

    def at(angle, flip):
        turn = [[cos(angle), -sin(angle) * flip], [sin(angle), cos(angle) * flip]]
        total = 0
        for (m, s), (n, r) in zip(one, other):
            moved = [turn[i][0] * n[0] + turn[i][1] * n[1] for i in (0, 1)]
            apart = (m[0] - moved[0]) ** 2 + (m[1] - moved[1]) ** 2
            total += alpha * apart + (2 - alpha) * bures(s, times(times(turn, r), transposed(turn)))
        return total / len(one)

    best, angle, flip = min((at(2 * pi * n / 90, flip), 2 * pi * n / 90, flip) for n in range(90) for flip in (1, -1))
    step = 2 * pi / 90
    while step > 1e-9:
        best, angle = min((at(a, flip), a) for a in (angle - step, angle, angle + step))
        step /= 2
    return sqrt(max(0, best))


METRICS = {
    "cka": lambda x, y, labels: cka(x, y), "gaussian_0": lambda x, y, labels: gaussian(x, y, labels, 0),
    "gaussian_1": lambda x, y, labels: gaussian(x, y, labels, 1),
    "gaussian_2": lambda x, y, labels: gaussian(x, y, labels, 2),
    "permutation": lambda x, y, labels: permutation(x, y), "linear_shape_0": lambda x, y, labels: linear_shape_0(x, y),
    "linear_shape_1": lambda x, y, labels: linear_shape_1(x, y), "wasserstein": lambda x, y, labels: wasserstein(x, y)}


def ranks(column):
    """Return the rank of every value, 0 for the smallest; equal values share the mean of their ranks."""
    return [sum(other < value for other in column) + (column.count(value) - 1) / 2 for value in column]


def rank_sums(table):
    """Return block -> sum of its ranks; ``table`` is block -> distances."""
    columns = [ranks(list(column)) for column in zip(*table.values())]
    return {block: sum(column[row] for column in columns) for row, block in enumerate(table)}
