"""Fixtures every test may use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.megatron_checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def megatron_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`megatron_checkpoint(tp=2, style="gpt")` is a --save folder of that real checkpoint, made once a session.

    The options are those of launch/make_checkpoint.py. The folder is shared: copy it before changing it.
    """
    made: dict[tuple[tuple[str, Any], ...], Path] = {}

    def checkpoint(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("megatron"), **options)
        return made[key]

    return checkpoint
