// Figures to play with. Each page holds a finished figure; this script adds the controls and draws other states.
document.addEventListener("DOMContentLoaded", () => {
  const number = (value) => Number.isNaN(value) ? "undefined" : value >= 1e6 ? `${(value / 1e6).toFixed(1)} million`
    : value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(value >= 10 ? 1 : value >= 0.1 ? 2 : 3);
  const dataOf = (figure) => JSON.parse(figure.querySelector("script").textContent);

  // perplexity by removed fraction, as bars on a logarithmic axis that starts at 10
  function perplexity(figure) {
    const { percent, ways } = dataOf(figure), slider = figure.querySelector("input"), bars = figure.querySelector(".bars");
    const scale = (value) => Math.log10(value / 10), all = Object.values(ways).flat().filter((value) => value !== null);
    const most = Math.max(...all.map(scale));
    function show() {
      const place = Number(slider.value), said = `${percent[place]} %`;
      figure.querySelector("output").textContent = said;
      slider.setAttribute("aria-valuetext", `${percent[place]} percent removed`);
      bars.replaceChildren(...Object.entries(ways).map(([way, values]) => {
        const line = document.createElement("p"), bar = document.createElement("span"), value = values[place];
        bar.className = "bar";
        bar.style.width = value === null ? 0 : `${(48 * scale(value)) / most}%`;
        line.append(Object.assign(document.createElement("span"), { className: "name", textContent: way }), bar,
          value === null ? "not measured" : number(value));
        return line;
      }));
      for (const row of figure.querySelectorAll("tr"))
        [...row.cells].forEach((cell, column) => cell.classList.toggle("here", column === place + 1));
    }
    slider.addEventListener("input", show);
    show();
  }

  // a cloud that is dragged, and its distances to the first one
  function cloud(figure) {
    const { x, y: start, far, labels, wide, unit } = dataOf(figure), svg = figure.querySelector("svg");
    const moved = [...svg.querySelectorAll(".moved")], links = [...svg.querySelectorAll(".link")];
    const kind = figure.querySelector("select"), said = figure.querySelector(".said");
    let y = start.map((point) => [...point]), marked = 0, held = null;
    const at = ([a, b]) => [wide / 2 + unit * a, wide / 2 - unit * b].map((value) => value.toFixed(1));
    const bound = (value) => Math.min(8, Math.max(-8, value));

    function show(text) {
      y = y.map((point) => point.map(bound));
      moved.forEach((mark, n) => {
        mark.setAttribute("transform", `translate(${at(y[n]).join(" ")})`);
        mark.classList.toggle("marked", n === marked);
        links[n].setAttribute("d", `M${at(x[n]).join(" ")}L${at(y[n]).join(" ")}`);
      });
      for (const [name, value] of Object.entries(window.pruningMetrics.distances(x, y, labels))) {
        const row = figure.querySelector(`[data-metric=${name}]`), share = Math.min(1, Math.max(0, value / far[name]));
        row.cells[1].textContent = number(value);
        row.querySelector(".share span").style.width = `${Math.round(100 * (share || 0))}%`;
        row.classList.toggle("ignored", value < 1e-3 * far[name]);
      }
      if (text) said.textContent = text;
    }
    const group = () => [...y.keys()].filter((n) => kind.value === "all" || n === marked ||
      (kind.value === "class" && labels[n] === labels[marked]));
    function move(dx, dy) {
      for (const n of group()) y[n] = [y[n][0] + dx, y[n][1] + dy];
    }
    const each = (change) => { y = y.map(change); };
    const [c, s] = [Math.cos(Math.PI / 6), Math.sin(Math.PI / 6)];
    const changes = {
      turn: ["Turned by 30°.", () => each(([a, b]) => [c * a - s * b, s * a + c * b])],
      double: ["Twice as large.", () => each(([a, b]) => [2 * a, 2 * b])],
      shift: ["Shifted by 1 to the right and upwards.", () => each(([a, b]) => [a + 1, b + 1])],
      stretch: ["Stretched along the first feature.", () => each(([a, b]) => [1.5 * a, 0.6 * b])],
      rename: ["The two features have changed places.", () => each(([a, b]) => [b, a])],
      shuffle: ["The features of two images of different classes are swapped.", () => { [y[0], y[1]] = [y[1], y[0]]; }],
      reset: ["Nothing is changed: every distance is 0.", () => { y = x.map((point) => [...point]); }],
    };
    figure.addEventListener("click", (event) => {
      const change = changes[event.target.dataset?.change];
      if (change) { change[1](); show(change[0]); }
    });
    const place = (event) => {  // in units of the features
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      return [(at.x - wide / 2) / unit, (wide / 2 - at.y) / unit];
    };
    svg.addEventListener("pointerdown", (event) => {
      if (!moved.includes(event.target)) return;
      [marked, held] = [moved.indexOf(event.target), place(event)];
      svg.setPointerCapture(event.pointerId);
      show();
    });
    svg.addEventListener("pointermove", (event) => {
      if (!held) return;
      const now = place(event);
      move(now[0] - held[0], now[1] - held[1]);
      held = now;
      show("Dragged.");
    });
    for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { held = null; });
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("role", "application");
    svg.setAttribute("aria-label", "Cloud of points. Arrow keys move the marked point, Page Up and Page Down mark another.");
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-0.2, 0], ArrowRight: [0.2, 0], ArrowUp: [0, 0.2], ArrowDown: [0, -0.2] }[event.key];
      const turn = { PageUp: -1, PageDown: 1 }[event.key];
      if (!step && !turn) return;
      event.preventDefault();
      if (step) move(...step); else marked = (marked + turn + y.length) % y.length;
      show(`Point ${marked + 1} of class ${labels[marked] + 1} at ${y[marked].map((v) => v.toFixed(1)).join(", ")}.`);
    });
    show();
  }

  // ranks as votes: distances are typed, metrics are switched off
  function votes(figure) {
    const table = figure.querySelector("table"), rows = [...table.tBodies[0].rows];
    const columns = [...table.tHead.rows[0].cells].slice(1, -1);
    const inputs = rows.map((row) => [...row.cells].slice(1, -1).map((cell, column) => {
      const input = document.createElement("input"), value = cell.querySelector(".value");
      Object.assign(input, { type: "number", step: "any", value: value.textContent });
      input.setAttribute("aria-label", `distance of block ${row.cells[0].textContent}, ${columns[column].textContent}`);
      value.replaceWith(input);
      return input;
    }));
    const switches = columns.map((cell) => {
      const label = document.createElement("label"), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", checked: true });
      label.append(box, ` ${cell.textContent}`);
      cell.replaceChildren(label);
      return box;
    });
    function show() {
      const { ranks, rankSums } = window.pruningMetrics, used = switches.flatMap((box, n) => (box.checked ? [n] : []));
      const values = inputs.map((line) => line.map((input) => Number(input.value)));
      const sums = used.length ? rankSums(values.map((line) => used.map((n) => line[n]))) : rows.map(() => 0);
      columns.forEach((_, column) => ranks(values.map((line) => line[column])).forEach((rank, n) => {
        const cell = rows[n].cells[column + 1];
        cell.querySelector(".rank").textContent = rank;
        cell.classList.toggle("off", !used.includes(column));
      }));
      const least = Math.min(...sums), first = sums.indexOf(least);
      const tied = rows.filter((_, n) => sums[n] === least).map((row) => row.cells[0].textContent);
      rows.forEach((row, n) => {
        row.cells[columns.length + 1].textContent = sums[n];
        row.classList.toggle("first", n === first && used.length > 0);
      });
      figure.querySelector(".said").textContent = !used.length ? "No metric votes." : tied.length > 1
        ? `Blocks ${tied.join(" and ")} have the lowest sum, ${least}; the earlier one, ${tied[0]}, is removed first.`
        : `Block ${tied[0]} is removed first: its ranks add up to ${least}.`;
    }
    figure.addEventListener("input", show);
    show();
  }

  for (const figure of document.querySelectorAll(".widget")) {
    figure.classList.add("alive");
    ({ perplexity, cloud, votes })[figure.dataset.widget](figure);
  }
});
