"""Distributed export of Megatron checkpoints."""

__version__ = "0.1.0"
