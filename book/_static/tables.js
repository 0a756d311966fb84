// Result tables are sorted by a press on a column's name; a third press restores the order of the page.
document.addEventListener("DOMContentLoaded", () => {
  const rank = (text) => {
    const number = text.replace(/[,\s]/g, "").replace("−", "-").match(/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/i);
    return number ? Number(number[0]) : NaN;
  };

  function sortable(table) {
    const rows = [...table.tBodies[0].rows], head = table.tHead.rows[0];
    [...head.cells].forEach((cell, column) => {
      if (!cell.textContent.trim()) return;
      const button = document.createElement("button");
      button.append(...cell.childNodes);
      cell.append(button);
      button.addEventListener("click", () => {
        const order = { ascending: "descending", descending: "none" }[cell.getAttribute("aria-sort")] || "ascending";
        for (const other of head.cells) other.removeAttribute("aria-sort");
        if (order !== "none") cell.setAttribute("aria-sort", order);
        const text = (row) => row.cells[column].textContent.trim();
        const sign = order === "descending" ? -1 : 1;
        const sorted = order === "none" ? rows : [...rows].sort((a, b) => {
          const [x, y] = [text(a), text(b)], [m, n] = [rank(x), rank(y)];
          if (!x || !y) return (!x) - (!y);  // empty fields stay below
          if (isNaN(m) !== isNaN(n)) return isNaN(m) - isNaN(n);
          return sign * (isNaN(m) ? x.localeCompare(y) : m - n);
        });
        table.tBodies[0].append(...sorted);
      });
    });
  }

  for (const table of document.querySelectorAll("main .cell_output table")) {
    const box = table.parentElement;
    if (box.scrollWidth > box.clientWidth) {  // can be scrolled, so a keyboard has to get there
      Object.entries({ tabindex: 0, role: "region", "aria-label": "table" }).forEach(([k, v]) => box.setAttribute(k, v));
    }
    const plain = table.tHead && table.tBodies.length === 1 && table.tHead.rows.length === 1 &&
      [...table.rows].every((row) => row.cells.length === table.tHead.rows[0].cells.length) &&
      !table.querySelector("[rowspan], [colspan]:not([colspan='1'])");
    if (plain && table.tBodies[0].rows.length > 2) sortable(table);
  }
});
