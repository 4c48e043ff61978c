"""The table of dtypes says what the C++ core does, and what torch has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ELEMENT_TYPES, ITEM_SIZE, ITEM_SIZES, ElementType, can_cast
from spmd_engine.transfer import _native

COUNT = 3
UNTOUCHED = 0xAB


def copy(src_code: int, dst_code: int) -> tuple[int, np.ndarray]:
    """Copy `COUNT` zero elements; returns the bytes read, and the destination, which had `UNTOUCHED` everywhere."""
    source, target = np.zeros(64, np.uint8), np.full(64, UNTOUCHED, np.uint8)
    table = np.zeros(1, BLOCK_COPY_DTYPE)
    table["src"], table["dst"] = source.ctypes.data, target.ctypes.data
    table["rows"], table["row_elems"] = 1, COUNT
    table["src_dtype"], table["dst_dtype"] = src_code, dst_code
    return _native.copy_cpu(table, pids=[0]).bytes_read, target


@pytest.mark.parametrize("dst", ElementType)
@pytest.mark.parametrize("src", ElementType)
def test_the_core_casts_as_the_table_says_and_knows_its_sizes(src, dst):
    if not can_cast(src, dst):
        with pytest.raises(_native.TableError, match="cannot cast"):
            copy(src, dst)
        return
    read, target = copy(src, dst)
    assert read == COUNT * src.itemsize
    assert np.count_nonzero(target != UNTOUCHED) == COUNT * dst.itemsize


def test_the_core_knows_no_further_code():
    assert list(ElementType) == list(range(len(ElementType)))
    with pytest.raises(_native.TableError, match="no element type"):
        copy(len(ElementType), len(ElementType))


def test_the_names_are_torchs():
    for name, kind in ELEMENT_TYPES.items():
        dtype = getattr(torch, name)
        assert dtype.itemsize == kind.itemsize == ITEM_SIZE[name] == ITEM_SIZES[kind]
        values = torch.tensor([0.0, -1.5, 1e-3, 3.0e4], dtype=dtype)
        for other, code in ELEMENT_TYPES.items():
            found = torch.zeros(4, dtype=getattr(torch, other))
            table = np.zeros(1, BLOCK_COPY_DTYPE)
            table["src"], table["dst"] = values.data_ptr(), found.data_ptr()
            table["rows"], table["row_elems"] = 1, 4
            table["src_dtype"], table["dst_dtype"] = kind, code
            _native.copy_cpu(table, pids=[0])
            assert torch.equal(found, values.to(found.dtype))
