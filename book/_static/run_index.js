// The list of all runs gets one choice per column and a box for words. Without this script the table shows every run.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector(".run-index table");
  if (!table) return;
  const rows = [...table.tBodies[0].rows], head = [...table.tHead.rows[0].cells];
  const bar = document.createElement("form"), said = document.createElement("p");
  bar.className = "run-filters";
  said.setAttribute("aria-live", "polite");
  const parts = (row, column) => row.cells[column].textContent.split(/;|,(?=\s)/).map((text) => text.trim());
  const choices = head.map((cell, column) => {
    if (column === 0) return null;
    const known = [...new Set(rows.flatMap((row) => parts(row, column)))].filter(Boolean);
    return labelled(cell.textContent.trim(), "select", (select) => {
      select.append(new Option("all", ""), ...known.sort((a, b) => a.localeCompare(b, "en", { numeric: true })).map((text) => new Option(text, text)));
    });
  });
  const words = labelled("words", "input", (input) => { input.type = "search"; });

  function labelled(text, tag, fill) {
    const label = document.createElement("label"), control = document.createElement(tag);
    fill(control);
    control.name = text;
    label.append(text, control);
    bar.append(label);
    return control;
  }

  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = choices.every((choice, column) => !choice || !choice.value || parts(row, column).includes(choice.value)) &&
        wanted.every((word) => text.includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    said.textContent = `${shown} of ${rows.length} runs`;
  }

  bar.addEventListener("input", show);
  bar.addEventListener("submit", (event) => event.preventDefault());
  table.closest(".run-index").before(bar, said);
  show();
});
