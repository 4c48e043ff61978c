"""Describes a table of block copies: what planners make and the native module executes."""

from __future__ import annotations

import numpy as np

#: One block copy. Addresses, counts of rows and of elements a row, bytes from a row to the next on each side, the index
#: of the source's process, and the codes of `dtypes.ElementType`. Same layout as `BlockCopy` in csrc/block_copy.hpp.
BLOCK_COPY_DTYPE: np.dtype[np.void] = np.dtype(
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
