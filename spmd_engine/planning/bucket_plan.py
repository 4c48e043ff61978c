"""Which bytes travel in which bucket, where the engine cannot read shards in place: on another node, say.

A route carries what one sender has for one node. The sender packs blocks into a bucket, the bucket moves, and every
rank of the node unpacks from it what it wants: a byte that several of them want comes once. Buckets are small, so a
route takes several steps, and in each step every route sends one bucket. A pure function of its arguments, like
`plan.py`: every rank works out the same from what all of them want.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from spmd_engine.planning.copy_table import BLOCK_COPY_DTYPE
from spmd_engine.planning.dtypes import ITEM_SIZES
from spmd_engine.planning.plan import TransferPlan

#: A block that a rank wants packed: the rank that holds it, the index of its weight in the source layout, the bytes
#: from the start of the shard, rows and elements a row, bytes from a row to the next, and the codes of the dtypes in
#: which it lies and in which it travels.
PACK_REQUEST_DTYPE = np.dtype(
    [
        ("source", "<i4"),
        ("weight", "<i4"),
        ("src", "<u8"),
        ("rows", "<u8"),
        ("row_elems", "<u8"),
        ("src_pitch", "<i8"),
        ("src_dtype", "<u2"),
        ("packed_dtype", "<u2"),
    ]
)
_ALIGN = 64
# Buckets of a rank. What is packed may be read by others of the node one step later, so three of them take turns.
PACKED, ARRIVED = (0, 1, 2), (3, 4)
BUCKETS = len(PACKED) + len(ARRIVED)
#: A plan without blocks.
NOTHING = TransferPlan(np.zeros(0, BLOCK_COPY_DTYPE), np.zeros(0, np.int64), np.zeros(0, np.int64), 0, 0)


@dataclass(frozen=True, order=True)
class Route:
    """What `sender` has for the ranks of `node`.

    Attributes:
        receiver: the rank in whose bucket they find it; the sender itself if it is of that node.
    """

    sender: int
    node: int
    receiver: int

    @property
    def is_network(self) -> bool:
        return self.sender != self.receiver


@dataclass(frozen=True)
class Step:
    """What one rank does in one step.

    Attributes:
        pack: from own shards to offsets in the own packed bucket.
        unpack: from offsets in buckets of this node into parameters; its weight index is the number of the bucket.
        sends, receives: bytes for and from every rank, in the order of the ranks.
        kept: bytes at the start of the packed bucket that stay on this node; what it sends follows.
    """

    pack: TransferPlan
    unpack: TransferPlan
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    kept: int


@dataclass(frozen=True)
class BucketPlan:
    """All steps of one rank, in which the others of the update take theirs; some ranks may need more.

    Attributes:
        steps: of this rank.
        routes: of all ranks.
        network_bytes: that arrive at this rank from other nodes.
        staged_bytes: that this rank unpacks, as they travel.
    """

    steps: tuple[Step, ...]
    routes: tuple[Route, ...]
    network_bytes: int
    staged_bytes: int

    @property
    def is_network(self) -> bool:
        """Whether any rank sends to another node."""
        return any(route.is_network for route in self.routes)


def split(plan: TransferPlan, bucketed: Iterable[int], *, rank: int) -> tuple[TransferPlan, TransferPlan]:
    """A plan of `rank` as its blocks from ranks that can be read in place, and those from the ranks `bucketed`."""
    via = np.isin(plan.rank, list(bucketed))
    return _select(plan, ~via, rank), _select(plan, via, rank)


def request_packs(bucketed: TransferPlan) -> np.ndarray:
    """What a rank wants packed, by `PACK_REQUEST_DTYPE`, each block once. A cast that shrinks it is made first."""
    return np.unique(_requests_of(bucketed))


def plan_buckets(
    bucketed: TransferPlan,
    requests: Mapping[int, np.ndarray],
    *,
    rank: int,
    nodes: Mapping[int, int],
    bucket_bytes: int,
) -> BucketPlan:
    """The steps of one rank.

    Args:
        bucketed: the blocks that it wants and cannot read in place.
        requests: `request_packs` of every rank of the update, by rank, in an order that all of them know.
        nodes: number of the node of every rank.
        bucket_bytes: size of a bucket.
    """
    ranks = tuple(requests)
    by_node = {node: [r for r in ranks if nodes[r] == node] for node in sorted(set(nodes.values()))}
    routes = tuple(sorted(_routes(requests, nodes, by_node)))
    crowd = Counter(end for route in routes for end in (("out", route.sender), ("in", route.receiver)))
    limit = max(1, bucket_bytes // max(crowd.values(), default=1) // _ALIGN) * _ALIGN
    outgoing = [route for route in routes if route.sender == rank]
    incoming = [route for route in routes if route.node == nodes[rank]]
    packed, packs, unpacks = {}, {}, {}
    own = _requests_of(bucketed)
    for route in {*outgoing, *incoming}:
        blocks = np.unique(np.concatenate([_of_sender(requests[r], route.sender) for r in by_node[route.node]]))
        packed[route] = _Packed.make(blocks, limit)
        if route in outgoing:
            packs[route] = packed[route].pack()
        if route in incoming:
            mine = own["source"] == route.sender
            unpacks[route] = packed[route].unpack(own[mine], bucketed.table[mine])
    steps = []
    for number in range(max((len(packed[route].sizes) for route in packed), default=0)):
        sends, receives, arrived = (dict.fromkeys(ranks, 0) for _ in range(3))
        pack, unpack = [], []
        kept = at = 0
        for route in sorted(outgoing, key=lambda route: (route.is_network, ranks.index(route.receiver))):
            size = packed[route].size(number)
            pack.append(packs[route].at(number, "dst", at, rank))
            at += size
            if route.is_network:
                sends[route.receiver] = size
            else:
                kept = size
        for route in sorted(incoming, key=lambda route: ranks.index(route.sender)):
            size = packed[route].size(number)
            base = arrived[route.receiver] if route.is_network else 0
            moves = unpacks[route].at(number, "src", base, route.receiver)
            turn = ARRIVED if route.is_network else PACKED
            unpack.append(replace(moves, weight=np.full(len(moves.table), turn[number % len(turn)], np.int64)))
            if route.is_network:
                arrived[route.receiver] += size
                if route.receiver == rank:
                    receives[route.sender] = size
        steps.append(
            Step(
                pack=_join(pack),
                unpack=_join(unpack),
                sends=tuple(sends.values()),
                receives=tuple(receives.values()),
                kept=kept,
            )
        )
    return BucketPlan(
        steps=tuple(steps),
        routes=routes,
        network_bytes=sum(sum(step.receives) for step in steps),
        staged_bytes=sum(int(_bytes(step.unpack.table).sum()) for step in steps),
    )


def _select(plan: TransferPlan, chosen: np.ndarray, rank: int) -> TransferPlan:
    moved = _bytes(plan.table[chosen])
    local = int(moved[plan.rank[chosen] == rank].sum())
    return TransferPlan(plan.table[chosen], plan.rank[chosen], plan.weight[chosen], local, int(moved.sum()) - local)


def _bytes(table: np.ndarray) -> np.ndarray:
    """Bytes that each block reads."""
    found: np.ndarray = (
        table["rows"].astype(np.int64) * table["row_elems"].astype(np.int64) * ITEM_SIZES[table["src_dtype"]]
    )
    return found


def _requests_of(bucketed: TransferPlan) -> np.ndarray:
    """The request for each block of a plan."""
    table = bucketed.table
    rows = np.zeros(len(table), PACK_REQUEST_DTYPE)
    rows["source"], rows["weight"] = bucketed.rank, bucketed.weight
    for name in ("src", "rows", "row_elems", "src_pitch", "src_dtype"):
        rows[name] = table[name]
    shrinks = ITEM_SIZES[table["dst_dtype"]] < ITEM_SIZES[table["src_dtype"]]
    rows["packed_dtype"] = np.where(shrinks, table["dst_dtype"], table["src_dtype"])
    return rows


def _of_sender(requests: np.ndarray, sender: int) -> np.ndarray:
    found: np.ndarray = requests[requests["source"] == sender]
    return found


def _routes(
    requests: Mapping[int, np.ndarray], nodes: Mapping[int, int], by_node: Mapping[int, list[int]]
) -> Iterator[Route]:
    """One for every sender and node. Those that come to a node from another one go to its ranks in turn."""
    for node, members in by_node.items():
        for sender in sorted({int(s) for member in members for s in np.unique(requests[member]["source"])}):
            if nodes[sender] == node:
                yield Route(sender, node, sender)
            else:
                place = by_node[nodes[sender]].index(sender)
                yield Route(sender, node, members[place % len(members)])


@dataclass(frozen=True)
class _Packed:
    """How the blocks of a route lie in its buckets, cut into fragments.

    Attributes:
        blocks: by `PACK_REQUEST_DTYPE`, each once, sorted.
        sizes: bytes of each step.
        block, row, elem: of each fragment its block, and where in it the fragment begins.
        rows, elems: extent of each fragment.
        step, offset: the step in which each fragment travels, and its offset in that step's share of a bucket, bytes.
    """

    blocks: np.ndarray
    sizes: list[int]
    block: np.ndarray
    row: np.ndarray
    elem: np.ndarray
    rows: np.ndarray
    elems: np.ndarray
    step: np.ndarray
    offset: np.ndarray

    @staticmethod
    def make(blocks: np.ndarray, limit: int) -> _Packed:
        """Fill buckets of at most `limit` bytes one after the other."""
        fragments: list[tuple[int, ...]] = []
        sizes = [0]
        items = ITEM_SIZES[blocks["packed_dtype"]].tolist()
        extents = zip(items, blocks["rows"].tolist(), blocks["row_elems"].tolist(), strict=True)
        for number, (item, rows, elems) in enumerate(extents):
            row = elem = 0
            while row < rows:
                room = (limit - sizes[-1]) // item
                take, count = min(rows - row, room // elems), elems
                if elem or not take:  # a part of one row, if it is the only one or larger than a bucket
                    take, count = 1, min(elems - elem, room) if rows == 1 or elems * item > limit else 0
                if not count:
                    sizes.append(0)
                    continue
                fragments.append((number, row, elem, take, count, len(sizes) - 1, sizes[-1]))
                sizes[-1] = min(limit, -(-(sizes[-1] + take * count * item) // _ALIGN) * _ALIGN)
                elem = (elem + count) % elems
                row += take if not elem else 0
        columns = np.array(fragments, dtype=np.int64).reshape(len(fragments), 7).T
        return _Packed(blocks, sizes, *columns)

    def size(self, step: int) -> int:
        """Bytes that travel in a step."""
        return self.sizes[step] if step < len(self.sizes) else 0

    def pack(self) -> _Moves:
        """From the sender's shards into its bucket."""
        of = self.blocks[self.block]
        src, packed, pitch = ITEM_SIZES[of["src_dtype"]], ITEM_SIZES[of["packed_dtype"]], of["src_pitch"]
        table = np.zeros(len(of), BLOCK_COPY_DTYPE)
        table["src"] = of["src"].astype(np.int64) + self.row * pitch + self.elem * src
        table["dst"] = self.offset
        table["rows"], table["row_elems"] = self.rows, self.elems
        table["src_pitch"], table["dst_pitch"] = pitch, self.elems * packed
        table["src_dtype"], table["dst_dtype"] = of["src_dtype"], of["packed_dtype"]
        return _Moves(table, of["weight"].astype(np.int64), self.step)

    def unpack(self, requests: np.ndarray, rows: np.ndarray) -> _Moves:
        """From the bucket to where the `rows` of a copy table want it, of which `requests` has the requests."""
        _, index = np.unique(np.concatenate([self.blocks, requests]), return_inverse=True)
        block = index[len(self.blocks) :]  # of each row
        first, last = (np.searchsorted(self.block, block, side) for side in ("left", "right"))
        count = last - first  # fragments of each row
        row = np.repeat(np.arange(len(rows)), count)
        fragment = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + first[row]
        of, kind = rows[row], requests["packed_dtype"][row]
        table = np.zeros(len(row), BLOCK_COPY_DTYPE)
        table["src"] = self.offset[fragment]
        dst_item = ITEM_SIZES[of["dst_dtype"]]
        table["dst"] = (
            of["dst"].astype(np.int64) + self.row[fragment] * of["dst_pitch"] + self.elem[fragment] * dst_item
        )
        table["rows"], table["row_elems"] = self.rows[fragment], self.elems[fragment]
        table["src_pitch"], table["dst_pitch"] = self.elems[fragment] * ITEM_SIZES[kind], of["dst_pitch"]
        table["src_dtype"], table["dst_dtype"] = kind, of["dst_dtype"]
        return _Moves(table, np.zeros(len(row), np.int64), self.step[fragment])


@dataclass(frozen=True)
class _Moves:
    """Block copies with the index of the weight that each of them reads, and the step in which it is made."""

    table: np.ndarray
    weight: np.ndarray
    step: np.ndarray

    def at(self, step: int, side: str, base: int, rank: int) -> TransferPlan:
        """Those of a step, from `rank`, with `base` added to the addresses of one side, "src" or "dst"."""
        now = self.step == step
        table = self.table[now]
        table[side] += np.uint64(base)
        return TransferPlan(table, np.full(len(table), rank, np.int64), self.weight[now], 0, 0)


def _join(plans: list[TransferPlan]) -> TransferPlan:
    if not plans:
        return NOTHING
    table, rank, weight = (
        np.concatenate([getattr(plan, name) for plan in plans]) for name in ("table", "rank", "weight")
    )
    return TransferPlan(table, rank, weight, 0, 0)
