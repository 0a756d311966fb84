// Cells of Python that run in the reader's browser. Without this script a page shows the code and its output.
const liveFolder = new URL("live/", document.currentScript.src);
document.addEventListener("DOMContentLoaded", () => {
  const cells = [...document.querySelectorAll("div.live")];
  if (!cells.length) return;
  let worker = null, waiting = null;

  function start() {
    worker = new Worker(new URL("worker.mjs", liveFolder), { type: "module" });
    worker.addEventListener("message", ({ data }) => done(data.text || "(no output)", data.failed));
    worker.addEventListener("error", () => done(location.protocol === "file:"
      ? "A browser starts Python only from a web server. In the folder of this page run: python -m http.server"
      : "This copy of the book was built without Python for the browser. The code and its output stand here all the same.",
      true));
  }
  function done(text, failed) {
    if (!waiting) return;
    const { output, run, stop } = waiting;
    output.textContent = text;
    output.classList.toggle("failed", failed);
    run.disabled = false;
    stop.hidden = true;
    waiting = null;
  }
  const button = (text, action) => {
    const found = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    found.addEventListener("click", action);
    return found;
  };

  cells.forEach((block, number) => {
    const code = block.querySelector("pre").textContent.trimEnd(), area = document.createElement("textarea");
    const output = block.nextElementSibling.querySelector("pre"), bar = document.createElement("div");
    Object.assign(area, { value: code, rows: code.split("\n").length + 1, spellcheck: false });
    area.setAttribute("aria-label", `Python code, cell ${number + 1}`);
    output.setAttribute("aria-live", "polite");
    const run = button("Run", () => {
      if (waiting) return;
      if (!worker) start();
      output.textContent = "Running. The first run starts Python, which takes some seconds.";
      run.disabled = true;
      stop.hidden = false;
      waiting = { output, run, stop };
      worker.postMessage({ cell: number, code: area.value });
    });
    const stop = button("Stop", () => { worker.terminate(); worker = null; done("Stopped.", true); });
    stop.hidden = true;
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run.click(); }
    });
    bar.className = "live-bar";
    bar.append(run, stop, button("Restore", () => { area.value = code; area.focus(); }));
    block.replaceChildren(area, bar);
    block.classList.add("alive");
  });
});
