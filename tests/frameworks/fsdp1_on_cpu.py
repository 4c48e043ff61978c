"""What verl with FSDP1 needs on a machine without an accelerator, whichever its version. Importing it is enough."""

from __future__ import annotations

from torch.distributed.fsdp import _init_utils


class Cpu(str):
    """What torch takes for the CPU, and what is a number in verl's f"cpu:{current_device()}"."""

    def __format__(self, spec):
        return "0"


# FSDP1 sends the first rank's weights to the others on GPUs alone, as NCCL would need; gloo has them on the CPU.
_init_utils._check_module_states_for_sync_module_states = lambda module: None
