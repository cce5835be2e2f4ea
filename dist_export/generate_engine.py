"""Tokens from built TensorRT-LLM engines, on the GPU they were built for. Nothing else imports tensorrt_llm to run one.

Source: tensorrt_llm/runtime/model_runner.py (`ModelRunner.from_dir`, `ModelRunner.generate`), releases 0.12 to 1.2.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_export.errors import ExportError
from dist_export.generation_options import GenerationOptions


def is_engine(folder: Path) -> bool:
    """Whether a folder holds engines."""
    return (folder / "rank0.engine").is_file()


def generate_with_engine(
    folder: Path, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> list[list[int]] | None:
    """The token ids that follow each prompt; None on ranks other than 0.

    Of engines for several GPUs every rank calls it, under ``mpirun -n``. Raises `ExportError` without TensorRT-LLM.
    """
    try:
        trtllm: Any = importlib.import_module("tensorrt_llm")
        runtime: Any = importlib.import_module("tensorrt_llm.runtime")
    except ImportError as error:
        raise ExportError(
            f"{folder}: engines are run by TensorRT-LLM, which is not installed here ({error})"
        ) from error
    import torch

    rank = int(trtllm.mpi_rank())
    runner = runtime.ModelRunner.from_dir(engine_dir=str(folder), rank=rank)
    end = -1 if options.stop_token is None else options.stop_token
    found = []
    for prompt in prompts:
        # Of both zero (top_p is where nothing is said) the sampling kernels make the likeliest token.
        drawn = {"temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        sampling = {"top_k": 1} if options.temperature == 0 else drawn
        output = runner.generate(
            [torch.tensor(prompt, dtype=torch.int32)],
            max_new_tokens=options.max_new_tokens,
            end_id=end,
            pad_id=max(end, 0),
            random_seed=options.seed,
            **sampling,
        )
        tokens = [int(token) for token in output[0][0][len(prompt) : len(prompt) + options.max_new_tokens]]
        found.append(tokens[: tokens.index(end)] if end in tokens else tokens)
    return found if rank == 0 else None
