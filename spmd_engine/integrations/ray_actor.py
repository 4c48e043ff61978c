"""Runs one rank of a job on Ray: the actor that holds the user's worker and its torch.distributed world."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from typing import Any

try:
    import ray
    from ray import cloudpickle
except ImportError as error:
    raise ImportError(f"spmd_engine.integrations.ray needs Ray: pip install ray ({error})") from error

from spmd_engine.errors import ConfigError


@dataclass(frozen=True)
class Raised:
    """An exception of a rank, on its way to the driver. `pickled` may be unreadable there; the texts are not."""

    pickled: bytes
    summary: str
    text: str


def caught(error: Exception) -> Raised:
    text = traceback.format_exc()
    error.__traceback__ = None
    try:
        pickled = cloudpickle.dumps(error)
    except Exception:
        pickled = b""
    return Raised(pickled, f"{type(error).__name__}: {error}", text)


class Rank:
    """The actor of one rank. Its methods return `Raised` where they fail: Ray would wrap the error."""

    def __init__(self) -> None:
        self._store: Any = None
        self._worker: Any = None

    def where(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), os.getpid()

    def serve_store(self, host: str) -> int | Raised:
        """On rank 0: serve the store in which the ranks meet, on a port that is bound first; returns the port."""
        from torch.distributed import TCPStore

        from spmd_engine.control import peer_group

        try:
            with peer_group.listen(host) as listener:
                port = int(listener.getsockname()[1])
                fd = os.dup(listener.fileno())
            self._store = TCPStore(
                host_name=host, port=port, is_master=True, wait_for_workers=False, master_listen_fd=fd, use_libuv=True
            )
        except Exception as error:
            return caught(error)
        return port

    def join(self, host: str, port: int, backend: str, timeout_s: float) -> Raised | None:
        """Become a rank of the world."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from spmd_engine.trainer.rendezvous import interface_of, outgoing_address

        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        try:
            # Gloo would take the address that the host's own name has, which other nodes may not reach.
            if interface := interface_of(outgoing_address(host)):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if "cuda" in backend:
                if torch.cuda.device_count() != 1:
                    raise ConfigError(
                        f"rank {rank} sees {torch.cuda.device_count()} GPUs, not 1: is "
                        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES set?"
                    )
                torch.cuda.set_device(0)
            if self._store is None:
                self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
            dist.init_process_group(backend, store=self._store, rank=rank, world_size=world)
        except Exception as error:
            return caught(error)
        return None

    def make(self, worker_class: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Raised | None:
        try:
            self._worker = worker_class(*args, **kwargs)
        except Exception as error:
            return caught(error)
        return None

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return getattr(self._worker, method)(*args, **kwargs)
        except Exception as error:
            return caught(error)

    def leave(self) -> Raised | None:
        import torch.distributed as dist

        try:
            if hasattr(self._worker, "shutdown"):
                self._worker.shutdown()
            if dist.is_initialized():
                dist.destroy_process_group()
        except Exception as error:
            return caught(error)
        return None
