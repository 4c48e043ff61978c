"""Every SGLang name that the scheduler process uses, for each supported version (0.5.17 to 0.5.23)."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from spmd_engine.channel import Start
from spmd_engine.errors import ConfigError, InvalidRequestError, SpmdEngineError
from spmd_engine.requests import FunctionCall, GenerateRequest
from spmd_engine.scheduler.cpu_memory import CpuMemorySaver

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
# A larger tensor that a module keeps beside its parameters is one that it derives from them.
_MAX_KEPT_BYTES = 1 << 20


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
        tp_size=len(start.link.ranks),
        random_seed=start.random_seed,
        nccl_port=start.store_port,
        nnodes=start.nnodes,
        node_rank=start.node_rank,
        dist_init_addr=_join_host_port(start.link.host, start.store_port),
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


def make_scheduler(start: Start, *, receiver: Any, sink: Any) -> Any:
    """SGLang's Scheduler for one TP rank, which takes requests from `receiver` and gives outputs to `sink`.

    Args:
        receiver: has `recv_requests(local_reqs=None)`, called at each turn of SGLang's event loop.
        sink: has `send_output(output, request=None)`.

    Raises:
        ConfigError: SGLang refuses the arguments or the model.
    """
    from sglang.srt.managers import scheduler as module
    from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs

    load_plugins()
    args = make_server_args(start)

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

    names = dict.fromkeys(inspect.signature(PortArgs).parameters, "")
    optional = {"tokenizer_worker_ipc_name": None, "decoupled_spec_ipc_config": None}
    ports = PortArgs(**{**names, **{k: v for k, v in optional.items() if k in names}, "nccl_port": start.store_port})
    ranks = {"tp_rank": start.tp_rank, "pp_rank": 0, "dp_rank": None, "gpu_id": start.gpu_id}
    by_publish = "tp_rank" not in inspect.signature(module.Scheduler.__init__).parameters
    if by_publish:
        from sglang.srt.runtime_context import SpawnRanks, spawn_world_rank

        world_rank = spawn_world_rank(args, tp_rank=start.tp_rank, pp_rank=0)
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=start.gpu_id))
        module.configure_scheduler_process(args, start.gpu_id)
    else:
        ranks.update(_parallel_ranks(args, start.tp_rank))
        module.configure_scheduler_process(args, **ranks)
        publish(args, role="scheduler")
    # SGLang has just asked for PDEATHSIG. It would strike when the starting thread of the trainer ends, and before the
    # watchdog could tell the peers why this process ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    _check_heads(args, start)
    store = _serve_store(start)
    try:
        scheduler = RankLocalScheduler(args, ports, **({} if by_publish else ranks))
        if start.on_cpu and start.server_args.get("enable_memory_saver"):
            _use_cpu_memory_saver(scheduler, keeps_weights=bool(start.server_args.get("enable_weights_cpu_backup")))
        del store  # the process group has it now
        return scheduler
    except SpmdEngineError:
        raise
    except _START_ERRORS as error:
        logger.exception("SGLang did not start")
        raise ConfigError(
            f"SGLang cannot start {start.model_path!r} with TP {len(start.link.ranks)}: {type(error).__name__}: {error}"
        ) from error


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
        host_name=start.link.host,
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
    tp_size = len(start.link.ranks)
    if heads % tp_size:
        raise ConfigError(
            f"the model has {heads} attention heads, which TP {tp_size} does not divide: choose another TP size"
        )


def model_of(scheduler: Any) -> torch.nn.Module:
    """The model whose parameters SGLang computes with."""
    return scheduler.tp_worker.model_runner.model


def hf_config_of(scheduler: Any) -> Any:
    return scheduler.model_config.hf_config


def _tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers(), *_unregistered(model)]


def _unregistered(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Tensors that modules keep as plain attributes, with their names."""
    return [
        (f"{prefix}.{name}", value)
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]


def checksums(scheduler: Any) -> dict[str, str]:
    """A digest of the bytes of every parameter, every buffer, and every tensor that a module derived from them."""
    found = {}
    for name, tensor in _tensors_of(model_of(scheduler)):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found[name] = hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
    return found


@contextlib.contextmanager
def _apart_from_paused(scheduler: Any) -> Iterator[None]:
    """SGLang 0.5.17 wants an idle scheduler where one is enough whose requests are paused: they hold no memory."""
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    try:
        yield
    finally:
        scheduler.waiting_queue = waiting


def memory_bytes(scheduler: Any, device: torch.device) -> dict[str, int]:
    """Bytes of the weights, of the KV cache, and of what CUDA graphs keep, on the device of the parameters."""
    tensors = [tensor for _, tensor in _tensors_of(model_of(scheduler)) if tensor.device == device]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    cache = getattr(scheduler.token_to_kv_pool_allocator.get_kvcache(), "get_kv_size_bytes", lambda: 0)()
    graphs = 0
    if device.type == "cuda":
        # Graphs are captured into pools of their own; pool (0, 0) is the allocator's default.
        segments = torch.cuda.memory_snapshot()
        graphs = sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))
    return {
        "weights": sum(storages.values()),
        "kv_cache": sum(cache) if isinstance(cache, tuple) else int(cache),
        "cuda_graph": graphs,
    }


def flush_cache(scheduler: Any) -> None:
    """Drop the prefix cache. The scheduler is idle when this is called, or paused."""
    with _apart_from_paused(scheduler):
        if not scheduler.flush_cache(empty_cache=False):
            raise RuntimeError("SGLang did not flush its cache although no request runs")


def make_abort(rid: str) -> Any:
    """SGLang's demand to end all requests whose ids begin so."""
    from sglang.srt.managers.io_struct import AbortReq

    return AbortReq(rid=rid)


def make_pause() -> Any:
    """SGLang's demand to stop its loop and to put all requests back into its queue, with their tokens."""
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    return PauseGenerationReqInput(mode="retract")


def make_resume() -> Any:
    """SGLang's demand to go on after a pause."""
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    return ContinueGenerationReqInput(torch_empty_cache=False)


def can_pause(scheduler: Any) -> bool:
    """Whether nothing is on its way that a pause would not stop: a grammar that is being compiled, for example."""
    return not scheduler.grammar_manager.has_waiting_grammars()


def paused_requests(scheduler: Any) -> list[Any]:
    """SGLang's objects for the requests that wait, after a pause all that there are."""
    return list(scheduler.waiting_queue)


def release_memory(scheduler: Any, tag: str) -> None:
    """Give the memory of an awake tag back, by SGLang's own handler. No request runs, and no kernel."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    with _apart_from_paused(scheduler):
        scheduler.weight_updater.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=[tag]))


def resume_memory(scheduler: Any, tag: str) -> None:
    """Take the memory of a sleeping tag again, at the same addresses. It must be there, or the process ends."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

    scheduler.weight_updater.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=[tag]))


def unregistered_constants(scheduler: Any) -> list[torch.Tensor]:
    """Small tensors that modules keep beside parameters and buffers: no update writes them, and SGLang restores only
    buffers. Which experts are local is one, for example."""
    return [tensor for _, tensor in _unregistered(model_of(scheduler)) if 0 < tensor.nbytes <= _MAX_KEPT_BYTES]


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
        tensors["weights"] = lambda: [tensor for _, tensor in _tensors_of(model_of(scheduler))]
    scheduler.weight_updater.memory_saver_adapter = CpuMemorySaver(tensors, lost=("weights",))
    # SGLang's handler synchronises torch's default device: since torch 2.14 that is a GPU wherever torch is built for
    # one, even if there is none.
    default = torch.get_device_module
    torch.get_device_module = lambda device=None: default("cpu" if device is None else device)  # type: ignore[assignment]


def refresh_derived(model: torch.nn.Module) -> None:
    """Derive again what the model derives from its parameters (MLA's w_kc and w_vc, for example)."""
    if hasattr(model, "post_load_weights"):
        with torch.no_grad():
            model.post_load_weights()  # type: ignore[operator]


def make_request(request: GenerateRequest, rid: str, scheduler: Any, *, stream: bool = False) -> Any:
    """SGLang's request object.

    Raises:
        InvalidRequestError: SGLang would refuse it.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    known = set(SamplingParams.__struct_fields__)
    for name in request.sampling_params:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            raise InvalidRequestError(
                f"unknown sampling parameter {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    try:
        params = SamplingParams(**request.sampling_params)
        params.normalize(scheduler.tokenizer)
        params.verify(scheduler.model_config.vocab_size)
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidRequestError(f"invalid sampling parameters {request.sampling_params}: {error}") from error
    if scheduler.server_args.grammar_backend == "none" and any(
        getattr(params, name) is not None for name in ("json_schema", "regex", "ebnf", "structural_tag")
    ):
        raise InvalidRequestError(
            "constrained output needs a grammar backend: SpmdEngine(..., grammar_backend='xgrammar'), on the CPU "
            "'llguidance'"
        )
    if request.priority is not None and not scheduler.server_args.enable_priority_scheduling:
        raise InvalidRequestError("priority= needs SpmdEngine(..., enable_priority_scheduling=True)")
    _check_tokens(request, params, scheduler)
    return TokenizedGenerateReqInput(
        rid=rid,
        input_text=request.text,
        input_ids=request.input_ids,
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=request.return_logprob,
        logprob_start_len=request.logprob_start_len,
        top_logprobs_num=request.top_logprobs_num,
        token_ids_logprob=request.token_ids_logprob,
        stream=stream,
        priority=request.priority,
    )


def _check_tokens(request: GenerateRequest, params: Any, scheduler: Any) -> None:
    """The checks that SGLang's tokenizer manager makes; without them the scheduler would index out of bounds."""
    vocab, context = int(scheduler.model_config.vocab_size), int(scheduler.model_config.context_len)
    length = len(request.input_ids)
    limit = min(context, int(scheduler.max_req_input_len))
    if length >= limit:
        raise InvalidRequestError(
            f"a prompt has {length} tokens; this engine takes fewer than {limit} "
            f"(context length {context}, KV cache {int(scheduler.max_total_num_tokens)} tokens)"
        )
    if params.max_new_tokens is not None and length + params.max_new_tokens > context:
        raise InvalidRequestError(
            f"{length} prompt tokens + max_new_tokens={params.max_new_tokens} exceed the context length of {context}"
        )
    low, high = min(request.input_ids), max(request.input_ids)
    if low < 0 or high >= vocab:
        raise InvalidRequestError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab}")
    if any(not 0 <= token < vocab for token in request.token_ids_logprob or ()):
        raise InvalidRequestError(f"token_ids_logprob {request.token_ids_logprob} is outside the vocabulary of {vocab}")
    if request.top_logprobs_num < 0 or request.logprob_start_len < -1 or request.logprob_start_len > length:
        raise InvalidRequestError(
            f"top_logprobs_num={request.top_logprobs_num} must be at least 0 and logprob_start_len="
            f"{request.logprob_start_len} between -1 and the prompt's length {length}"
        )


def parse_function_calls(text: str, tools: list[Any], parser: str, tokenizer: Any) -> tuple[str, list[FunctionCall]]:
    """The text around the function calls in `text`, and the calls, as one of SGLang's parsers finds them.

    Raises:
        InvalidRequestError: there is no such parser, the tools are not described as OpenAI's API wants them, or the
            parser fails on the text.
    """
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    known = sorted(FunctionCallParser.ToolCallParserEnum)
    if parser not in known:
        raise InvalidRequestError(f"SGLang has no function-call parser {parser!r}; it has {', '.join(known)}")
    try:
        made = [Tool(**tool) for tool in tools]
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(
            f"tools must look like {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}: {error}"
        ) from error
    try:
        rest, found = FunctionCallParser(made, parser, tokenizer=tokenizer).parse_non_stream(text)
    except Exception as error:
        raise InvalidRequestError(f"SGLang's parser {parser!r} fails: {type(error).__name__}: {error}") from error
    return rest, [FunctionCall(call.name or "", call.parameters) for call in found]


def make_batch(requests: list[Any]) -> Any:
    """One message for a whole rollout."""
    from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput

    return BatchTokenizedGenerateReqInput(batch=requests)
