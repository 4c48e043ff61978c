"""Names what takes effect at one turn of SGLang's event loop, the same on all ranks of a replica."""

from __future__ import annotations

import msgspec

from spmd_engine.control.messages import Submit


class StepCommands(msgspec.Struct):
    """From the root's scheduler process to the others. Empty ones say that there is nothing new.

    Attributes:
        submits: requests that begin.
        aborts: ids of requests that end.
        pause, resume: all requests stop where they are, or go on.
    """

    submits: list[Submit] = []
    aborts: list[str] = []
    pause: bool = False
    resume: bool = False
