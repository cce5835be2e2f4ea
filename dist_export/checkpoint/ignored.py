"""What a checkpoint holds beside the model, and why each is left out.

Only tensors matched here are left out; anything else that a model has no place for is an error.
"""

from __future__ import annotations

import re

_REASONS = (
    (re.compile(r"^(chained_\d+\.)?optimizer\."), "optimizer state"),
    (re.compile(r"^(rng_state|rerun_state_machine_state|opt_param_scheduler)\b"), "training state"),
    (re.compile(r"(^|\.)rotary_pos_emb\.inv_freq$"), "rotary table, computed by the target"),
)


def ignored_reason(name: str) -> str | None:
    """Why a tensor of the checkpoint is not part of the model, or None when it is."""
    return next((reason for pattern, reason in _REASONS if pattern.search(name)), None)
