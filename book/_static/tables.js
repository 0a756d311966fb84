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

  // a table or result wider than the page says that it scrolls, has a visible bar and can be reached by keyboard
  function mark(box, name) {
    const wide = box.scrollWidth > box.clientWidth + 1, hint = box.previousElementSibling;
    const marked = hint && hint.classList.contains("scroll-hint");
    box.classList.toggle("scrolls", wide);
    if (wide && !marked) {
      const text = document.createElement("p");
      text.className = "scroll-hint";
      text.textContent = `This ${name} is wider than the page: scroll sideways \u2192`;
      box.before(text);
      Object.entries({ tabindex: 0, role: "region", "aria-label": name }).forEach(([k, v]) => box.setAttribute(k, v));
    } else if (!wide && marked) {
      hint.remove();
      for (const key of ["tabindex", "role", "aria-label"]) box.removeAttribute(key);
    }
  }

  const boxes = [...document.querySelectorAll("main article table")].filter((table) => !table.closest(".highlight"))
    .map((table) => [table.parentElement, "table"]);
  boxes.push(...[...document.querySelectorAll("main .output pre")].map((pre) => [pre, "output"]));
  boxes.push(...[...document.querySelectorAll("main .drawing")].map((drawing) => [drawing, "drawing"]));
  const markAll = () => boxes.forEach(([box, name]) => mark(box, name));
  markAll();
  addEventListener("load", markAll);
  // boxes change after the window does, when a sidebar has moved; a frame later, as marking changes sizes too
  const changed = new ResizeObserver(() => requestAnimationFrame(markAll));
  for (const [box] of boxes) changed.observe(box);
  document.addEventListener("toggle", markAll, true);  // a folded part was opened

  for (const table of document.querySelectorAll(".cards table")) {  // labels of the cells of a card
    const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
    for (const row of table.tBodies[0].rows)
      [...row.cells].forEach((cell, column) => {
        if (!cell.textContent.trim()) cell.classList.add("void");
        else cell.setAttribute("data-label", names[column]);
      });
  }

  for (const table of document.querySelectorAll("main .cell_output table, .cards table")) {
    const plain = table.tHead && table.tBodies.length === 1 && table.tHead.rows.length === 1 &&
      [...table.rows].every((row) => row.cells.length === table.tHead.rows[0].cells.length) &&
      !table.querySelector("[rowspan], [colspan]:not([colspan='1'])");
    if (plain && table.tBodies[0].rows.length > 2) sortable(table);
  }
});

// The side bar of a run's page, which is not in it, stands at the list of all runs.
document.addEventListener("DOMContentLoaded", () => {
  const bar = document.querySelector(".bd-sidebar-primary");
  if (document.querySelector(".run-of"))
    bar?.querySelector("a[href$='chapters/runs.html']")?.closest("li").classList.add("current", "active");
  const here = bar?.querySelector("li.active, li.current");
  if (here) {
    const room = bar.getBoundingClientRect(), place = here.getBoundingClientRect();
    if (place.top < room.top || place.bottom > room.bottom) bar.scrollTop += place.top - room.top - room.height / 3;
  }
});
