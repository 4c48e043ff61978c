"""Connects the ranks of an update for what they cannot read in place: buckets, the network, the trainer's packer."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import partial

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from spmd_engine.control.agreement import AllGather, Failure, Outcome, attempt, raise_first
from spmd_engine.control.channel import Channel
from spmd_engine.control.messages import Packing, Start, ToScheduler
from spmd_engine.planning import bucket_plan
from spmd_engine.planning.plan import TransferPlan
from spmd_engine.planning.shard_memory import ShardMemory
from spmd_engine.transfer.bucketed import BucketedTransfer, BucketOffer, Network, join_store, serve_store
from spmd_engine.transfer.handles import OpenHandles
from spmd_engine.transfer.packing import PackLink


class _Offer(msgspec.Struct, frozen=True):
    """A rank's buckets, and from the first rank where the store of the network is.

    Attributes:
        store: host and port; None if no store was made.
    """

    error: Failure
    buckets: BucketOffer | None
    store: tuple[str, int] | None


class _Wanted(msgspec.Struct, frozen=True):
    """What a rank wants packed by others: rows of `PACK_REQUEST_DTYPE`."""

    rows: np.ndarray


class BucketSetup:
    """What the bucketed parts of several updates share: a network for each set of ranks, and the link to the packer.

    Args:
        start: of this process.
        channel: to its trainer.
        device: of the buckets.
        handles: what this process has mapped; needed on a GPU.
    """

    def __init__(
        self, start: Start, channel: Channel[ToScheduler], *, device: torch.device, handles: OpenHandles | None
    ) -> None:
        self._start, self._channel, self._device, self._handles = start, channel, device, handles
        self._networks: dict[tuple[int, ...], Network] = {}
        self._packing: PackLink | None = None

    def prepare(
        self,
        rest: TransferPlan,
        memories: Mapping[int, ShardMemory],
        nodes: Mapping[int, int],
        gather: AllGather,
        bucket_bytes: int,
    ) -> BucketedTransfer:
        """Plan with all ranks how the rest comes, and connect to them.

        Args:
            rest: what this rank cannot read in place; other ranks may have some if it has none.
            memories: of all ranks, in an order that all of them know.
            nodes: numbers of the ranks' nodes.
            bucket_bytes: size of a bucket.

        Raises:
            TransferError: some rank could not; nothing is kept, and nothing was written.
        """
        ranks, rank = tuple(memories), self._start.rank
        tried = partial(attempt, rank=rank, device=self._device)
        told = gather(_Wanted(bucket_plan.request_packs(rest)))
        wanted = {r: one.rows for r, one in zip(ranks, told, strict=True)}
        made: list[BucketedTransfer] = []
        buckets: list[BucketOffer] = []
        stores: list[tuple[dist.Store, int]] = []

        def make() -> None:
            plan = bucket_plan.plan_buckets(rest, wanted, rank=rank, nodes=nodes, bucket_bytes=bucket_bytes)
            trainer = self._link_to_packer() if memories[rank].is_cpu else None
            made.append(BucketedTransfer(plan, rank=rank, device=self._device, handles=self._handles, trainer=trainer))
            buckets.append(made[0].offer())
            if plan.is_network and ranks not in self._networks and rank == ranks[0]:
                stores.append(serve_store(self._start.host, self._start.timeout_s))

        def connect() -> None:
            if made[0].plan.is_network and ranks not in self._networks:
                assert offers[0].store is not None
                host, port = offers[0].store
                self._networks[ranks] = Network(
                    ranks,
                    rank,
                    host=self._start.host,
                    device=self._device,
                    store=stores[0][0] if stores else join_store(host, port, self._start.timeout_s),
                    timeout_s=self._start.timeout_s,
                )
            offered = {r: offer.buckets for r, offer in zip(ranks, offers, strict=True) if offer.buckets is not None}
            made[0].accept(offered, self._networks.get(ranks))

        try:
            error = tried(make)
            store = (self._start.host, stores[0][1]) if stores else None
            offers = gather(_Offer(error, None if error else buckets[0], store))
            raise_first(offers)
            outcomes = gather(Outcome(tried(connect)))
            if any(outcome.error is not None for outcome in outcomes):
                self.forget_network(ranks)  # some ranks may have joined it
            raise_first(outcomes)
        except BaseException:
            for one in made:
                one.close()
            raise
        return made[0]

    def forget_network(self, ranks: tuple[int, ...]) -> None:
        """It may be broken: the next update makes another."""
        self._networks.pop(ranks, None)

    def _link_to_packer(self) -> PackLink:
        """To the trainer's thread that packs; it is started if it does not run."""
        if self._packing is None or self._packing.is_broken:
            ours, theirs = socket.socketpair()
            with theirs:
                self._channel.send(Packing(), (theirs.fileno(),), timeout_s=self._start.timeout_s)
            self._packing = PackLink(self._start.rank, ours, self._start.timeout_s)
        return self._packing
