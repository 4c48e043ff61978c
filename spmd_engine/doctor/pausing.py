"""A process that gives GPU memory back and takes it again, as a sleeping scheduler process does."""

from __future__ import annotations

import sys

_BYTES = 256 << 20


def main() -> int:
    """Pause and resume memory of the first GPU; the exit status says whether it was free meanwhile."""
    import torch
    from torch_memory_saver import torch_memory_saver as saver

    with saver.region(tag="doctor"):
        held = torch.full((_BYTES,), 7, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    address, before = held.data_ptr(), torch.cuda.mem_get_info()[0]
    saver.pause("doctor")
    freed = torch.cuda.mem_get_info()[0] - before
    saver.resume("doctor")
    held.fill_(3)
    torch.cuda.synchronize()
    if held.data_ptr() != address or int(held[:1024].sum()) != 3 * 1024:
        print("memory that was resumed is not usable", file=sys.stderr)
        return 1
    if freed < _BYTES // 2:  # other programs may allocate meanwhile
        print(f"a pause freed {freed >> 20} MiB of {_BYTES >> 20}", file=sys.stderr)
        return 1
    print(f"a pause freed {freed >> 20} of {_BYTES >> 20} MiB, a resume took them again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
