"""Every SGLang name that starts a scheduler, for each supported version (0.5.17 to 0.5.23)."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import gc
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from spmd_engine.control.messages import Start
from spmd_engine.errors import ConfigError, SpmdEngineError
from spmd_engine.scheduler.adapter.cpu_memory import CpuMemorySaver
from spmd_engine.scheduler.adapter.gloo import share_device
from spmd_engine.scheduler.adapter.model import model_of, tensors_of

logger = logging.getLogger(__name__)

# SGLang's own watchdog and timeouts act by one rank's clock and signal the parent process: ours act instead.
_NEVER_S = 1e8
_PR_SET_PDEATHSIG = 1
_CPU_DEFAULTS = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    # SGLang would size the KV cache by a share of the whole machine's memory, in each of its ranks.
    "max_total_tokens": 65536,
    "chunked_prefill_size": 8192,
}
_START_ERRORS = (
    ValueError, AssertionError, LookupError, AttributeError, TypeError, ImportError, OSError, NotImplementedError,
)  # fmt: skip


def import_models() -> None:
    """Import SGLang's scheduler and all of its models, for a process that forks afterwards."""
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401


def make_server_args(start: Start) -> Any:
    """`ServerArgs` as SGLang resolves them.

    Raises:
        ConfigError: an unknown field, or values that SGLang refuses.
    """
    from sglang.srt.server_args import ServerArgs

    known = set(inspect.signature(ServerArgs).parameters)
    for name in start.server_args:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{name!r} is not an argument of this SGLang version's ServerArgs{hint}")
    values: dict[str, Any] = {"log_level": "warning", **start.server_args}
    if start.on_cpu:
        defaults = {name: value for name, value in _CPU_DEFAULTS.items() if name in known}
        # torch_memory_saver needs CUDA; `CpuMemorySaver` takes its place once the scheduler stands.
        without = {"enable_memory_saver": False, "enable_weights_cpu_backup": False}
        if values.get("grammar_backend") == "xgrammar":
            raise ConfigError("SGLang's xgrammar backend needs a GPU: on the CPU use grammar_backend='llguidance'")
        values = {**defaults, **values, **without, "device": "cpu"}
    values.update(
        model_path=start.model_path,
        tp_size=len(start.group.ranks),
        random_seed=start.random_seed,
        nccl_port=start.store_port,
        nnodes=start.nnodes,
        node_rank=start.node_rank,
        dist_init_addr=_join_host_port(start.group.host, start.store_port),
        watchdog_timeout=_NEVER_S,
    )
    try:
        args = ServerArgs(**values)
        if hasattr(args, "resolve_once"):
            args.resolve_once()
        args.check_server_args()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"SGLang refuses these server arguments: {type(error).__name__}: {error}") from error
    return args


def _join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parallel_ranks(args: Any, tp_rank: int) -> dict[str, int]:
    """SGLang's layout of attention-CP, MoE-DP and MoE-EP ranks inside the TP group (without DP attention)."""
    attn_tp_size = args.tp_size // args.attn_cp_size
    moe_size = args.tp_size // args.moe_dp_size
    return {
        "attn_cp_rank": (tp_rank // attn_tp_size) % args.attn_cp_size,
        "moe_dp_rank": tp_rank // moe_size,
        "moe_ep_rank": tp_rank % moe_size // (moe_size // args.ep_size),
    }


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Without garbage collection: of what modules make nothing is garbage, and looking takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _join_sglang(args: Any, start: Start) -> dict[str, int | None]:
    """Make this process the one of its rank, and return what Scheduler wants to know about that rank."""
    from sglang.srt.managers import scheduler as module
    from sglang.srt.runtime_context import publish

    if "tp_rank" in inspect.signature(module.Scheduler.__init__).parameters:
        ranks = {"tp_rank": start.tp_rank, "pp_rank": 0, "dp_rank": None, "gpu_id": start.gpu_id}
        ranks.update(_parallel_ranks(args, start.tp_rank))
        module.configure_scheduler_process(args, **ranks)
        publish(args, role="scheduler")
    else:
        from sglang.srt.runtime_context import SpawnRanks, spawn_world_rank

        ranks = {}
        world_rank = spawn_world_rank(args, tp_rank=start.tp_rank, pp_rank=0)
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=start.gpu_id))
        module.configure_scheduler_process(args, start.gpu_id)
    # SGLang has just asked for PDEATHSIG. It would strike when the starting thread of the trainer ends, and before the
    # watchdog could tell the peers why this process ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    return ranks


def make_scheduler(start: Start, *, receiver: Any, sink: Any) -> Any:
    """SGLang's Scheduler for one TP rank, which takes requests from `receiver` and gives outputs to `sink`.

    Args:
        receiver: has `recv_requests(local_reqs=None)`, called at each turn of SGLang's event loop.
        sink: has `send_output(output, request=None)`.

    Raises:
        ConfigError: SGLang refuses the arguments or the model.
    """
    with _importing():
        from sglang.srt.managers import scheduler as module
        from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs

        load_plugins()
        args = make_server_args(start)
        ranks = _join_sglang(args, start)
        importlib.import_module("sglang.srt.models.registry")  # which imports every model there is

    class RankLocalScheduler(module.Scheduler):
        """SGLang's Scheduler with its two ends, input and output, connected to this process's own trainer rank."""

        def init_ipc_channels(self, port_args: Any) -> None:
            self.ipc_channels = SchedulerIpcChannels(
                recv_from_tokenizer=None,
                recv_from_rpc=None,
                send_to_tokenizer=sink,
                send_to_detokenizer=sink,
                send_metrics_from_scheduler=None,
            )
            self.load_snapshot_writer = None
            self.recv_from_tokenizer = None

        def init_request_receiver(self) -> None:
            self.request_receiver = receiver

        def init_output_streamer(self) -> None:
            super().init_output_streamer()
            self.output_streamer.__class__ = _only_news(type(self.output_streamer))

    names = dict.fromkeys(inspect.signature(PortArgs).parameters, "")
    optional = {"tokenizer_worker_ipc_name": None, "decoupled_spec_ipc_config": None}
    ports = PortArgs(**{**names, **{k: v for k, v in optional.items() if k in names}, "nccl_port": start.store_port})
    _check_heads(args, start)
    share_device()
    store = _serve_store(start)
    try:
        scheduler = RankLocalScheduler(args, ports, **ranks)
        if start.on_cpu and start.server_args.get("enable_memory_saver"):
            _use_cpu_memory_saver(scheduler, keeps_weights=bool(start.server_args.get("enable_weights_cpu_backup")))
        del store  # the process group has it now
        return scheduler
    except SpmdEngineError:
        raise
    except _START_ERRORS as error:
        logger.exception("SGLang did not start")
        raise ConfigError(
            f"SGLang cannot start {start.model_path!r} with TP {len(start.group.ranks)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _only_news(streamer: type) -> type:
    """SGLang's output streamer, without the long way of each step through requests that have nothing to report."""

    class OnlyNews(streamer):  # type: ignore[misc]
        __slots__ = ()

        def stream_output(self, reqs: list[Any], *args: Any, **kwargs: Any) -> None:
            news = [req for req in reqs if req.stream or req.finished_reason is not None]
            if news:
                super().stream_output(news, *args, **kwargs)

    return OnlyNews


def build_without_weights(start: Start) -> torch.nn.Module:
    """SGLang's model for one TP rank, alone in its process, with parameters whose memory nobody has touched.

    SGLang starts as always, but in process groups of torch's `fake` backend, whose collectives end at once, and goes no
    further than to where weights would come. It is for a process that does nothing else: some functions are replaced.

    Args:
        start: of a rank on the CPU. Its server arguments must say `load_format="dummy"`.

    Raises:
        ConfigError: SGLang refuses the arguments or the model.
    """
    import torch.distributed as dist
    from sglang.srt.model_executor import model_runner
    from sglang.srt.model_loader import loader
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class _Built(BaseException):
        """Not an error: the model stands."""

    def stop(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        raise _Built(model)

    init, new = dist.init_process_group, dist.new_group
    dist.init_process_group = lambda *args, world_size, rank, **kwargs: init(  # type: ignore[assignment]
        "fake", store=FakeStore(), world_size=world_size, rank=rank
    )
    dist.new_group = lambda ranks=None, *args, **kwargs: new(ranks, backend="fake")  # type: ignore[assignment]
    loader.initialize_dummy_weights = stop
    # On the CPU, SGLang adds heads until the TP size divides them: it would be another model than on a GPU.
    model_runner.adjust_config_with_unaligned_cpu_tp = lambda model_config, *args: model_config
    try:
        make_scheduler(start, receiver=None, sink=None)
    except _Built as built:
        model: torch.nn.Module = built.args[0]
        return model
    raise RuntimeError("SGLang started without asking for weights")


def _serve_store(start: Start) -> torch.distributed.TCPStore | None:
    """On the first rank, the store where SGLang's process group will meet, on the socket that was bound for it.

    SGLang would let torch open one, which listens on all interfaces, at a port that may be taken by then. In the
    process of a `multi_tenant` store torch opens no second one at the same port, but shares it while it is referred to.
    """
    if start.store_fd < 0:
        return None
    return torch.distributed.TCPStore(
        host_name=start.group.host,
        port=start.store_port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=start.store_fd,
        use_libuv=True,
    )


def _check_heads(args: Any, start: Start) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    try:
        heads = ModelConfig.from_server_args(args).num_attention_heads
    except Exception as error:
        raise ConfigError(
            f"SGLang cannot read the model {start.model_path!r}: {type(error).__name__}: {error}"
        ) from error
    tp_size = len(start.group.ranks)
    if heads % tp_size:
        raise ConfigError(
            f"the model has {heads} attention heads, which TP {tp_size} does not divide: choose another TP size"
        )


def _use_cpu_memory_saver(scheduler: Any, *, keeps_weights: bool) -> None:
    """Let SGLang's memory handlers pause and resume by the kernel's means.

    Args:
        keeps_weights: a copy of the weights in CPU memory is wanted: on the CPU they stay where they are.

    Raises:
        ConfigError: a KV cache of an unknown kind.
    """
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    layers = [tensor for name in ("k_buffer", "v_buffer", "kv_buffer") for tensor in getattr(pool, name, None) or ()]
    if not layers:
        raise ConfigError(f"on the CPU the memory saver does not know the KV cache {type(pool).__name__}")
    tensors: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
        "kv_cache": lambda: [*layers, scheduler.req_to_token_pool.req_to_token]
    }
    if not keeps_weights:
        tensors["weights"] = lambda: [tensor for _, tensor in tensors_of(model_of(scheduler))]
    scheduler.weight_updater.memory_saver_adapter = CpuMemorySaver(tensors, lost=("weights",))
    # SGLang's handler synchronises torch's default device: since torch 2.14 that is a GPU wherever torch is built for
    # one, even if there is none.
    default = torch.get_device_module
    torch.get_device_module = lambda device=None: default("cpu" if device is None else device)  # type: ignore[assignment]
