"""Trainer ranks as Ray actors: one process a rank, one GPU visible in each, and the first cause when one fails.

    placement = place_ranks(nnodes=2, ranks_per_node=8)
    with RankGroup(Trainer, config, placement=placement) as ranks:   # Trainer: a plain class
        for _ in range(100):
            metrics = ranks.call("step")[0]

On every rank, `Trainer(config)` is made once `torch.distributed` is there, so that it can build its model, its device
mesh and its `SpmdEngine` as it would under torchrun.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

try:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise ImportError(f"spmd_engine.integrations.ray needs Ray: pip install ray ({error})") from error

from spmd_engine.control import timeouts
from spmd_engine.errors import CollectiveTimeoutError, ConfigError, EngineClosedError
from spmd_engine.integrations.causes import RankFailure, as_error, first_cause
from spmd_engine.integrations.ray_actor import Raised, Rank


@dataclass(frozen=True)
class Placement:
    """Room for ranks on the nodes of a Ray cluster: one bundle a node, so that consecutive ranks share a node.

    Attributes:
        group: Ray's placement group; its bundles are on different nodes.
        bundles: index of each node's bundle, the nodes in the order of their addresses.
        nnodes, ranks_per_node, gpus_per_rank, cpus_per_rank: as given to `place_ranks`.
    """

    group: Any
    bundles: tuple[int, ...]
    nnodes: int
    ranks_per_node: int
    gpus_per_rank: float
    cpus_per_rank: float

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nnodes * self.ranks_per_node

    def remove(self) -> None:
        """Give the room back. Actors that still run there are killed."""
        ray.util.remove_placement_group(self.group)


def place_ranks(
    *,
    nnodes: int,
    ranks_per_node: int,
    gpus_per_rank: float | None = None,
    cpus_per_rank: float = 1,
    timeout_s: float = 60.0,
) -> Placement:
    """Reserve room on `nnodes` different nodes of the cluster that `ray.init` has joined.

    Args:
        ranks_per_node: trainer ranks on each node. Rank r is on node r // ranks_per_node, in the order of the nodes'
            addresses, so a mesh of shape (dp, tp) has its TP ranks on one node if tp divides ranks_per_node.
        gpus_per_rank: 1, or 0 for the CPU; by default 1 if the cluster has GPUs.
        cpus_per_rank: Ray's CPUs for a trainer rank together with its scheduler process.
        timeout_s: seconds to wait for nodes that are busy or still join.

    Raises:
        ConfigError: Ray is not initialised, or the cluster has no such room; the message says what it has.
    """
    if not ray.is_initialized():
        raise ConfigError("Ray is not initialised: call ray.init(), with address='auto' to join a cluster")
    if nnodes < 1 or ranks_per_node < 1 or cpus_per_rank <= 0:
        raise ConfigError(
            f"nnodes and ranks_per_node must be at least 1, got {nnodes} and {ranks_per_node}, and cpus_per_rank above "
            f"0, got {cpus_per_rank}"
        )
    if gpus_per_rank is None:
        gpus_per_rank = 1 if ray.cluster_resources().get("GPU") else 0
    if gpus_per_rank not in (0, 1):
        raise ConfigError(f"gpus_per_rank must be 0 or 1, got {gpus_per_rank}: a rank and its engine use one GPU")
    bundle = {"CPU": cpus_per_rank * ranks_per_node, "GPU": gpus_per_rank * ranks_per_node}
    bundle = {name: count for name, count in bundle.items() if count}
    group = ray.util.placement_group([bundle] * nnodes, strategy="STRICT_SPREAD")
    try:
        deadline = time.monotonic() + timeout_s
        while not group.wait(
            max(0.0, min(timeouts.RAY_POLL_S, deadline - time.monotonic()))
        ):  # Ctrl-C waits for its return
            if time.monotonic() > deadline:
                raise ConfigError(_no_room(bundle, nnodes, timeout_s))
        return Placement(group, _by_address(group), nnodes, ranks_per_node, gpus_per_rank, cpus_per_rank)
    except BaseException:
        ray.util.remove_placement_group(group)
        raise


def _no_room(bundle: Mapping[str, float], nnodes: int, timeout_s: float) -> str:
    nodes = [
        f"{node['NodeManagerAddress']}: CPU {node['Resources'].get('CPU', 0):g}, "
        f"GPU {node['Resources'].get('GPU', 0):g}"
        for node in ray.nodes()
        if node["Alive"]
    ]
    return (
        f"Ray found no room in {timeout_s:g} s for {bundle} on each of {nnodes} nodes. The cluster has "
        f"{'; '.join(nodes)}, and free are {ray.available_resources()}: start more nodes, end other jobs, or "
        "ask for less"
    )


def _by_address(group: Any) -> tuple[int, ...]:
    """Ray puts bundles on nodes in no particular order: this one is the same every time."""
    addresses = {node["NodeID"]: ipaddress.ip_address(node["NodeManagerAddress"]) for node in ray.nodes()}
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return tuple(sorted(nodes, key=lambda index: addresses[nodes[index]].packed))


class RankGroup:
    """A trainer over the ranks of a placement: an actor a rank, in one `torch.distributed` world.

    In every rank's process, before `worker_class` is made: one GPU is visible and current (if ranks have GPUs), the
    default process group is initialised, and RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT are set as torchrun sets them. LOCAL_RANK counts the ranks of a node: the device is `cuda:0` on all.

    Args:
        worker_class: a plain class; importable on all nodes, or defined in the driver's script.
        *args: for `worker_class`, the same on all ranks.
        **kwargs: for `worker_class`, the same on all ranks.
        placement: from `place_ranks`; removed by `shutdown`.
        backend: for `init_process_group`; by default gloo, and NCCL for CUDA tensors if ranks have GPUs.
        env: environment variables of the ranks' processes.
        timeout_s: seconds for the start of the processes and of their world, and again for `worker_class`.
        grace_s: how long to wait for the errors of the other ranks, once one has failed, for the first cause.

    Raises:
        RankFailedError: a rank failed; nothing is left running.
        CollectiveTimeoutError: a rank did not come in time; nothing is left running.
    """

    def __init__(
        self,
        worker_class: type,
        *args: Any,
        placement: Placement,
        backend: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
        grace_s: float = timeouts.RAY_GRACE_S,
        **kwargs: Any,
    ) -> None:
        self.placement = placement
        self._grace_s = grace_s
        self._closed = ""
        backend = backend or ("cpu:gloo,cuda:nccl" if placement.gpus_per_rank else "gloo")
        self._actors: list[Any] = []
        self._where = ["a process that did not start"] * placement.world_size
        try:
            self._actors += [self._start(rank, env or {}) for rank in range(placement.world_size)]
            places = self._run("start", [actor.where.remote() for actor in self._actors], timeout_s)
            self._where = [f"{address}, pid {pid}" for address, pid in places]
            # Rank 0 binds a port before anyone hears of it: no other process can take it meanwhile.
            host = places[0][0]
            (port,) = self._run("listen", [self._actors[0].serve_store.remote(host)], timeout_s)
            joins = [actor.join.remote(host, port, backend, timeout_s) for actor in self._actors]
            self._run("init_process_group", joins, timeout_s)
            made = [actor.make.remote(worker_class, args, kwargs) for actor in self._actors]
            self._run(worker_class.__name__, made, timeout_s)
        except BaseException:
            self._end("the start failed")
            raise

    def _start(self, rank: int, env: Mapping[str, str]) -> Any:
        placement = self.placement
        node, local_rank = divmod(rank, placement.ranks_per_node)
        variables = {
            **env,
            "RANK": str(rank),
            "WORLD_SIZE": str(placement.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(placement.ranks_per_node),
        }
        strategy = PlacementGroupSchedulingStrategy(
            placement.group, placement_group_bundle_index=placement.bundles[node]
        )
        return (
            ray.remote(Rank)
            .options(
                num_cpus=placement.cpus_per_rank,
                num_gpus=placement.gpus_per_rank,
                max_restarts=0,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": variables},
            )
            .remote()
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self._actors)

    def call(self, method: str, *args: Any, timeout_s: float = math.inf, **kwargs: Any) -> list[Any]:
        """Call a method of the worker on all ranks, with the same arguments.

        Args:
            timeout_s: seconds until all ranks must have returned.

        Returns:
            What it returned on each rank, in their order.

        Raises:
            RankFailedError: it raised on some rank, or a process ended. If every rank has answered, they stay: the
                method may be called again, one that calls `engine.restart()`, for example. Else all are ended, as those
                that have not answered may wait for ever.
            CollectiveTimeoutError: some rank did not return in time; all are ended.
            EngineClosedError: the ranks have been ended.
        """
        if self._closed:
            raise EngineClosedError(f"the ranks have been ended: {self._closed}; make a new RankGroup")
        return self._run(method, [actor.call.remote(method, args, kwargs) for actor in self._actors], timeout_s)

    def _run(self, what: str, refs: list[Any], timeout_s: float) -> list[Any]:
        pending = {ref: rank for rank, ref in enumerate(refs)}
        values: dict[int, Any] = {}
        failures: list[RankFailure] = []
        deadline = time.monotonic() + timeout_s
        while pending and (left_s := deadline - time.monotonic()) > 0:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=min(timeouts.RAY_POLL_S, left_s))
            for ref in done:
                rank = pending.pop(ref)
                outcome = self._outcome(rank, ref)
                if not isinstance(outcome, RankFailure):
                    values[rank] = outcome
                    continue
                failures.append(outcome)
                grace_s = min(self._grace_s, timeouts.RAY_AFTERMATH_S if first_cause(failures).is_own else math.inf)
                deadline = min(deadline, time.monotonic() + grace_s)
        if failures:
            error = as_error(what, failures, len(refs))
            if pending or any(failure.is_process_gone for failure in failures):
                self._end(str(error).partition("\n")[0])
            raise error from error.cause
        if pending:
            late = [f"{rank} ({self._where[rank]})" for rank in sorted(pending.values())]
            message = f"{what}: no answer in {timeout_s:g} s from rank {', '.join(late)}"
            self._end(message)
            raise CollectiveTimeoutError(f"{message}; all ranks have been ended. ray stack shows what a process does")
        return [values[rank] for rank in range(len(refs))]

    def _outcome(self, rank: int, ref: Any) -> Any:
        """What a rank returned, or how it failed."""
        try:
            outcome = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # the process lives: what it was given or returns cannot travel
            return RankFailure(rank, error, self._where[rank], text=str(error))
        except ray.exceptions.RayError as error:
            return RankFailure(rank, error, self._where[rank], is_process_gone=True)
        if not isinstance(outcome, Raised):
            return outcome
        try:
            raised = cloudpickle.loads(outcome.pickled)
        except Exception:  # the driver lacks the class, say
            raised = RuntimeError(outcome.summary)
        return RankFailure(rank, raised, self._where[rank], text=outcome.text)

    def shutdown(self, *, timeout_s: float = 300.0) -> None:
        """Call `shutdown()` of the workers that have it, end all processes and give their room back. Twice is fine.

        Args:
            timeout_s: seconds that the workers' own `shutdown()` may take.

        Raises:
            RankFailedError, CollectiveTimeoutError: it failed, or took longer; the processes are ended all the same.
        """
        if not self._closed:
            try:
                self._run("shutdown", [actor.leave.remote() for actor in self._actors], timeout_s)
            finally:
                self._end("shutdown was called")

    def _end(self, why: str) -> None:
        """End the processes; their scheduler processes end with them."""
        if not self._closed:
            self._closed = why
            try:
                for actor in self._actors:
                    ray.kill(actor)
            finally:
                self.placement.remove()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.shutdown()
        else:
            self._end(f"the driver left with {kind.__name__}")
