"""Describes a table of block copies: what planners make and the native module executes."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np


class ElementType(enum.IntEnum):
    """Codes of ``src_dtype`` and ``dst_dtype``. Equal codes copy bits; unequal ones cast, among F32, F16 and BF16."""

    F32 = 0
    F16 = 1
    BF16 = 2
    RAW8 = 3
    RAW16 = 4
    RAW32 = 5
    RAW64 = 6

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return (4, 2, 2, 1, 2, 4, 8)[self]


#: One block copy. Addresses, counts of rows and of elements a row, bytes from a row to the next on each side, the index
#: of the source's process, and the codes of `ElementType`. Same layout as `BlockCopy` in csrc/copy.hpp.
BLOCK_COPY_DTYPE: np.dtype[Any] = np.dtype(
    [
        ("src", "<u8"),
        ("dst", "<u8"),
        ("rows", "<u8"),
        ("row_elems", "<u8"),
        ("src_pitch", "<i8"),
        ("dst_pitch", "<i8"),
        ("source", "<u4"),
        ("src_dtype", "<u2"),
        ("dst_dtype", "<u2"),
    ]
)
