// The eight distances of Consensus for clouds of two features, and the sum of ranks. With two features every formula has
// a closed form, except for the rotation of the Gaussian distances, for which all angles are tried.
// The tests compare each function with pruning_lib on the same points.
// Clouds are arrays of [x, y]; labels are class numbers. Matrices are [a, b, c, d], row by row.
window.pruningMetrics = (() => {
  const sum = (values) => values.reduce((a, b) => a + b, 0), mean = (values) => sum(values) / values.length;
  const middle = (cloud) => [mean(cloud.map((p) => p[0])), mean(cloud.map((p) => p[1]))];
  const centred = (cloud) => { const [a, b] = middle(cloud); return cloud.map((p) => [p[0] - a, p[1] - b]); };
  const product = (x, y) => [0, 1].flatMap((i) => [0, 1].map((j) => sum(x.map((p, n) => p[i] * y[n][j]))));  // X'Y
  const squares = (m) => sum(m.map((v) => v * v)), det = ([a, b, c, d]) => a * d - b * c;
  const trace = ([a, , , d]) => a + d;
  const nuclear = (m) => Math.sqrt(squares(m) + 2 * Math.abs(det(m)));  // sum of the singular values
  const times = ([a, b, c, d], [e, f, g, h]) => [a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h];
  const turned = ([a, b, c, d]) => [a, c, b, d];
  const angle = (cosine) => Math.acos(Math.min(1, Math.max(-1, cosine)));
  const size = (cloud) => Math.sqrt(sum(cloud.map((p) => p[0] ** 2 + p[1] ** 2)));

  function cka(x, y) {
    const [u, v] = [centred(x), centred(y)];
    return Math.max(0, 1 - squares(product(u, v)) / Math.sqrt(squares(product(u, u)) * squares(product(v, v))));
  }
  function permutation(x, y) {
    const [u, v] = [centred(x), centred(y)], [a, b, c, d] = product(u, v);
    return angle(Math.max(a + d, b + c) / size(u) / size(v));
  }
  function linearShape1(x, y) {
    const [u, v] = [centred(x), centred(y)];
    return angle(nuclear(product(u, v)) / size(u) / size(v));
  }
  function linearShape0(x, y) {  // canonical correlations are the singular values of the whitened product
    const [u, v] = [centred(x), centred(y)], [xx, xy, yy] = [product(u, u), product(u, v), product(v, v)];
    if (det(xx) < 1e-12 * squares(xx) || det(yy) < 1e-12 * squares(yy)) return NaN;  // the points lie on a line
    const inverse = (m) => [m[3], -m[1], -m[2], m[0]].map((value) => value / det(m));
    const all = trace(times(times(inverse(xx), xy), times(inverse(yy), turned(xy))));
    return angle(Math.sqrt(all + 2 * Math.abs(det(xy)) / Math.sqrt(det(xx) * det(yy))) / 2);
  }
  function wasserstein(x, y) {
    const [u, v] = [x, y].map((cloud) => cloud.flat().sort((a, b) => a - b));
    return mean(u.map((value, n) => Math.abs(value - v[n])));
  }

  // mean and covariance of every class, as (m, S) with the jitter of the library
  const gaussians = (cloud, labels) => [...new Set(labels)].map((label) => {
    const part = cloud.filter((_, n) => labels[n] === label), c = centred(part);
    const cov = product(c, c).map((value, n) => value / (part.length - 1) + (n % 3 ? 0 : 1e-6));
    return { m: middle(part), cov };
  });
  function apart(one, other, T, alpha) {  // squared distance of one class after the rotation T
    const [a, b, c, d] = T, [p, q] = other.m, cov = times(times(T, other.cov), turned(T));
    const between = (one.m[0] - a * p - b * q) ** 2 + (one.m[1] - c * p - d * q) ** 2;
    const shared = trace(times(one.cov, cov)) + 2 * Math.sqrt(Math.max(0, det(one.cov) * det(cov)));
    return alpha * between + (2 - alpha) * (trace(one.cov) + trace(cov) - 2 * Math.sqrt(Math.max(0, shared)));
  }
  function gaussian(x, y, labels, alpha) {
    const [one, other] = [gaussians(x, labels), gaussians(y, labels)], steps = 360;
    const at = (angle, flip) => {
      const [c, s] = [Math.cos(angle), Math.sin(angle)];
      return mean(one.map((cloud, n) => apart(cloud, other[n], [c, -s * flip, s, c * flip], alpha)));
    };
    let best = Infinity;
    for (const flip of [1, -1]) {
      const values = [...Array(steps).keys()].map((n) => at((2 * Math.PI * n) / steps, flip));
      values.forEach((value, n) => {  // every valley of the curve is followed to its bottom
        if (value > values[(n + 1) % steps] || value > values[(n + steps - 1) % steps]) return;
        let [low, high] = [n - 1, n + 1].map((m) => (2 * Math.PI * m) / steps);
        for (let k = 0; k < 60; k++) {
          const [l, h] = [low + (high - low) / 3, high - (high - low) / 3];
          if (at(l, flip) < at(h, flip)) high = h; else low = l;
        }
        best = Math.min(best, at((low + high) / 2, flip));
      });
    }
    return Math.sqrt(Math.max(0, best));
  }

  const METRICS = {
    cka, gaussian_0: (x, y, labels) => gaussian(x, y, labels, 0), gaussian_1: (x, y, labels) => gaussian(x, y, labels, 1),
    gaussian_2: (x, y, labels) => gaussian(x, y, labels, 2), permutation, linear_shape_0: linearShape0,
    linear_shape_1: linearShape1, wasserstein,
  };
  const distances = (x, y, labels) => Object.fromEntries(
    Object.entries(METRICS).map(([name, metric]) => [name, metric(x, y, labels)]));

  // rank of every value in its column, 0 for the smallest; equal values share the mean of their ranks
  const ranks = (column) => column.map((value) =>
    column.filter((other) => other < value).length + (column.filter((other) => other === value).length - 1) / 2);
  function rankSums(rows) {  // rows: a list of distances per block
    const columns = rows[0].map((_, column) => ranks(rows.map((row) => row[column])));
    return rows.map((_, row) => sum(columns.map((column) => column[row])));
  }
  return { METRICS, distances, ranks, rankSums };
})();
