"""What a TensorRT-LLM engine would load: config.json as its model class reads it, and the rank files checked for it.

Written from tensorrt_llm/models/modeling_utils.py, models/{gpt,llama,qwen,gemma,falcon,deepseek_v2} and mapping.py
alone, without the rule tables and layouts of the exporter, so that a mistake there is not repeated here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from dist_export.errors import Faults
from dist_export.verify import trtllm_blocks as blocks
from dist_export.verify import trtllm_deepseek as deepseek
from dist_export.verify.trtllm_experts import Experts

if TYPE_CHECKING:
    pass

Shape = tuple[int, ...]

GATED = {"swiglu": "silu", "fast-swiglu": "silu", "geglu": "gelu"}
GPT_CLASS = ("GPTForCausalLM", "GPT2LMHeadModel", "NemotronForCausalLM", "Starcoder2ForCausalLM")
LLAMA_CLASS = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")
QWEN_CLASS = (
    *("QWenForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM"),
    *("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
)
GEMMA_CLASS = ("GemmaForCausalLM", "Gemma2ForCausalLM")
FALCON_CLASS = ("FalconForCausalLM",)
"""Architectures and the class that serves them (tensorrt_llm/models/__init__.py, ``MODEL_MAP``)."""
QWEN_TYPES = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
QK_NORM_EPSILON = 1e-5
"""The attention layer's own default, which no class replaces (layers/attention.py)."""
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
PLAIN = ("relu", "silu", "squared-relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


class EngineConfig(Struct, frozen=True):
    """config.json of a dense model without quantization, of one of the classes above."""

    raw: Mapping[str, Any]

    def __post_init__(self) -> None:
        faults = Faults("config.json: not interpreted")
        if self.is_deepseek:
            faults.extend(deepseek.wrong_sizes(self.raw))
            faults.raise_if_any()
        faults.extend(message for holds, message in self._conditions() if not holds)
        faults.raise_if_any()

    def _conditions(self) -> Iterator[tuple[bool, str]]:
        raw, mapping = self.raw, self.raw["mapping"]
        act, positions = raw.get("hidden_act", "gelu"), self.position_type
        known_classes = GPT_CLASS + LLAMA_CLASS + QWEN_CLASS + GEMMA_CLASS + FALCON_CLASS + blocks.DECI_CLASS
        yield self.is_deepseek or raw["architecture"] in known_classes, f"architecture {raw['architecture']}"
        if self.is_deepseek:
            yield from deepseek.conditions(raw)
        if self.is_deci:
            yield from blocks.conditions(raw)
        yield mapping.get("cp_size", 1) == 1, "cp_size other than 1"
        yield mapping["world_size"] == self.tp_size * self.pp_size, "world_size that is not tp_size x pp_size"
        for key, value in (raw.get("quantization") or {}).items():
            yield not (key.endswith("quant_algo") and value), f"quantization.{key} {value}"
        experts = self.experts
        yield experts is None or not (self.is_gpt or self.is_gemma or self.is_falcon), "experts"
        if experts is not None:
            yield from experts.conditions()
        yield not self.is_qwen or raw.get("qwen_type") in QWEN_TYPES, f"qwen_type {raw.get('qwen_type')}"
        yield not raw.get("use_logn_attn", False), "use_logn_attn true"
        for key in ("qk_layernorm", "inner_layernorm", "norm_before_bmm1", "residual_mlp", "share_embedding_table"):
            shared_anyway = key == "share_embedding_table" and self.is_gemma  # ignored there
            yield shared_anyway or not raw.get(key, False), f"{key} true"
        known = (*GATED, *PLAIN) if self.is_gpt else ("silu", *PLAIN) if experts is None else tuple(GATED)
        yield self.is_deepseek or act in known, f"hidden_act {act} of {raw['architecture']}"
        kinds = ("learned_absolute", "rope_gpt_neox", "rope_gptj") if self.is_gpt else ("rope_gpt_neox",)
        yield positions in kinds, f"position_embedding_type {positions} of {raw['architecture']}"
        scaling, scalings = self.rotary_scaling, ("yarn",) if self.is_deepseek else ("linear", "llama3")
        yield scaling is None or scaling["type"] in scalings, f"rotary_scaling {scaling}"
        yield raw["num_attention_heads"] % self.tp_size == 0, "num_attention_heads that do not divide by tp_size"
        yield raw["dtype"] in SAFETENSORS_DTYPES, f"dtype {raw['dtype']}"

    @property
    def is_gpt(self) -> bool:
        return self.raw["architecture"] in GPT_CLASS

    @property
    def is_deci(self) -> bool:
        return self.raw["architecture"] in blocks.DECI_CLASS

    @property
    def is_deepseek(self) -> bool:
        return self.raw["architecture"] in deepseek.DEEPSEEK_CLASS

    @property
    def latent(self) -> deepseek.Latent | None:
        """None for attention whose keys and values are stored whole."""
        return deepseek.Latent.of(self.raw, self.tp_size) if self.is_deepseek else None

    def of_layer(self, layer: int) -> EngineConfig:
        """The configuration of one layer; itself where layers do not differ."""
        if self.is_deepseek:
            return EngineConfig(deepseek.of_layer(self.raw, layer))
        return EngineConfig(blocks.of_layer(self.raw, layer)) if self.is_deci else self

    @property
    def is_qwen(self) -> bool:
        return self.raw["architecture"] in QWEN_CLASS

    @property
    def experts(self) -> Experts | None:
        """None for a dense model."""
        return deepseek.experts(self.raw) if self.is_deepseek else Experts.of(self.raw, is_qwen=self.is_qwen)

    @property
    def qk_norm(self) -> bool:
        """``qwen_type`` alone decides it (models/qwen/model.py)."""
        return self.is_qwen and str(self.raw["qwen_type"]).startswith("qwen3")

    @property
    def is_gemma(self) -> bool:
        return self.raw["architecture"] in GEMMA_CLASS

    @property
    def norms_outputs(self) -> bool:
        """Gemma 2 norms what attention and MLP return."""
        return bool(self.raw["architecture"] == "Gemma2ForCausalLM")

    @property
    def is_falcon(self) -> bool:
        return self.raw["architecture"] in FALCON_CLASS

    @property
    def two_norms(self) -> bool:
        """Falcon's new decoder: attention and MLP side by side, each with a norm."""
        return self.is_falcon and bool(self.raw.get("new_decoder_architecture", False))

    @property
    def parallel_attention(self) -> bool:
        """Attention and MLP side by side."""
        return self.is_falcon and (self.two_norms or bool(self.raw.get("parallel_attention", False)))

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """The norms of a layer."""
        if self.norms_outputs:
            return "input_layernorm", "post_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        if self.parallel_attention:
            return ("input_layernorm", "mlp_layernorm") if self.two_norms else ("input_layernorm",)
        return "input_layernorm", "post_layernorm"

    @property
    def tp_size(self) -> int:
        return int(self.raw["mapping"].get("tp_size", 1))

    @property
    def pp_size(self) -> int:
        return int(self.raw["mapping"].get("pp_size", 1))

    @property
    def vocab_size(self) -> int:
        return int(self.raw["vocab_size"])

    @property
    def hidden_size(self) -> int:
        return int(self.raw["hidden_size"])

    @property
    def head_size(self) -> int:
        default = self.hidden_size // self.raw["num_attention_heads"]
        return int(default if self.is_falcon else self.raw.get("head_size") or default)

    @property
    def local_heads(self) -> int:
        """Query heads of a rank."""
        return int(self.raw["num_attention_heads"]) // self.tp_size

    @property
    def local_kv_heads(self) -> int:
        """Key/value heads of a rank: with fewer heads than ranks every rank has one (layers/attention.py)."""
        return -(-int(self.raw.get("num_key_value_heads") or self.raw["num_attention_heads"]) // self.tp_size)

    @property
    def layer_norm(self) -> bool:
        """LayerNorm with biases in the GPT and Falcon classes, RMSNorm in the others; no field says it."""
        return self.is_gpt or self.is_falcon

    def epsilon(self, norm: str) -> float:
        """Of a norm; Falcon's leaves it out for two of them."""
        default = self.is_falcon and norm.endswith(("ln_f", "post_layernorm"))
        return 1e-5 if default else float(self.raw.get("norm_epsilon", 1e-5))

    @property
    def gated(self) -> bool:
        """The GPT class is gated by the name of the activation, Falcon never, the others always."""
        return not self.is_falcon and (not self.is_gpt or self.raw.get("hidden_act") in GATED)

    @property
    def activation(self) -> str:
        """The function applied to ``fc``."""
        name = str(self.raw.get("hidden_act", "gelu"))
        return GATED.get(name, name)

    @property
    def attention_bias(self) -> bool:
        """Of query, key and value."""
        return self._bias("attn_bias")

    @property
    def dense_bias(self) -> bool:
        """Of the attention's output."""
        return self.attention_bias and not self.is_qwen

    @property
    def mlp_bias(self) -> bool:
        return self._bias("mlp_bias")

    def _bias(self, name: str) -> bool:
        """Of all linear layers, or of those with a switch of their own."""
        one = self.is_gpt or self.is_falcon
        default = self.is_qwen and name == "attn_bias"
        return bool(self.raw.get("bias", self.is_gpt) if one else self.raw.get(name, default))

    @property
    def q_scaling(self) -> float:
        if self.norms_outputs:
            return math.sqrt(float(self.raw["query_pre_attn_scalar"]) / self.head_size)
        scaling = float(self.raw.get("q_scaling", 1.0)) if self.is_gpt else 1.0
        by_layers = self.is_gpt and self.raw.get("apply_query_key_layer_scaling", False)
        return scaling * self.raw["num_hidden_layers"] if by_layers else scaling

    @property
    def embedding_scale(self) -> float | None:
        value = self.raw.get("embedding_scale") if self.is_gpt else None
        value = math.sqrt(self.hidden_size) if self.is_gemma else value
        return None if value is None else float(value)

    def cap(self, name: str) -> float | None:
        """``attn_logit_softcapping`` or ``final_logit_softcapping`` of Gemma 2."""
        value = self.raw.get(name) if self.norms_outputs else None
        return float(value) if value else None

    @property
    def position_type(self) -> str:
        return str(self.raw.get("position_embedding_type", "learned_absolute"))

    @property
    def learned_positions(self) -> bool:
        return self.position_type == "learned_absolute"

    @property
    def rotary_interleaved(self) -> bool:
        return self.position_type == "rope_gptj"

    @property
    def rotary_size(self) -> int:
        """Rotated elements of a head; the Llama class passes no percentage to its attention."""
        return int(self.head_size * (float(self.raw.get("rotary_pct", 1.0)) if self.is_gpt else 1.0))

    @property
    def rotary_base(self) -> float:
        return float(self.raw.get("rotary_base", 10000.0))

    @property
    def rotary_scaling(self) -> dict[str, float | str] | None:
        """With its kind under ``type``; None for no scaling."""
        scaling = self.raw.get("rotary_scaling")
        if scaling is None:
            return None
        kind = scaling.get("type", scaling.get("rope_type"))
        return None if kind == "none" else {**scaling, "type": kind}

    @property
    def parallel_embedding(self) -> bool:
        return not self.is_deepseek and bool(self.raw.get("use_parallel_embedding", False))

    @property
    def embedding_dim(self) -> int:
        return int(self.raw.get("embedding_sharding_dim", 0))

    def stage_layers(self) -> list[range]:
        """Layers per stage, the first stages one more where they do not divide (mapping.py from 1.0 on)."""
        base, extra = divmod(int(self.raw["num_hidden_layers"]), self.pp_size)
        starts = [stage * base + min(stage, extra) for stage in range(self.pp_size + 1)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]

    def shapes(self, stage: int, *, shared_in_mlp: bool = True) -> dict[str, Shape]:
        """Name -> shape of every tensor of a rank of a pipeline stage; tp ranks are alike."""
        hidden, tp = self.hidden_size, self.tp_size
        shapes: dict[str, Shape] = {}
        if stage == 0:
            shapes["transformer.vocab_embedding.weight"] = self._table(self.vocab_size)
            if self.learned_positions:
                positions = int(self.raw["max_position_embeddings"])
                shapes["transformer.position_embedding.weight"] = self._table(positions)
        for local, layer in enumerate(self.stage_layers()[stage]):
            layer_shapes = self.of_layer(layer)._layer_shapes(shared_in_mlp)
            shapes |= {f"transformer.layers.{local}.{name}": shape for name, shape in layer_shapes.items()}
        if stage == self.pp_size - 1:
            shapes |= self._norm_shapes("transformer.ln_f")
            shapes["lm_head.weight"] = (math.ceil(self.vocab_size / tp), hidden)
        return shapes

    def _table(self, rows: int) -> Shape:
        if not self.parallel_embedding:
            return rows, self.hidden_size
        tp = self.tp_size
        return (math.ceil(rows / tp), self.hidden_size) if self.embedding_dim == 0 else (rows, self.hidden_size // tp)

    def _norm_shapes(self, name: str) -> dict[str, Shape]:
        kinds = ("weight", "bias") if self.layer_norm else ("weight",)
        return {f"{name}.{kind}": (self.hidden_size,) for kind in kinds}

    def _layer_shapes(self, shared_in_mlp: bool) -> dict[str, Shape]:
        hidden, queries = self.hidden_size, self.local_heads * self.head_size
        qkv = queries + 2 * self.local_kv_heads * self.head_size
        ffn = int(self.raw["intermediate_size"]) // self.tp_size
        shapes = {name: shape for norm in self.layer_norms for name, shape in self._norm_shapes(norm).items()}
        if self.qk_norm:
            shapes |= dict.fromkeys(("attention.q_layernorm.weight", "attention.k_layernorm.weight"), (self.head_size,))
        linears = {"attention.qkv": (qkv, hidden), "attention.dense": (hidden, queries)}
        if self.latent is not None:
            linears, shapes = {}, shapes | self.latent.shapes()
        biased = {"attention.qkv": self.attention_bias, "attention.dense": self.dense_bias}
        experts = self.experts
        if experts is not None and self.is_deepseek:
            shapes |= deepseek.expert_shapes(experts, shared_in_mlp=shared_in_mlp)
        elif experts is not None:
            shapes |= experts.shapes(shared_in_mlp=shared_in_mlp)
        else:
            linears |= {"mlp.fc": (ffn, hidden), "mlp.proj": (hidden, ffn)}
            linears |= {"mlp.gate": (ffn, hidden)} if self.gated else {}
        for name, shape in linears.items():
            shapes[f"{name}.weight"] = shape
            if biased.get(name, self.mlp_bias):
                shapes[f"{name}.bias"] = shape[:1]
        return blocks.shapes(self.raw, shapes, hidden=hidden, tp_size=self.tp_size) if self.is_deci else shapes
