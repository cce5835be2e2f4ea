"""Petrel: the Llama base with a plain squared-ReLU MLP in place of the gated one."""

from dist_export.families import llama
from dist_export.models.config import ModelConfig
from dist_export.models.megatron import DENSE_GPT, linear_bias
from dist_export.models.rules import Family, Scope
from dist_export.targets.huggingface import config as hf
from dist_export.targets.huggingface import tables
from dist_export.targets.huggingface.architecture import HuggingFaceModel
from dist_export.targets.huggingface.tables import LAYER, LOGICAL


def unmet(config: ModelConfig) -> list[str]:
    """Why a model is not a Petrel one; fields as `dist-export inspect` prints them."""
    wanted = (
        (config.normalization == "RMSNorm", f"normalization is {config.normalization}, not RMSNorm"),
        (config.activation == "squared_relu" and not config.gated, "the MLP is not a plain squared-ReLU one"),
        (config.position_embedding == "rope", f"positions are {config.position_embedding}, not rope"),
        (config.num_experts == 0, f"it has {config.num_experts} experts"),
    )
    return [reason for holds, reason in wanted if not holds]


def hf_fields(model: ModelConfig) -> dict[str, object]:
    """ArceeConfig (transformers/models/arcee/configuration_arcee.py)."""
    return {**llama.hf_fields(model), "model_type": "arcee"}


TABLE = (
    *tables.ENDS,
    *tables.norm(LAYER + "input_layernorm", LOGICAL + "attention.norm"),
    *tables.ATTENTION,
    *tables.norm(LAYER + "post_attention_layernorm", LOGICAL + "mlp.norm"),
    *tables.linear(LAYER + "mlp.up_proj", LOGICAL + "mlp.up", bias=linear_bias),
    *tables.linear(LAYER + "mlp.down_proj", LOGICAL + "mlp.down", bias=linear_bias),
    *tables.norm("model.norm", "final_norm", scope=Scope.LAST),
)

PETREL = Family(
    name="petrel",
    description="the Llama base with a squared-ReLU MLP: Petrel",
    unmet=unmet,
    source_rules=DENSE_GPT,
    architectures={
        "hf": (HuggingFaceModel(name="ArceeForCausalLM", rules=TABLE, fields=hf_fields, limits=(*hf.ROPE, hf.DENSE)),),
    },
    unserved={"trtllm": "it has no such class"},
    witnesses={"hf": "transformers"},
)


def make_family(config: ModelConfig) -> Family:
    """Lets `--mapping petrel.py --allow-mapping-code` take this file as it is, before the registry knows the family."""
    return PETREL
