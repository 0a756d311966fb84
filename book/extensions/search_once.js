// The builder lists a page once for each of its headings that match. Keep the best entry of a page and order by kind:
// results are shown from the last to the first.
const allResults = Search._performSearch;
Search._performSearch = (...query) => {
  const best = new Map();
  for (const result of allResults(...query)) {
    best.delete(result[0]);
    best.set(result[0], result);
  }
  const kind = (result) => RUNS.has(result[0]) ? 0 : result[0].startsWith("chapters/") ? 2 : 1;
  return [...best.values()].sort((one, other) => kind(one) - kind(other));
};
