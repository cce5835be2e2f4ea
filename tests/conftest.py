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


@pytest.fixture(scope="session")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough to be stopped within: about 13 MB of float32, 200 tiles of 64 KiB. Copied, never changed."""
    torch = pytest.importorskip("torch")
    from support.small_models import LLAMA, small_model
    from support.torch_dist import write_torch_dist

    sizes = {"hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 8, "kv_channels": 32}
    model = small_model(LLAMA, num_layers=2, padded_vocab_size=3072, dtype=torch.float32, **sizes)
    folder = tmp_path_factory.mktemp("long") / "iter_0000010"
    return write_torch_dist(folder, model.tensors, args=model.args)


@pytest.fixture(scope="session")
def quantized_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scheme -> a real model that ModelOpt quantised, as a --save folder. Never changed."""
    pytest.importorskip("torch")
    from support.quantized import unpack

    return unpack(tmp_path_factory.mktemp("quantized"))
