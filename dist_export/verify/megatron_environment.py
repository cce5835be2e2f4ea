"""Megatron-Core in one process on a CPU: a process group of one, and stand-ins for the CUDA calls that it makes.

Importing this module imports torch; megatron-core is imported when it runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dist_export.errors import ExportError
from dist_export.verify import megatron_experts as experts
from dist_export.verify import megatron_layers as variants

INSTALL_HINT = "the checkpoint's own model is run by Megatron-Core; run: pip install megatron-core einops"


@contextlib.contextmanager
def megatron_on_cpu(*, on_gpu: bool = False) -> Iterator[None]:
    """A process group of one, Megatron's parallel state, and its CUDA calls replaced (unless `on_gpu`); all undone
    afterwards."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        raise ExportError("this process already has a torch process group: compute reference logits in one of its own")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        try:
            from megatron.core import parallel_state, tensor_parallel
            from megatron.core.tensor_parallel import layers, random
        except ImportError as error:
            raise ExportError(f"{INSTALL_HINT} ({error})") from error
        stack.enter_context(_replaced(torch.cuda, {} if on_gpu else _CUDA_ON_CPU))
        for module in (random, tensor_parallel, layers):
            stack.enter_context(_replaced(module, {"get_cuda_rng_tracker": lambda *_, **__: _NoRngTracker()}))
        from megatron.core.fusions import fused_softmax

        from dist_export.verify.megatron_modules import sliding_window_mask

        stack.enter_context(_replaced(fused_softmax, {"get_sliding_window_causal_mask": sliding_window_mask}))
        stack.enter_context(experts.without_fused_router())
        stack.enter_context(variants.latent_attention_on_cpu())
        dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(1, 1)
        stack.callback(parallel_state.destroy_model_parallel)
        yield


class _NoRngTracker:
    """Stands in for the tracker of CUDA random states: nothing is drawn here."""

    def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


_CUDA_ON_CPU: Mapping[str, Any] = {
    "current_device": lambda: "cpu",
    "synchronize": lambda *_: None,
    "Stream": lambda *_, **__: None,
    "get_device_capability": lambda *_: (9, 0),
}


@contextlib.contextmanager
def _replaced(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of a module or class exchanged for a while."""
    before = {name: getattr(owner, name) for name in attributes if hasattr(owner, name)}
    for name in before:
        setattr(owner, name, attributes[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about missing GPU libraries that importing and building print."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
