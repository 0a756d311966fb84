"""llama.cpp's shared library, from the package xllamacpp, and its quantiser.

That package offers a server; the functions used here are not wrapped, but the library exports them as in ``llama.h``
and ``ggml.h``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pruning_lib._extras import MissingExtra

ROWS_OF_256 = {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14}  # types that are quantised here -> their numbers in ggml.h


@cache
def library() -> Any:
    """Return the shared library of llama.cpp.

    Raises
    ------
    MissingExtra
        when the package xllamacpp is not installed, or its library lacks the functions that are called here.
    """
    spec = find_spec("xllamacpp")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    paths = [Path(folder) / name for folder in folders for name in ("xllamacpp.abi3.so", "xllamacpp.pyd")]
    found = next((ctypes.CDLL(str(path)) for path in paths if path.is_file()), None)
    if found is None or not (hasattr(found, "ggml_quantize_chunk") and hasattr(found, "llama_decode")):
        raise MissingExtra("this needs llama.cpp; install it with: pip install \"pruning-lib[gguf]\"")
    return found


@cache
def quantiser() -> Any:
    """Return the function ``ggml_quantize_chunk`` with its types declared; MissingExtra as in ``library``."""
    function = library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


def quantise(rows: np.ndarray, kind: str) -> np.ndarray:
    """Return ``rows`` (R, P), P a multiple of 256, in a type of ``ROWS_OF_256``: uint8, (R, bytes of a row).

    The numbers are those of the program ``llama-quantize`` without an importance matrix.

    Raises
    ------
    ValueError
        for rows of another length.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    R, P = rows.shape
    if P % 256:
        raise ValueError(f"rows of {P} numbers; {kind} holds multiples of 256")
    found = np.empty((R, P * 4), np.uint8)  # more than any type needs
    size = quantiser()(ROWS_OF_256[kind], rows.ctypes.data, found.ctypes.data, 0, R, P, None)
    return found.ravel()[:size].reshape(R, -1).copy()
