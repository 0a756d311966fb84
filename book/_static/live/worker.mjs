// Runs the cells of a page in Python, in a thread of its own, so that a long loop does not stop the page.
import { loadPyodide } from "../pyodide/pyodide.mjs";

const here = (name) => new URL(name, import.meta.url).href;
const python = (async () => {
  const py = await loadPyodide({ indexURL: here("../pyodide/") });
  py.FS.writeFile("small.py", await (await fetch(here("small.py"))).text());
  return py;
})();

onmessage = async ({ data: { cell, code } }) => {
  const lines = [];
  try {
    const py = await python;
    py.setStdout({ batched: (text) => lines.push(text) });
    const globals = py.runPython("{'__name__': '__main__'}");
    await py.runPythonAsync(code, { globals });
    globals.destroy();
    postMessage({ cell, text: lines.join("\n"), failed: false });
  } catch (error) {  // of the traceback only what is about the reader's own code
    const own = error.message.split("\n").filter((line) => line.trim());
    const start = own.findIndex((line) => line.includes('File "<exec>"'));
    postMessage({ cell, text: [...lines, ...own.slice(Math.max(0, start))].join("\n"), failed: true });
  }
};
