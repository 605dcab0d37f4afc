"""Reads the weights out of what DeepSpeed saved, without its engine. Owns the names of its files; writes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from broker.process.lifecycle import ErgonError

TAG = "engine"
_STATES = "mp_rank_00_model_states.pt"


def read_weights(policy: torch.nn.Module, directory: Path) -> None:
    """Put a checkpoint's weights into a policy, whatever the ZeRO stage and the number of ranks that saved it.

    Raises ErgonError where it is of another model.
    """
    try:
        policy.load_state_dict(_state(directory))
    except (RuntimeError, FileNotFoundError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ErgonError(
            f"the checkpoint {directory} does not fit the run's model.path or learner.lora: {reason}"
        ) from error


def _state(directory: Path) -> dict[str, Any]:
    if (directory / TAG / _STATES).is_file():
        saved = torch.load(directory / TAG / _STATES, map_location="cpu", mmap=True, weights_only=False)
        module: dict[str, Any] = saved["module"]
        return module
    # ZeRO-3: no rank has a whole tensor. What is rounded here from the float32 master copy is what every rank has.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=TAG)
    return whole
