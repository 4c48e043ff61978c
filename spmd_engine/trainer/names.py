"""Names of weights as a checkpoint has them: without those of the modules that trainers wrap models in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from spmd_engine.errors import PlanError

# What FSDP1, torch.compile and activation checkpointing call the module inside; no model calls a module of its own so.
_WRAPPED = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
_ADAPTERS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"})
_DDP = "module."


def join(*parts: str) -> str:
    """The parts of a name put together, without empty ones and wrappers."""
    return ".".join(part for name in parts for part in name.split(".") if part and part not in _WRAPPED)


Rename = Callable[[str], str]


def checkpoint_names(names: Iterable[str], source: object, rename: Rename | None = None) -> dict[str, str]:
    """For each name in `source` that of the weight in a checkpoint.

    Args:
        names: of the weights of `source`.
        rename: the user's own last word on each name.
        source: a module, or a mapping. DDP's `module.` is an ordinary name, so it is dropped where a module shows
            that it is DDP's, and from a mapping if every name begins with it.

    Raises:
        PlanError: two weights would have one name, `rename` gives none, or some belong to adapters that are not merged.
    """
    listed = list(names)
    prefixes = _ddp_prefixes(source) if isinstance(source, torch.nn.Module) else []
    cleaned = [join(name) for name in listed]
    if not isinstance(source, torch.nn.Module) and all(name.startswith(_DDP) for name in cleaned):
        prefixes = [""]
    owners: dict[str, str] = {}
    for name, short in zip(listed, cleaned, strict=True):
        for prefix in prefixes:
            if short.startswith(prefix + _DDP):
                short = prefix + short[len(prefix + _DDP) :]
        if not _ADAPTERS.isdisjoint(short.split(".")):
            raise PlanError(
                f"weight {name!r} belongs to a LoRA adapter that is not merged: the engine runs whole weights, so pass "
                "the merged model (PEFT's merge_and_unload()), or a mapping of merged weights under checkpoint names"
            )
        if rename is not None:
            short = rename(short)
            if not isinstance(short, str) or not short:
                raise PlanError(f"rename must return a name for weight {name!r}, got {short!r}")
        if short in owners:
            how = "without their wrappers' names" if rename is None else "after rename"
            raise PlanError(f"weights {owners[short]!r} and {name!r} are both {short!r} {how}")
        owners[short] = name
    return {name: short for short, name in owners.items()}


def _ddp_prefixes(source: torch.nn.Module) -> list[str]:
    """Cleaned prefixes of the modules that are DDP's, the longest first, so that the others stay true."""
    kinds = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    found = {join(prefix) for prefix, module in source.named_modules() if isinstance(module, kinds)}
    return sorted((f"{prefix}." if prefix else "" for prefix in found), key=len, reverse=True)
