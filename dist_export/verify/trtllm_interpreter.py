"""A reference interpreter of TensorRT-LLM checkpoints in plain torch: what the engine would compute, without TensorRT.

It follows the engine's model classes (model.py of tensorrt_llm/models/{gpt,llama,qwen,gemma,falcon,deepseek_v2},
layers/attention.py, mlp.py, embedding.py, linear.py). config.json alone tells it what to do. Each tensor-parallel
rank's share is computed from that rank's file only and combined as the engine's all-reduce and all-gather would;
pipeline stages run one after the other with their own layer numbers. Only one layer's weights are in memory at a
time.

Importing this module imports torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from msgspec import Struct
from torch.nn import functional

from dist_export.verify import trace as at
from dist_export.verify import trtllm_expert_layer as expert_layer
from dist_export.verify import trtllm_latent as latent_attention
from dist_export.verify.trace import Point, Trace, Unrecorded
from dist_export.verify.trtllm_blocks import kinds
from dist_export.verify.trtllm_deepseek import Latent
from dist_export.verify.trtllm_engine import QK_NORM_EPSILON, EngineConfig
from dist_export.verify.trtllm_experts import Experts
from dist_export.verify.trtllm_files import RankFile, open_ranks

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "squared-relu": _squared_relu,
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), _gelu),
}
"""tensorrt_llm/functional.py, ``ACT2FN``: every gelu is the tanh approximation."""


def run_trtllm(folder: Path, tokens: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> Trace:
    """Run token ids [batch, position] through the TensorRT-LLM checkpoint in `folder`, computing in `dtype`.

    The logits cover `vocab_size`. Where generated tokens are computed in another way than a prompt's, so are the second
    half of them. Raises `ExportError` when config.json asks for something that is not interpreted
    and when a rank file lacks a tensor, has one too many or one of another shape or dtype than the engine would load.
    """
    config, ranks = open_ranks(folder)
    with torch.inference_mode():
        return _Run(config, ranks, dtype, num_prompt=at.prompt_length(tokens.shape[1])).run(tokens)


class TrtllmModel(Struct, frozen=True):
    """A TensorRT-LLM checkpoint to be run many times; quantised weights are decoded, activations are not rounded."""

    config: EngineConfig
    ranks: Sequence[RankFile]

    @classmethod
    def open(cls, folder: Path) -> TrtllmModel:
        """Raises `ExportError` as `run_trtllm` does."""
        return cls(*open_ranks(folder, decoded=True))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, position, vocabulary] in float32 of token ids [batch, position], all of them as of a prompt."""
        run = _Run(self.config, self.ranks, torch.float32, num_prompt=tokens.shape[1])
        run.trace = Unrecorded()
        with torch.inference_mode():
            logits = run.run(tokens).logits
        assert logits is not None, "the run has finished"
        return logits


class _Stage(Struct, frozen=True):
    """The tp ranks of one pipeline stage, and its layers."""

    files: Sequence[RankFile]
    layers: range

    def names(self, name: str) -> str:
        return f"{name} in {', '.join(file.path.name for file in self.files)}"


class _Run:
    def __init__(self, config: EngineConfig, ranks: Sequence[RankFile], dtype: torch.dtype, *, num_prompt: int) -> None:
        self.config, self.dtype, self.trace, self.num_prompt = config, dtype, Trace(), num_prompt
        size = config.tp_size
        self.stages = [
            _Stage(ranks[stage * size : (stage + 1) * size], layers)
            for stage, layers in enumerate(config.stage_layers())
        ]

    def run(self, tokens: torch.Tensor) -> Trace:
        positions = torch.arange(tokens.shape[1])
        hidden = self._embed(tokens, positions)
        rotary = Rotary.of(self.config, positions)
        for stage in self.stages:
            for local, layer in enumerate(stage.layers):
                hidden = _Layer(self, stage, local, layer, rotary).run(hidden)
        last = self.stages[-1]
        hidden = self.norm(last.files[0], "transformer.ln_f", hidden)
        self.trace.record(Point(at.FINAL_NORM), hidden, last.names("transformer.ln_f"))
        logits = torch.cat([self.linear(file, "lm_head", hidden) for file in last.files], -1)
        cap = self.config.cap("final_logit_softcapping")
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        self.trace.logits = logits[..., : self.config.vocab_size].float()
        return self.trace

    def load(self, file: RankFile, name: str) -> torch.Tensor:
        return file.load(name).to(self.dtype)

    def linear(self, file: RankFile, name: str, x: torch.Tensor, *, bias: bool = False) -> torch.Tensor:
        """One rank's product, with its bias if it is to be added here."""
        return functional.linear(
            x, self.load(file, f"{name}.weight"), self.load(file, f"{name}.bias") if bias else None
        )

    def row_linear(
        self, files: Sequence[RankFile], name: str, parts: Sequence[torch.Tensor], bias: bool
    ) -> torch.Tensor:
        """Partial products summed by the all-reduce, then the bias once (linear.py, ``RowLinear``).

        With attention and MLP side by side the all-reduce is that of their sum, so every rank adds its bias before it.
        """
        if self.config.parallel_attention:
            return sum_of([self.linear(file, name, x, bias=bias) for file, x in zip(files, parts, strict=True)])
        total = sum_of([self.linear(file, name, part) for file, part in zip(files, parts, strict=True)])
        return total + self.load(files[0], f"{name}.bias") if bias else total

    def norm(self, file: RankFile, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, shape = self.load(file, f"{name}.weight"), (self.config.hidden_size,)
        if self.config.layer_norm:
            return functional.layer_norm(x, shape, weight, self.load(file, f"{name}.bias"), self.config.epsilon(name))
        return functional.rms_norm(x, shape, weight, self.config.epsilon(name))

    def _embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        config, stage = self.config, self.stages[0]
        hidden = self._lookup("transformer.vocab_embedding", tokens)
        if config.learned_positions:
            hidden = hidden + self._lookup("transformer.position_embedding", positions)
        if config.embedding_scale is not None:
            hidden = hidden * config.embedding_scale
        names = "transformer.vocab_embedding" + (" and position_embedding" if config.learned_positions else "")
        self.trace.record(Point(at.EMBEDDING), hidden, stage.names(names))
        return hidden

    def _lookup(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """embedding.py: rows divided by rank are looked up where they are and summed; columns are gathered."""
        files = self.stages[0].files
        if not self.config.parallel_embedding:
            return self.load(files[0], f"{name}.weight")[ids]
        tables = (self.load(file, f"{name}.weight") for file in files)
        if self.config.embedding_dim == 1:
            return torch.cat([table[ids] for table in tables], -1)
        parts, start = [], 0
        for table in tables:
            local = ids - start
            mine = (local >= 0) & (local < table.shape[0])
            parts.append(table[torch.where(mine, local, 0)] * mine[..., None])
            start += table.shape[0]
        return sum_of(parts)


class _Layer:
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)); Falcon's adds both to the same x."""

    def __init__(self, run: _Run, stage: _Stage, local: int, layer: int, rotary: Rotary | None) -> None:
        self.parent, self.config, self.files, self.rotary = run, run.config.of_layer(layer), stage.files, rotary
        self.stage, self.layer, self.prefix = stage, layer, f"transformer.layers.{local}."

    def run(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.is_deci:
            return self._run_block(x)
        normed = self._norm("input_layernorm", at.ATTENTION_NORM, x)
        if self.config.parallel_attention:
            mlp_input = self._norm("mlp_layernorm", at.MLP_NORM, x) if self.config.two_norms else normed
            x = x + self._attention(normed) + self._mlp(mlp_input)
        else:
            x = x + self._attention(normed)
            before_mlp = "pre_feedforward_layernorm" if self.config.norms_outputs else "post_layernorm"
            x = x + self._mlp(self._norm(before_mlp, at.MLP_NORM, x))
        self._record(at.LAYER_OUTPUT, x, "")
        return x

    def _run_block(self, x: torch.Tensor) -> torch.Tensor:
        """nemotron_nas/model.py: attention and MLP, or a column-parallel linear layer or nothing in their place."""
        attention, ffn = kinds(self.config.raw)
        if attention != "no_op":
            normed = self._norm("input_layernorm", at.ATTENTION_NORM, x)
            x = x + (self._gathered("attention", normed) if attention == "linear" else self._attention(normed))
        if ffn != "no_op":
            normed = self._norm("post_layernorm", at.MLP_NORM, x)
            x = x + (self._gathered("ffn", normed) if ffn == "linear" else self._mlp(normed))
        self._record(at.LAYER_OUTPUT, x, "")
        return x

    def _gathered(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.parent.linear(file, self.prefix + name, x) for file in self.files], -1)

    def _returned(self, norm: str, out: torch.Tensor) -> torch.Tensor:
        """What attention or MLP adds to the residual."""
        return self.parent.norm(self.files[0], self.prefix + norm, out) if self.config.norms_outputs else out

    def _record(self, name: str, state: torch.Tensor, source: str) -> None:
        self.parent.trace.record(Point(name, self.layer), state, self.stage.names(self.prefix + source))

    def _norm(self, name: str, point: str, x: torch.Tensor) -> torch.Tensor:
        x = self.parent.norm(self.files[0], self.prefix + name, x)
        self._record(point, x, name)
        return x

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.latent is not None:
            return self._latent_attention(self.config.latent, x)
        bias = self.config.attention_bias
        qkv = [self.parent.linear(file, self.prefix + "attention.qkv", x, bias=bias) for file in self.files]
        parts = [self._heads(file, product) for file, product in zip(self.files, qkv, strict=True)]
        for number, name in enumerate((at.QUERY, at.KEY, at.VALUE)):
            gathered = torch.cat([part[number] for part in parts], 2)
            self._record(name, gathered, f"attention.qkv ({name} rows)")
        contexts = [self._attend(*part) for part in parts]
        self._record(at.CONTEXT, torch.cat(contexts, -1), "attention.qkv")
        out = self.parent.row_linear(self.files, self.prefix + "attention.dense", contexts, self.config.dense_bias)
        out = self._returned("post_layernorm", out)
        self._record(at.ATTENTION_OUTPUT, out, "attention.dense")
        return out

    def _latent_attention(self, latent: Latent, x: torch.Tensor) -> torch.Tensor:
        assert self.rotary is not None, "latent attention without rotary embedding"
        prefix = f"{self.prefix}attention."
        parts = []
        for file in self.files:
            load = functools.partial(self._load, file, prefix)
            parts.append(latent_attention.heads_of(latent, load, self.rotary.rotate, x))
        for name, source in latent_attention.SOURCES.items():
            states = torch.cat([latent_attention.state(latent, part, name) for part in parts], 2)
            self._record(name, states, source)
        contexts = [latent_attention.attend(latent, part, self.parent.num_prompt) for part in parts]
        self._record(at.CONTEXT, torch.cat(contexts, -1), "attention.kv_b_proj (value rows)")
        out = self.parent.row_linear(self.files, prefix + "dense", contexts, False)
        self._record(at.ATTENTION_OUTPUT, out, "attention.dense")
        return out

    def _load(self, file: RankFile, prefix: str, name: str) -> torch.Tensor:
        return self.parent.load(file, prefix + name)

    def _heads(self, file: RankFile, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One rank's fused product -> its query, key and value heads [batch, position, head, head size], rotated."""
        queries, keys = self.config.local_heads, self.config.local_kv_heads
        heads = qkv.reshape(*qkv.shape[:-1], -1, self.config.head_size)
        query, key, value = torch.split(heads, [queries, keys, keys], 2)
        if self.config.qk_norm:
            query, key = self._normed(file, "q_layernorm", query), self._normed(file, "k_layernorm", key)
        if self.rotary is not None:
            query, key = self.rotary.rotate(query), self.rotary.rotate(key)
        return query, key, value

    def _normed(self, file: RankFile, name: str, heads: torch.Tensor) -> torch.Tensor:
        """Every head by itself, with one weight for all."""
        weight = self.parent.load(file, f"{self.prefix}attention.{name}.weight")
        return functional.rms_norm(heads, (self.config.head_size,), weight, QK_NORM_EPSILON)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of one rank's heads: consecutive query heads share a key/value head."""
        repeats = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = 1 / (math.sqrt(self.config.head_size) * self.config.q_scaling)
        cap = self.config.cap("attn_logit_softcapping")
        if cap is not None:
            scores = cap * torch.tanh(q @ k.transpose(-1, -2) * scale / cap)
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(2)

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        """mlp.py: ``fc`` is activated; a gated MLP multiplies that with ``gate``."""
        if self.config.experts is not None:
            return self._experts(self.config.experts, x)
        bias, gated, mlp = self.config.mlp_bias, self.config.gated, "ffn" if self.config.is_deci else "mlp"
        fc = [self.parent.linear(file, f"{self.prefix}{mlp}.fc", x, bias=bias) for file in self.files]
        self._record(at.GATE if gated else at.UP, torch.cat(fc, -1), "mlp.fc")
        inner = [ACTIVATIONS[self.config.activation](part) for part in fc]
        if gated:
            gate = [self.parent.linear(file, f"{self.prefix}{mlp}.gate", x, bias=bias) for file in self.files]
            self._record(at.UP, torch.cat(gate, -1), "mlp.gate")
            inner = [a * b for a, b in zip(inner, gate, strict=True)]
        self._record(at.ACTIVATION, torch.cat(inner, -1), "mlp.fc and mlp.gate" if gated else "mlp.fc")
        out = self.parent.row_linear(self.files, f"{self.prefix}{mlp}.proj", inner, bias)
        out = self._returned("post_feedforward_layernorm", out)
        self._record(at.MLP_OUTPUT, out, "mlp.proj")
        return out

    def _experts(self, experts: Experts, x: torch.Tensor) -> torch.Tensor:
        weights = expert_layer.router_weights(experts, self.files[0], self.prefix, x)
        self._record(at.ROUTER, weights, "mlp.router")
        act = ACTIVATIONS[self.config.activation]
        parts = [
            expert_layer.rank_output(experts, rank, file, self.prefix, x, weights, act)
            for rank, file in enumerate(self.files)
        ]
        out = sum_of(parts)
        self._record(at.MLP_OUTPUT, out, expert_layer.sources(experts))
        return out


class Rotary(Struct, frozen=True):
    """Angles of the rotary embedding (functional.py, ``RopeEmbeddingUtils`` and ``apply_rotary_pos_emb``)."""

    cos: torch.Tensor  # [position, rotated size / 2]
    sin: torch.Tensor
    interleaved: bool

    @staticmethod
    def of(config: EngineConfig, positions: torch.Tensor) -> Rotary | None:
        """The angles at `positions`; None when the model has no rotary embedding."""
        if config.learned_positions:
            return None
        if config.latent is not None:
            return Rotary(*latent_attention.angles(config.latent, positions), interleaved=True)
        size = config.rotary_size
        frequencies = 1.0 / config.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.outer(positions.float(), _scaled(frequencies, config.rotary_scaling))
        return Rotary(angles.cos(), angles.sin(), config.rotary_interleaved)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the first elements of every head of x [batch, position, head, head size]; the rest passes."""
        size = 2 * self.cos.shape[-1]
        head, rest = x[..., :size], x[..., size:]
        a, b = (head[..., ::2], head[..., 1::2]) if self.interleaved else head.chunk(2, -1)
        cos, sin = (angles[:, None].to(x.dtype) for angles in (self.cos, self.sin))
        turned = (a * cos - b * sin, b * cos + a * sin)
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat((joined, rest), -1)


def _scaled(frequencies: torch.Tensor, scaling: dict[str, float | str] | None) -> torch.Tensor:
    """Linear scaling, or that of Llama 3.1: long wavelengths are stretched, short ones kept, a ramp between."""
    if scaling is None:
        return frequencies
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return frequencies / factor
    low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
    turns = float(scaling.get("original_max_position_embeddings", 8192)) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def sum_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """What an all-reduce of the ranks' partial results gives."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
