# SPDX-License-Identifier: Apache-2.0
"""Random tables of block copies, and the slow reference that both backends must match bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ElementType

#: The same examples in every run.
REPEATABLE = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

TORCH_DTYPES = {ElementType.F32: torch.float32, ElementType.F16: torch.float16, ElementType.BF16: torch.bfloat16}
FLOATS = list(TORCH_DTYPES)
CASTS = [(a, b) for a in FLOATS for b in FLOATS if a != b]
PAIRS = [(t, t) for t in ElementType] + CASTS

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_dtype(element: ElementType) -> type[np.unsignedinteger]:
    return _BITS[element.itemsize]


def cast_bits(values: np.ndarray, src: ElementType, dst: ElementType) -> np.ndarray:
    """torch's `.to(dtype)` on raw bits. torch's NaNs differ between its own code paths; ours are all ones."""
    if src == dst:
        return values
    tensor = torch.from_numpy(values.copy()).view(TORCH_DTYPES[src])
    result = tensor.to(TORCH_DTYPES[dst]).view(torch.uint16 if dst.itemsize == 2 else torch.uint32).numpy().copy()
    nan = tensor.isnan().numpy()
    if src == ElementType.BF16 and dst == ElementType.F32:
        result[nan] = values[nan].astype(np.uint32) << 16
    else:
        result[nan] = 0x7FFF if dst.itemsize == 2 else 0x7FFFFFFF
    return result


@dataclass
class Case:
    """`table` holds offsets into `src` and `dst` instead of addresses."""

    table: np.ndarray
    src: np.ndarray
    dst: np.ndarray

    def at(self, src_address: int, dst_address: int) -> np.ndarray:
        table = self.table.copy()
        table["src"] += np.uint64(src_address)
        table["dst"] += np.uint64(dst_address)
        return table

    def expected(self) -> np.ndarray:
        """The destination after the copy."""
        result = self.dst.copy()
        for row in self.table:
            src_type, dst_type = ElementType(row["src_dtype"]), ElementType(row["dst_dtype"])
            elems = int(row["row_elems"])
            for r in range(int(row["rows"])):
                src_at = int(row["src"]) + r * int(row["src_pitch"])
                dst_at = int(row["dst"]) + r * int(row["dst_pitch"])
                values = self.src[src_at : src_at + elems * src_type.itemsize].copy().view(bits_dtype(src_type))
                moved = cast_bits(values, src_type, dst_type).view(np.uint8)
                result[dst_at : dst_at + elems * dst_type.itemsize] = moved
        return result

    def element_offset(self, block: int, element: int) -> int:
        """Where in `dst` an element of a block lies."""
        row, column = divmod(element, int(self.table["row_elems"][block]))
        size = ElementType(self.table["dst_dtype"][block]).itemsize
        return int(self.table["dst"][block]) + row * int(self.table["dst_pitch"][block]) + column * size


def build_case(blocks: list[tuple], seed: int) -> Case:
    """Lays blocks out one after the other. A block: (types, rows, elems, src skip, dst skip, src gap, dst gap, flip).

    A negative source gap makes rows overlap in the source. `flip` walks the destination rows backwards.
    """
    table = np.zeros(len(blocks), BLOCK_COPY_DTYPE)
    src_end = dst_end = 0
    for i, ((src_type, dst_type), rows, elems, src_skip, dst_skip, src_gap, dst_gap, flip) in enumerate(blocks):
        src_row, dst_row = elems * src_type.itemsize, elems * dst_type.itemsize
        src_pitch, dst_pitch = max(src_row + src_gap, 0), dst_row + dst_gap
        src_at, dst_at = src_end + src_skip, dst_end + dst_skip
        src_end = src_at + max(rows - 1, 0) * src_pitch + src_row
        dst_end = dst_at + max(rows - 1, 0) * dst_pitch + dst_row
        if flip and rows > 0:
            dst_at, dst_pitch = dst_at + (rows - 1) * dst_pitch, -dst_pitch
        table[i] = (src_at, dst_at, rows, elems, src_pitch, dst_pitch, 0, src_type, dst_type)
    rng = np.random.default_rng(seed)
    src = rng.integers(0, 256, src_end + 64, dtype=np.uint8)
    return Case(table, src, rng.integers(0, 256, dst_end + 64, dtype=np.uint8))


def block_shapes(max_rows: int = 40, max_elems: int = 300) -> st.SearchStrategy[tuple]:
    skip = st.one_of(st.integers(0, 33), st.sampled_from([0, 16, 32, 64]))
    gap = st.one_of(st.just(0), st.integers(0, 40), st.sampled_from([16, 64, 512, 5000]))
    return st.tuples(
        st.sampled_from(PAIRS),
        st.integers(0, max_rows),
        st.one_of(st.integers(0, max_elems), st.sampled_from([1, 2, 16, 64, 256])),
        skip,
        skip,
        st.one_of(gap, st.integers(-200, 0)),
        gap,
        st.booleans(),
    )


def cases(max_blocks: int = 12) -> st.SearchStrategy[Case]:
    return st.builds(build_case, st.lists(block_shapes(), min_size=0, max_size=max_blocks), st.integers(0, 2**32 - 1))


#: Blocks larger than a tile of either backend, with lengths that are no multiple of anything.
LARGE_BLOCKS = [
    ((ElementType.BF16, ElementType.BF16), 1, 1_300_003, 2, 6, 0, 0, False),
    ((ElementType.F32, ElementType.BF16), 3, 400_001, 4, 2, 12, 6, True),
    ((ElementType.RAW8, ElementType.RAW8), 30_011, 96, 1, 3, 96, 5, False),
    ((ElementType.F16, ElementType.F32), 5_003, 192, 16, 16, 384, 0, False),
    ((ElementType.RAW64, ElementType.RAW64), 1, 1, 0, 1, 0, 0, False),
    ((ElementType.RAW32, ElementType.RAW32), 2_049, 1, 0, 0, 60, 0, False),
    ((ElementType.RAW8, ElementType.RAW8), 5_001, 3, 0, 0, 3_001, 1, False),
    ((ElementType.RAW16, ElementType.RAW16), 70, 3_000, 8, 8, 70_000, 16, False),
]


def special_f32_bits() -> np.ndarray:
    """Every exponent with mantissas around all rounding boundaries of F16 and BF16, both signs, NaNs, infinities."""
    mantissas = {0, 1, 0x7FFFFF, 0x7FFFFE}
    for shift in range(23):
        for base in (1 << shift, 3 << shift, 5 << shift, (1 << 23) - (1 << shift)):
            mantissas.update(m for m in (base - 1, base, base + 1) if 0 <= m < 1 << 23)
    exponents = np.arange(256, dtype=np.uint32)[:, None] << 23
    positive = (exponents | np.array(sorted(mantissas), dtype=np.uint32)[None, :]).ravel()
    return np.concatenate([positive, positive | np.uint32(0x80000000)])


def values_to_cast(element: ElementType) -> np.ndarray:
    """Bits of all values of a 16-bit type; for F32 all interesting ones and a million random ones."""
    if element.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint32) << 16  # every BF16, and what lies half way to the next
    return np.concatenate([special_f32_bits(), random, halves, halves | 0x8000, halves | 0x7FFF, halves | 0x8001])


def corrupt(case: Case, seed: int) -> set[tuple[int, int]]:
    """Flips a bit of up to eight random elements and returns which."""
    rng = np.random.default_rng(seed)
    counts = (case.table["rows"] * case.table["row_elems"]).astype(np.int64)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return set()
    chosen = {(int(b), int(rng.integers(counts[b]))) for b in rng.choice(filled, 8)}
    for block, element in chosen:
        size = ElementType(case.table["dst_dtype"][block]).itemsize
        case.dst[case.element_offset(block, element) + int(rng.integers(size))] ^= np.uint8(1 << rng.integers(8))
    return chosen
