"""What a model computed on the way from token ids to logits, under names that all the runners share.

Importing this module imports torch.
"""

from __future__ import annotations

import torch
from msgspec import Struct, field

EMBEDDING = "embedding"
ATTENTION_NORM = "attention norm"
QUERY, KEY, VALUE = "query", "key", "value"
"""[batch, position, head, head size]; query and key after the rotary embedding."""
GENERATION_QUERY = "query of generation"
"""Of latent attention, with the keys' projection taken in: [batch, position, head, latent and rotated size]."""
CONTEXT = "attention context"
"""What goes into the attention's output projection."""
ATTENTION_OUTPUT = "attention output"
MLP_NORM = "MLP norm"
GATE, UP = "MLP gate", "MLP up"
"""Before the activation function; a plain MLP has only `UP`."""
ACTIVATION = "MLP activation"
"""What goes into the down projection."""
ROUTER = "router"
"""How much of each expert a token gets, [batch, position, expert]; zero for those it does not go to."""
MLP_OUTPUT = "MLP output"
LAYER_OUTPUT = "output"
FINAL_NORM = "final norm"


def prompt_length(num_positions: int) -> int:
    """How many of the positions of a run are a prompt, for attention that computes generated tokens another way."""
    return (num_positions + 1) // 2


class Point(Struct, frozen=True):
    """A place in a model: a name above, in a layer (numbered from 0 over the whole model) or outside them."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layer {self.layer}: {self.name}"


class Trace(Struct):
    """One run: logits and the hidden states in the order they were computed."""

    states: dict[Point, torch.Tensor] = field(default_factory=dict)
    """[batch, position, …]"""
    sources: dict[Point, str] = field(default_factory=dict)
    """The tensors that made a state, where the runner knows their names."""
    logits: torch.Tensor | None = None
    """[batch, position, vocabulary without its padding]"""

    def record(self, point: Point, state: torch.Tensor, source: str = "") -> None:
        """Keep a state; the caller must not change it afterwards."""
        assert point not in self.states, f"{point} was recorded twice"
        self.states[point] = state.detach()
        if source:
            self.sources[point] = source


class Unrecorded(Trace):
    """A run of which only the logits are kept."""

    def record(self, point: Point, state: torch.Tensor, source: str = "") -> None:
        """Nothing."""
