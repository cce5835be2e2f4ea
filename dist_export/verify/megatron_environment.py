"""Megatron-Core's process groups, in one process or over the ranks of a run, and stand-ins for its CUDA calls on a CPU.

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
from msgspec import Struct

from dist_export.errors import ExportError
from dist_export.verify import megatron_experts as experts
from dist_export.verify import megatron_layers as variants

INSTALL_HINT = "the checkpoint's own model is run by Megatron-Core; run: pip install megatron-core einops"


class Ranks(Struct, frozen=True):
    """The processes that hold one model together, seen from one of them: tp x pp of them, tp ranks side by side."""

    rank: int = 0
    tp: int = 1
    pp: int = 1
    store: Any = None
    """A `torch.distributed.Store` that all of them reach; not needed by one."""

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.tp * self.pp

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank's stage has the embedding."""
        return self.rank < self.tp

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's stage has the output layer."""
        return self.rank >= self.world_size - self.tp

    @property
    def tp_group(self) -> Any:
        """The process group of the ranks that share this stage's layers; None where this rank has them alone."""
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_group() if self.tp > 1 else None

    def layers_of_last_stage(self, num_layers: int) -> int | None:
        """Of stages that cannot all have as many: the others have the same number, the last one fewer, or more where
        nothing would be left. None where they can."""
        if num_layers % self.pp == 0:
            return None
        others = self.pp - 1
        most = -(-num_layers // self.pp)
        return num_layers - others * (most if others * most < num_layers else num_layers // self.pp)


ONE = Ranks()


@contextlib.contextmanager
def megatron_on_cpu(ranks: Ranks = ONE, *, on_gpu: bool = False) -> Iterator[None]:
    """A process group of `ranks`, Megatron's parallel state, and its CUDA calls replaced (unless `on_gpu`: then NCCL
    and the current GPU are used); all undone afterwards. All ranks call it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        raise ExportError("this process already has a torch process group: run the checkpoint's model in its own")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        try:
            from megatron.core import parallel_state
        except ImportError as error:
            raise ExportError(f"{INSTALL_HINT} ({error})") from error
        if not on_gpu:
            stack.enter_context(cuda_on_cpu())
        stack.enter_context(_nothing_drawn())
        from megatron.core.fusions import fused_softmax
        from megatron.core.models.common.language_module.language_module import LanguageModule

        from dist_export.verify.megatron_modules import sliding_window_mask

        if not on_gpu:
            stack.enter_context(_replaced(fused_softmax, {"get_sliding_window_causal_mask": sliding_window_mask}))
        # Stages that share a weight would copy it from the first to the last: both are filled from the checkpoint.
        stack.enter_context(_replaced(LanguageModule, {"_is_in_embd_group": lambda _: False}))
        stack.enter_context(experts.without_fused_router())
        stack.enter_context(variants.latent_attention_on_cpu())
        store = torch._C._distributed_c10d.HashStore() if ranks.store is None else ranks.store
        backend = "cpu:gloo,cuda:nccl" if on_gpu and ranks.world_size > 1 else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(ranks.tp, ranks.pp)
        stack.callback(parallel_state.destroy_model_parallel)
        yield


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """The CUDA calls that Megatron-Core makes while it builds, saves and runs a model on a CPU, replaced."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(torch.cuda, _CUDA_ON_CPU))
        stack.enter_context(_replaced(torch.Tensor, {"cuda": lambda tensor, *_, **__: tensor}))
        stack.enter_context(_nothing_drawn())
        yield


@contextlib.contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Megatron's random states replaced: weights are filled, and nothing is dropped."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import layers, random

    with contextlib.ExitStack() as stack:
        for module in (random, tensor_parallel, layers):
            stack.enter_context(_replaced(module, {"get_cuda_rng_tracker": lambda *_, **__: _NoRngTracker()}))
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
