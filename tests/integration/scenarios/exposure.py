"""What other users of the machine, and of the network, could reach of a process."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import psutil


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports of a process's TCP and UDP sockets that take what anyone sends."""
    return {tuple(c.laddr) for c in psutil.Process(pid).net_connections("inet") if c.laddr and not c.raddr}


def listening_unix(pid: int) -> list[str]:
    """Names of a process's listening Unix sockets, path or abstract."""
    accepts = 1 << 16  # __SO_ACCEPTCON, in the column of flags
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    mine = {target for _, target in _descriptors(pid)}
    return [" ".join(row[7:]) for row in rows if f"socket:[{row[6]}]" in mine and int(row[3], 16) & accepts]


def check(pid: int, *, logs: Path) -> None:
    """Fail if the scheduler process of a job on one node can be reached, read or fed by others."""
    assert {address for address, _ in listening(pid)} == {"127.0.0.1"}  # the store's, and gloo's
    assert listening_unix(pid) == []

    (scratch,) = Path(tempfile.gettempdir()).glob("spmd-engine-*")
    files = list(logs.iterdir())
    assert len(files) > 0
    for private in (scratch, logs, *files):
        _check(private, os.stat(private), 0o077)

    # What else it has open or mapped, such as the caches of compilers in the user's home, only the user can write.
    for fd, target in _descriptors(pid):
        if os.path.exists(fd) and stat.S_ISREG(os.stat(fd).st_mode):
            _check(target, os.stat(fd), 0o077 if target.startswith("/dev/shm/") else 0o022)
    with open(f"/proc/{pid}/maps") as file:
        mapped = {line.split(maxsplit=5)[5].strip() for line in file if len(line.split()) > 5}
    for path in mapped:
        if path.startswith("/dev/shm/") and os.path.exists(path):
            _check(path, os.stat(path), 0o077)


def _check(path: object, found: os.stat_result, forbidden: int) -> None:
    assert found.st_uid == os.getuid() and not found.st_mode & forbidden, f"{path}: {stat.filemode(found.st_mode)}"


def _descriptors(pid: int) -> list[tuple[str, str]]:
    """Paths in /proc of a process's open files, and what they are."""
    folder = f"/proc/{pid}/fd"
    found = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            found.append((path, os.readlink(path)))
        except FileNotFoundError:
            continue  # closed meanwhile
    return found
