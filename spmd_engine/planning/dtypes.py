"""Says which dtypes can move, how wide they are, and which casts a copy makes: the one place in Python that does.

Weights have the dtypes of `ELEMENT_TYPES`, by torch's names without "torch."; users look torch's own up by
`getattr(torch, name)`. The C++ core knows the codes of `ElementType` alone (`csrc/block_copy.hpp`); a test
compares the two.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt


class ElementType(enum.IntEnum):
    """Codes of ``src_dtype`` and ``dst_dtype``. Equal codes copy bits; unequal ones cast, see `can_cast`."""

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


#: The dtypes that a weight may have, by torch's name, and their codes.
ELEMENT_TYPES = {"float32": ElementType.F32, "float16": ElementType.F16, "bfloat16": ElementType.BF16}
#: Bytes of an element of a weight, by the same names.
ITEM_SIZE = {name: kind.itemsize for name, kind in ELEMENT_TYPES.items()}
#: Bytes of an element, by its code.
ITEM_SIZES: npt.NDArray[np.int64] = np.array([kind.itemsize for kind in ElementType], dtype=np.int64)


def can_cast(src: ElementType, dst: ElementType) -> bool:
    """Whether a copy turns elements of `src` into those of `dst`."""
    return src == dst or {src, dst} <= set(ELEMENT_TYPES.values())
