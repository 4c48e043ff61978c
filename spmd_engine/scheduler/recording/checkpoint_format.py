"""Weights as transformers keeps them in memory -> weights under the names and shapes of a checkpoint.

Since version 5, transformers fuses or renames some weights when it loads a checkpoint (all experts of a layer become
one tensor) and undoes it when it saves. SGLang's loaders know checkpoints. So we run the undoing, on whatever tensors
we are given: on stand-ins it is recorded like everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch

from spmd_engine.errors import ConfigError
from spmd_engine.scheduler.recording.recording import DTYPE_NAMES

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=torch.Tensor)
# Name, shape, dtype, and whether it is a parameter (FSDP shards these, and leaves buffers whole).
Described = tuple[str, tuple[int, ...], str, bool]


class CheckpointFormat:
    """The way back from memory to checkpoint for one model.

    Args:
        config: the model's Hugging Face configuration.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    def is_known_to_fuse(self) -> bool:
        """Whether transformers keeps weights of this kind of model in another form than checkpoints do."""
        try:
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        except ImportError:
            return False
        return bool(get_checkpoint_conversion_mapping(self._config.model_type))

    def to_checkpoint(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """What `save_pretrained` would make of these weights; unchanged if transformers does nothing to them.

        Args:
            tensors: by their names in a transformers model.
        """
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # transformers 4 keeps weights as checkpoints have them
            return dict(tensors)
        if not tensors or self.empty_model is None:
            return dict(tensors)
        return revert_weight_conversion(self.empty_model, dict(tensors))

    @cached_property
    def empty_model(self) -> Any:
        """The transformers model without storage, or None if transformers has none for this configuration."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(self._config)
        except (ValueError, KeyError, ImportError) as error:
            logger.info("transformers has no model for this configuration, so there is no conversion: %s", error)
            return None

    def trainer_weights(self, *, dtype: str, per_expert: bool = False) -> tuple[list[Described], list[str]]:
        """The weights of the transformers model, and the names of those that an engine may ignore.

        Args:
            dtype: of the trainer's parameters.
            per_expert: each expert's weights have names of their own, rather than being stacked as transformers does.

        Raises:
            ConfigError: transformers has no such model.
        """
        model = self.empty_model
        if model is None:
            raise ConfigError("transformers has no model of this architecture, so the trainer's weights are unknown")
        tensors = model.state_dict(keep_vars=True)
        if per_expert:
            with torch.no_grad():
                tensors = self.to_checkpoint(tensors)
        weights: list[Described] = []
        optional, seen, buffers = [], set(), dict(model.named_buffers())
        for name, tensor in tensors.items():
            is_buffer = name in buffers
            if not is_buffer or tensor.dtype in DTYPE_NAMES:
                kind = DTYPE_NAMES[tensor.dtype] if is_buffer else dtype
                weights.append((name, tuple(tensor.shape), kind, not is_buffer))
                if is_buffer or id(tensor) in seen:
                    optional.append(name)
            seen.add(id(tensor))
        return weights, optional
