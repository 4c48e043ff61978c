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

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=torch.Tensor)


class Conversion:
    """The way back from memory to checkpoint for one model.

    Args:
        config: the model's Hugging Face configuration.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

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
