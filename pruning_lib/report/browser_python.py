"""Python for the reader's browser: the files of Pyodide, taken from a wheel of the package index into the built book.

Pyodide is CPython compiled to WebAssembly (Mozilla Public License 2.0).  The index has it only as a part of the web
client of Flet (Apache 2.0); five files of that wheel are enough, 13 MB.  They are copied, never imported.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from pruning_lib.models.packaged import Wheel, wheel_path

WHEEL = Wheel("flet-web", "1.0.5", "eb246cb6e59d14c63aa20223275184825c7ec28b970a2174619a2d9f00d0e2e7",
              member="flet_web/web/pyodide/")
FILES = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")


def ship(folder: Path) -> Path:
    """Write the files of Pyodide into ``folder``; download their wheel where the cache does not have it.

    Raises
    ------
    ConnectionError
        if the package index is out of reach.
    ValueError
        if the wheel is not the one expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel_path(WHEEL)) as wheel:
        for name in FILES:
            (folder / name).write_bytes(wheel.read(WHEEL.member + name))
    (folder / "LICENSE.txt").write_text("Pyodide, https://github.com/pyodide/pyodide, Mozilla Public License 2.0; "
                                        f"taken from {WHEEL.package} {WHEEL.version} of the package index.\n")
    return folder
