"""Names of SGLang's model and of what its modules hold, for each supported version (0.5.17 to 0.5.23)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spmd_engine.errors import PlanError

# Marks of layers, or of their quant_method, whose process_weights_after_loading permutes bfloat16 weights.
_LAID_OUT_ANEW = {
    "use_flashinfer_trtllm_moe": "with another moe_runner_backend, 'triton' for example",
    "w13_swiglu_interleaved": "without SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED in its environment",
}
# Methods by which modules derive tensors from their parameters.
_DERIVES = ("post_load_weights", "_set_mla_wkc_wvc", "fuse_scale")


def model_of(scheduler: Any) -> torch.nn.Module:
    """The model whose parameters SGLang computes with."""
    return scheduler.tp_worker.model_runner.model


def hf_config_of(scheduler: Any) -> Any:
    return scheduler.model_config.hf_config


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All tensors of a model by name, those among them that its modules keep without registering them."""
    return [*model.named_parameters(), *model.named_buffers(), *unregistered(model)]


def unregistered(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
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
    for name, tensor in tensors_of(model_of(scheduler)):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found[name] = hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
    return found


def check_kept_as_loaded(model: torch.nn.Module) -> None:
    """Refuse a model some of whose parameters SGLang lays out anew after its loader has filled them.

    Raises:
        PlanError: with what to do.
    """
    for name, module in model.named_modules():
        for flag, remedy in _LAID_OUT_ANEW.items():
            if any(getattr(owner, flag, False) for owner in (module, getattr(module, "quant_method", None))):
                raise PlanError(
                    f"the kernels of {name} keep its weights in another order than SGLang loads them ({flag}): "
                    f"start the engine {remedy}"
                )


def _attributes(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.Tensor]]:
    """The tensors that modules keep without registering them."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]


@contextlib.contextmanager
def restore_attributes(model: torch.nn.Module) -> Iterator[None]:
    """Give modules the tensors back that they had beside parameters: a recording derives others from no values."""
    before = _attributes(model)
    try:
        yield
    finally:
        for module, name, old in before:
            if vars(module).get(name) is not old:
                setattr(module, name, old)


@contextlib.contextmanager
def keep_addresses(model: torch.nn.Module) -> Iterator[None]:
    """Let tensors that modules keep beside parameters stay where they are: CUDA graphs have their addresses.

    SGLang's loaders derive some of them anew. Such a one is copied to where its predecessor was.
    """
    before = _attributes(model)
    yield
    for module, name, old in before:
        new = vars(module).get(name)
        if new is old or not isinstance(new, torch.Tensor):
            continue
        if (new.shape, new.stride(), new.dtype, new.device) == (old.shape, old.stride(), old.dtype, old.device):
            with torch.no_grad():
                old.copy_(new)
            setattr(module, name, old)


def derivations(model: torch.nn.Module) -> list[Callable[[], Any]]:
    """What derives again all that modules derive from their parameters (MLA's w_kc and w_vc, for example)."""
    for name in _DERIVES:
        if hasattr(model, name):
            return [getattr(model, name)]  # it does so for its parts, too
    return [found for part in model.children() for found in derivations(part)]
