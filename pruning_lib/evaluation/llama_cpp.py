"""Measure GGUF files in llama.cpp: losses of text windows, speed in processor time, memory.

Every measurement runs in a process of its own, so that memory is that of one file and a crash of the native code is an
error here.  Speeds of several files are measured in turn in one process.  Order of this file: losses · speed · memory ·
the other process · llama.cpp's functions.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pruning_lib.evaluation.window_losses import WindowLosses
from pruning_lib.models import llama_library

DEFAULTS = (512, 2048, 512, 1)  # first four numbers of llama.cpp's default context: tells whether its layout is known


@dataclass(frozen=True)
class Times:
    """Processor seconds of one file, one number per repetition.

    Attributes
    ----------
    prefill_s : to read the prompt
    token_s : per token written after it
    """

    prefill_s: list[float]
    token_s: list[float]


def windows(tokenizer: Any, texts: Sequence[str], *, window: int, tokens: int) -> tuple[list[list[int]], int]:
    """Return the token windows that ``quality.perplexity`` reads with stride = window, and the predicted characters.

    Parameters
    ----------
    texts : joined by blank lines
    window, tokens : as there; a BOS token is one of the ``window`` tokens, and begins every window
    """
    encoded = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"][:tokens], encoded["offset_mapping"]
    with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    first = [tokenizer.bos_token_id] if with_bos else []
    room = window - len(first)
    starts = [start for start in range(0, len(ids), room) if start + 1 < len(ids)]
    ends = [min(start + room, len(ids)) for start in starts]
    characters = sum(spans[end - 1][1] - spans[start + 1][0] for start, end in zip(starts, ends, strict=True))
    return [first + ids[start:end] for start, end in zip(starts, ends, strict=True)], characters


def losses(path: str | Path, windows: Sequence[Sequence[int]], *, bos: bool = False, threads: int = 1
           ) -> WindowLosses:
    """Return the summed losses of token windows in llama.cpp, each read without context.

    Parameters
    ----------
    path : GGUF file
    windows : token numbers
    bos : whether windows begin with a BOS token; the token behind it is not predicted either, as in ``perplexity``
    threads : of llama.cpp

    Raises
    ------
    RuntimeError
        when llama.cpp cannot read the file, or its process died.
    """
    found = _in_own_process("losses", path=str(path), windows=[list(map(int, w)) for w in windows], skip=int(bos),
                            threads=threads)
    return WindowLosses(np.array(found), np.array([len(w) - 1 - bos for w in windows]))


def speed(paths: Mapping[str, str | Path], *, prompt_tokens: int = 128, new_tokens: int = 32, repetitions: int = 9,
          threads: int = 1) -> dict[str, Times]:
    """Measure how long files take to read a prompt and to write tokens after it, in turn within each repetition.

    Processor time, not time by the clock, so that other processes on the machine count little.

    Raises
    ------
    ValueError
        for fewer than 6 repetitions, which give no interval, or less than one token.
    RuntimeError
        as in ``losses``.
    """
    if repetitions < 6 or prompt_tokens < 1 or new_tokens < 1:
        raise ValueError(f"prompt_tokens={prompt_tokens}, new_tokens={new_tokens}, repetitions={repetitions}; "
                         f"give at least 1, 1 and 6")
    found = _in_own_process("speed", paths={name: str(path) for name, path in paths.items()}, threads=threads,
                            prompt_tokens=prompt_tokens, new_tokens=new_tokens, repetitions=repetitions)
    return {name: Times(*times) for name, times in found.items()}


def memory_bytes(path: str | Path, *, prompt_tokens: int = 128, new_tokens: int = 32, threads: int = 1) -> int | None:
    """Return the rise of resident memory of a process that opens a file, reads a prompt and writes after it.

    The pages of the file that were read count.  None where the system does not report it (only Linux does).
    """
    found: int | None = _in_own_process("memory", path=str(path), prompt_tokens=prompt_tokens, new_tokens=new_tokens,
                                        threads=threads)
    return found


def bytes_per_token(path: str | Path, *, context: int = 0) -> int:
    """Return the bytes of weights, and of keys and values of ``context`` tokens in float16, that a written token reads.

    An embedding that is not tied to the output is not read as a whole and does not count.
    """
    from pruning_lib.models.gguf_tokenizer import package

    reader = package().GGUFReader(path)
    arch = reader.get_field("general.architecture").contents()
    blocks, groups, width = (int(reader.get_field(f"{arch}.{key}").contents()) for key in
                             ("block_count", "attention.head_count_kv", "attention.key_length"))
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values()) + 2 * 2 * blocks * groups * width * context


# --- the other process ------------------------------------------------------------------------------------------------


def _in_own_process(task: str, **arguments: Any) -> Any:
    llama_library.library()  # a missing package is reported here, not from the other process
    work = json.dumps({"task": task, **arguments})
    done = subprocess.run([sys.executable, "-c", "from pruning_lib.evaluation import llama_cpp; llama_cpp._serve()"],
                          input=work, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    if done.returncode or not answers:
        raise RuntimeError(f"llama.cpp failed ({task}, exit {done.returncode}): {done.stderr[-800:]}")
    return json.loads(answers[0].removeprefix("ANSWER"))


def _serve() -> None:
    """Run the task from standard input and print its result as the line ``ANSWER...``."""
    work = json.loads(sys.stdin.read())
    tasks: dict[str, Callable[..., Any]] = {"losses": _losses, "speed": _speed, "memory": _memory}
    result = tasks[work.pop("task")](**work)
    print("ANSWER" + json.dumps(result))


def _losses(path: str, windows: list[list[int]], skip: int, threads: int) -> list[float]:
    model = _Model(path, context=max(map(len, windows)), threads=threads)
    found = []
    for ids in windows:
        model.forget()
        logits = model.read(ids)[skip:-1].astype(np.float64)  # (T - 1 - skip, V)
        highest = logits.max(1)
        log_sum = np.log(np.exp(logits - highest[:, None]).sum(1)) + highest
        found.append(float((log_sum - logits[np.arange(len(logits)), ids[skip + 1:]]).sum()))
    return found


def _speed(paths: dict[str, str], prompt_tokens: int, new_tokens: int, repetitions: int, threads: int
           ) -> dict[str, tuple[list[float], list[float]]]:
    models = {name: _Model(path, context=prompt_tokens + new_tokens, threads=threads) for name, path in paths.items()}
    seen: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for i in range(repetitions + 1):
        for name, model in models.items():
            times = _generate(model, prompt_tokens, new_tokens)
            for kept, took in zip(seen[name], times, strict=True):
                kept += [took] if i else []  # the first one warms up
    return seen


def _memory(path: str, prompt_tokens: int, new_tokens: int, threads: int) -> int | None:
    before = _resident("VmRSS")
    _generate(_Model(path, context=prompt_tokens + new_tokens, threads=threads), prompt_tokens, new_tokens)
    highest = _resident("VmHWM")
    return None if before is None or highest is None else highest - before


def _generate(model: _Model, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Return processor seconds of reading a prompt of fixed tokens, and per token written."""
    model.forget()
    start = time.process_time()
    token = int(model.read([10 + i % 200 for i in range(prompt_tokens)], last_only=True)[-1].argmax())
    read = time.process_time()
    for _ in range(new_tokens):
        token = int(model.read([token], last_only=True)[-1].argmax())
    return read - start, (time.process_time() - read) / new_tokens


def _resident(key: str) -> int | None:
    """Return resident memory in bytes, now (``"VmRSS"``) or at most so far (``"VmHWM"``)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


# --- llama.cpp's functions --------------------------------------------------------------------------------------------


class _Parameters(ctypes.Structure):
    """Room for a structure of parameters by value, larger than llama.cpp's own; only its first numbers are written."""

    _fields_ = [("numbers", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embedding", ctypes.c_void_p),
                ("position", ctypes.POINTER(ctypes.c_int32)), ("sequences", ctypes.POINTER(ctypes.c_int32)),
                ("sequence", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("output", ctypes.POINTER(ctypes.c_int8))]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # name in llama.h -> result, arguments
    "llama_backend_init": (None, []), "llama_log_set": (None, [ctypes.c_void_p, ctypes.c_void_p]),
    "llama_model_default_params": (_Parameters, []), "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Parameters]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Parameters]),
    "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_batch_init": (_Batch, [ctypes.c_int32] * 3), "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool])}


class _Model:
    """An open GGUF file with the keys and values of one sequence."""

    def __init__(self, path: str, *, context: int, threads: int) -> None:
        self.library = llama_library.library()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.library.llama_backend_init()
        options = self.library.llama_context_default_params()
        if tuple(options.numbers[:4]) != DEFAULTS:
            raise RuntimeError(f"the context of this llama.cpp begins with {list(options.numbers[:4])}, not "
                               f"{DEFAULTS}; install xllamacpp 2026.10")
        options.numbers[0] = options.numbers[1] = options.numbers[2] = context  # tokens in all, a call, a pass
        model = self.library.llama_model_load_from_file(path.encode(), self.library.llama_model_default_params())
        self.context = model and self.library.llama_init_from_model(model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        self.library.llama_set_n_threads(self.context, threads, threads)
        self.V = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(model))
        self.batch = self.library.llama_batch_init(context, 0, 1)
        self.position = 0

    def forget(self) -> None:
        """Clear the keys and values."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.position = 0

    def read(self, ids: Sequence[int], *, last_only: bool = False) -> np.ndarray:
        """Return logits behind the next tokens ``ids``, (T, V), or (1, V) with ``last_only``, until the next call."""
        for i, number in enumerate(ids):
            self.batch.token[i], self.batch.position[i] = number, self.position + i
            self.batch.sequences[i], self.batch.sequence[i][0] = 1, 0
            self.batch.output[i] = not last_only or i == len(ids) - 1
        self.batch.n = len(ids)
        if self.library.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama.cpp could not read {len(ids)} tokens at position {self.position}")
        self.position += len(ids)
        rows = 1 if last_only else len(ids)
        return np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (rows, self.V))
