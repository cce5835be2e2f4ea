"""Exports that several tests look at, made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.exports import export


@pytest.fixture(scope="session")
def finished(
    megatron_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """`finished({"style": "gpt"}, "--tp", 2)` is that checkpoint and its export, not to be changed."""
    made: dict[str, Path] = {}

    def get(checkpoint: Mapping[str, object], *options: object) -> tuple[Path, Path]:
        source, key = megatron_checkpoint(**checkpoint), str((checkpoint, options))
        if key not in made:
            made[key] = export(source, tmp_path_factory.mktemp("exports") / "out", *options)
        return source, made[key]

    return get
