"""What takes effect at one turn of SGLang's event loop, the same on all ranks of a replica."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spmd_engine.control.framing import Frame
from spmd_engine.control.messages import GenerateRequest, Submit

_KEY = "ticket"


@dataclass
class Ticket:
    """From the first rank's scheduler process to the others. An empty one says that there is nothing new.

    Attributes:
        submits: requests that begin.
        aborts: ids of requests that end.
        pause, resume: all requests stop where they are, or go on.
    """

    submits: list[Submit] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    pause: bool = False
    resume: bool = False

    def to_frame(self) -> Frame:
        """As JSON-able values and bytes, for a link."""
        submits, blobs = [], []
        for submit in self.submits:
            requests = []
            for rid, request in submit.requests.items():
                header, blob = request.to_frame()
                requests.append([rid, header, len(blob)])
                blobs.append(blob)
            submits.append({"requests": requests, "stream": submit.stream})
        words = {"submits": submits, "aborts": self.aborts, "pause": self.pause, "resume": self.resume}
        words = {name: value for name, value in words.items() if value}
        return {_KEY: words} if words else {}, b"".join(blobs)

    @staticmethod
    def from_frame(frame: Frame) -> Ticket | None:
        """What `to_frame` made; None if the frame is something else."""
        header, blob = frame
        if not header:
            return Ticket()
        if _KEY not in header:
            return None
        words: dict[str, Any] = header[_KEY]
        submits, at = [], 0
        for one in words.get("submits", ()):
            requests = {}
            for rid, fields, size in one["requests"]:
                requests[rid] = GenerateRequest.from_frame(fields, blob[at : at + size])
                at += size
            submits.append(Submit(requests, one["stream"]))
        return Ticket(submits, words.get("aborts", []), words.get("pause", False), words.get("resume", False))
