"""Types of the weights in a GGUF file: which one a matrix gets in each format, and the numbers in that type.

The K formats mix types, as llama.cpp's program ``llama-quantize`` does [1]_: the embeddings and some of the value and
output projections get more bits.  Types with a K hold rows of multiples of 256 numbers.  A matrix with other rows falls
back on the next larger type that holds multiples of 32, and on float16 where the rows are no multiple of 32 either.

References
----------
.. [1] llama.cpp, ``src/llama-quant.cpp``, functions ``llama_tensor_get_type`` and ``use_more_bits``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruning_lib.models import gguf_tokenizer, llama_library


@dataclass(frozen=True)
class Format:
    """Types of the matrices in one format, by their names in the package gguf.

    Attributes
    ----------
    file_type : name of the format in the header of the file
    matrix : type of a matrix
    more : type of those value projections and output projections of MLPs that get more bits
    embedding : type of the matrix that computes the logits
    """

    file_type: str
    matrix: str
    more: str
    embedding: str


FORMATS = {
    "f32": Format("ALL_F32", "F32", "F32", "F32"),
    "f16": Format("MOSTLY_F16", "F16", "F16", "F16"),
    "bf16": Format("MOSTLY_BF16", "BF16", "BF16", "BF16"),
    "q8_0": Format("MOSTLY_Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "q6_k": Format("MOSTLY_Q6_K", "Q6_K", "Q6_K", "Q6_K"),
    "q5_k_m": Format("MOSTLY_Q5_K_M", "Q5_K", "Q6_K", "Q6_K"),
    "q4_k_m": Format("MOSTLY_Q4_K_M", "Q4_K", "Q6_K", "Q6_K"),
}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def type_of(name: str, columns: int, format: str, *, blocks: int, tied: bool) -> str:
    """Return the type of one matrix.

    Parameters
    ----------
    name : of the tensor in the file, as ``blk.3.ffn_down.weight``
    columns : length of a row
    format : key of ``FORMATS``
    blocks : how many the model has
    tied : the embeddings compute the logits too
    """
    found = FORMATS[format]
    place = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
    if name == ("token_embd.weight" if tied else "output.weight"):
        kind = found.embedding
    elif place and _more_bits(int(place[1]), blocks):
        kind = found.more
    else:
        kind = found.matrix
    if kind in _FALLBACK and columns % 256:
        kind = _FALLBACK[kind]
    return "F16" if kind.startswith("Q") and columns % 32 else kind


def _more_bits(block: int, blocks: int) -> bool:
    """Return whether the matrices of a block get more bits: the first and last eighth, and every third in between."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2


def quantise(rows: np.ndarray, kind: str) -> np.ndarray:
    """Return float32 ``rows`` in a type, as the writer of the package gguf takes them."""
    gguf: Any = gguf_tokenizer.package()
    if kind in llama_library.ROWS_OF_256:
        return llama_library.quantise(rows, kind)
    return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
