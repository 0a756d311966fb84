"""The C functions of llama.cpp, from the shared library in the package xllamacpp.

That package offers a server; the functions below are not wrapped, but its library exports them under the names of
``llama.h`` and ``ggml.h``.  Order of this file: library · Context · quantisation of rows.

Settings of a model or a context are C structs that change with every release.  Only the first three numbers of a
context (its length and its two batch sizes) are set here; they have kept their places.  A struct is passed as a block
of bytes that is larger than it: the callee reads as much as it knows.
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
_int, _ints = ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)


class _Settings(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [("n_tokens", _int), ("token", _ints), ("embd", ctypes.c_void_p), ("pos", _ints), ("n_seq_id", _ints),
                ("seq_id", ctypes.POINTER(_ints)), ("logits", ctypes.POINTER(ctypes.c_int8))]


_handle = ctypes.c_void_p
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
# function -> types of its result and of its arguments
_FUNCTIONS = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
    "llama_model_default_params": (_Settings, []),
    "llama_context_default_params": (_Settings, []),
    "llama_model_load_from_file": (_handle, [ctypes.c_char_p, _Settings]),
    "llama_model_get_vocab": (_handle, [_handle]),
    "llama_model_free": (None, [_handle]),
    "llama_vocab_n_tokens": (_int, [_handle]),
    "llama_init_from_model": (_handle, [_handle, _Settings]),
    "llama_n_ctx": (ctypes.c_uint32, [_handle]),
    "llama_set_n_threads": (None, [_handle, _int, _int]),
    "llama_get_memory": (_handle, [_handle]),
    "llama_memory_clear": (None, [_handle, ctypes.c_bool]),
    "llama_batch_init": (_Batch, [_int, _int, _int]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (_int, [_handle, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_handle]),
    "llama_free": (None, [_handle]),
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                                              ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]),
}
_silence = _LOG(lambda level, text, data: None)


@cache
def library() -> Any:
    """Return the shared library, its functions declared and its log silenced.

    Raises
    ------
    MissingExtra
        when the package xllamacpp is not installed, or its library lacks one of the functions.
    """
    spec = find_spec("xllamacpp")
    files = sorted(Path(folder) / name for folder in (spec.submodule_search_locations or () if spec else ())
                   for name in ("xllamacpp.abi3.so", "xllamacpp.pyd"))
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise MissingExtra("xllamacpp is not installed and this needs it; install it with: pip install xllamacpp")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _FUNCTIONS.items():
        if not hasattr(loaded, name):
            raise MissingExtra(f"the installed xllamacpp does not export {name}; install version "
                               f"2026.10 of it")
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.llama_log_set(_silence, None)
    loaded.llama_backend_init()
    return loaded


class Context:
    """A GGUF model loaded in llama.cpp, and the state of one sequence; close it, or use it in a ``with`` statement.

    Parameters
    ----------
    path : of the GGUF file
    tokens : longest sequence, prompt and answer together
    threads : of a forward pass

    Raises
    ------
    ValueError
        for a file that llama.cpp does not load, or a library with other structs than those of this module.
    """

    def __init__(self, path: str | Path, tokens: int, *, threads: int = 1) -> None:
        self.lib = library()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        settings = self.lib.llama_context_default_params()
        for place in range(3):  # length of the context, batch, physical batch
            settings.numbers[place] = tokens
        self.context = self.lib.llama_init_from_model(self.model, settings)
        if not self.context or self.lib.llama_n_ctx(self.context) < tokens:
            raise ValueError(f"llama.cpp made no context of {tokens} tokens for {path}; this version of xllamacpp may "
                             f"be another than 2026.10")
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.batch, self.length = self.lib.llama_batch_init(tokens, 0, 1), 0

    def restart(self) -> None:
        """Forget the sequence."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.length = 0

    def decode(self, tokens: Any, *, every: bool = False) -> np.ndarray:
        """Append tokens to the sequence; return the logits behind the last one, (1, V), or behind ``every`` one, (T, V).

        Raises
        ------
        RuntimeError
            when llama.cpp refuses the tokens.
        """
        T = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = int(token), self.length + i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
            self.batch.logits[i] = every or i == T - 1
        self.batch.n_tokens = T
        status = self.lib.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama.cpp returned {status} for {T} tokens at position {self.length}")
        self.length += T
        found = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (T if every else 1, self.vocabulary)).copy()

    def close(self) -> None:
        """Free the memory of model and context."""
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def __enter__(self) -> Context:
        """Return the context itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Free the memory."""
        self.close()


def quantise(rows: np.ndarray, kind: str) -> np.ndarray:
    """Return ``rows`` (R, P), P a multiple of 256, in a type of ``ROWS_OF_256``: uint8, (R, bytes of a row).

    The function is ``ggml_quantize_chunk``, as in the program ``llama-quantize`` without an importance matrix.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    R, P = rows.shape
    if P % 256:
        raise ValueError(f"rows of {P} numbers; {kind} holds multiples of 256")
    found = np.empty((R, P * 4), np.uint8)  # more than any type needs
    size = library().ggml_quantize_chunk(ROWS_OF_256[kind], rows.ctypes.data, found.ctypes.data, 0, R, P, None)
    return found.ravel()[:size].reshape(R, -1).copy()
