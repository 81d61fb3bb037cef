"""The cases of make_adapter_golden.py, as data: options of PEFT's LoraConfig, and how the file is stored."""

from dataclasses import dataclass, field
from typing import Any

BASES = ("untied", "tied")
TRAINED_TOKENS = [5, 17, 301]
"""Ids that every prompt holds, so that a change of their embeddings shows."""
HEAD_TOKENS = [5, 44, 45, 200]


@dataclass(frozen=True, kw_only=True)
class AdapterCase:
    """An adapter on each of `bases`. `options` go to LoraConfig, the file holds `dtype`, float32 is computed with.

    `converted` saves what an initialisation that changes the base weights has trained as a plain adapter. `copies`
    leaves it to PEFT whether the file holds copies of the base's embeddings; without it there are none. Seeds are tried
    from `first_seed` on; cases with the same modules and the same seed have the same tensors. With `num_labels` the
    model is a sequence classifier.
    """

    name: str
    options: dict[str, Any]
    dtype: str = "bfloat16"
    bases: tuple[str, ...] = BASES
    converted: bool = False
    copies: bool = True
    first_seed: int = 0
    num_labels: int | None = None


@dataclass(frozen=True, kw_only=True)
class MergeCase:
    """`add_weighted_adapter` of two plain cases."""

    name: str
    combination_type: str
    adapters: tuple[str, ...] = ("qv", "rslora")
    weights: list[float] = field(default_factory=lambda: [0.7, 0.5])
    first_seed: int = 0


def case(
    name: str,
    *,
    dtype: str = "bfloat16",
    bases: tuple[str, ...] = BASES,
    copies: bool = True,
    first_seed: int = 0,
    num_labels: int | None = None,
    **options: Any,
) -> AdapterCase:
    """An adapter for q_proj and v_proj with r 8 and alpha 16, but for what `options` say."""
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    options = defaults | options
    kept = {"bases": bases, "copies": copies, "first_seed": first_seed, "num_labels": num_labels}
    return AdapterCase(name=name, options=options, dtype=dtype, **kept)


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The first key that matches counts, so the layer's own comes before the module's.
RANKS: dict[str, Any] = {
    "rank_pattern": {
        r"layers\.1\.self_attn\.q_proj": 3,
        "q_proj": 12,
        r"model\.layers\.[02]\.mlp\.up_proj": 5,
        "down_proj": 2,
    },
    "alpha_pattern": {"v_proj": 4, r".*\.2\.mlp\.down_proj": 7, "gate_proj": 24.5},
}

CASES = (
    case("qv", dtype="float32"),
    case("all_linear", r=16, target_modules="all-linear"),
    case("rank_1", r=1, lora_alpha=2, target_modules=SEVEN),
    case("rank_40", r=40, target_modules=SEVEN),
    case("patterns", target_modules=SEVEN, **RANKS),
    # Seeds of its own: the merges add it to `qv`, whose modules it has.
    case("rslora", use_rslora=True, dtype="float32", first_seed=100),
    case("rslora_patterns", use_rslora=True, target_modules=SEVEN, **RANKS),
    case("dora", use_dora=True, target_modules=SEVEN),
    case("dora_patterns", use_dora=True, target_modules=SEVEN, dtype="float32", **RANKS),
    case("dora_embeddings", use_dora=True, target_modules=["q_proj", "embed_tokens", "lm_head"], copies=False),
    case("lora_bias", lora_bias=True, target_modules=["q_proj", "o_proj", "down_proj"]),
    case("bias_lora_only", bias="lora_only"),
    case("bias_all", bias="all"),
    case("bias_dora", bias="lora_only", use_dora=True),
    case("save_lm_head", modules_to_save=["lm_head"]),
    case("save_embed_tokens", modules_to_save=["embed_tokens"]),
    case("save_both", modules_to_save=["embed_tokens", "lm_head"]),
    case("save_tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True, bases=("tied",)),
    case("embed_tokens", target_modules=["q_proj", "embed_tokens"]),
    case("lm_head", target_modules=["q_proj", "lm_head"]),
    case("embeddings", target_modules=["q_proj", "embed_tokens", "lm_head"]),
    case(
        "embeddings_tied",
        target_modules=["q_proj", "embed_tokens"],
        ensure_weight_tying=True,
        bases=("tied",),
        copies=False,
    ),
    case("tokens_list", trainable_token_indices=TRAINED_TOKENS),
    case("tokens_embed", trainable_token_indices={"embed_tokens": TRAINED_TOKENS}),
    case("tokens_head", trainable_token_indices={"lm_head": HEAD_TOKENS}),
    case("tokens_both", trainable_token_indices={"embed_tokens": TRAINED_TOKENS, "lm_head": HEAD_TOKENS}),
    case("tokens_same", trainable_token_indices={"embed_tokens": TRAINED_TOKENS, "lm_head": TRAINED_TOKENS}),
    case("one_layer", layers_to_transform=[1], target_modules=SEVEN),
    case("regex", target_modules=r".*\.[02]\.(self_attn\.[qo]|mlp\.down)_proj"),
    case("k_up", target_modules=["k_proj", "up_proj"]),
    case("excluded", target_modules="all-linear", exclude_modules=["v_proj", "model.layers.0.mlp.gate_proj"]),
    case("gaussian", init_lora_weights="gaussian"),
    case("float16", dtype="float16", target_modules=SEVEN),
    case("classifier_3", num_labels=3, task_type="SEQ_CLS"),
    case("classifier_5", num_labels=5, task_type="SEQ_CLS", dtype="float32", target_modules=SEVEN, use_rslora=True),
    AdapterCase(
        name="pissa_converted",
        options=case("", r=4, lora_alpha=4, init_lora_weights="pissa").options,
        dtype="float32",
        converted=True,
    ),
    AdapterCase(
        name="olora_converted",
        options=case("", r=4, lora_alpha=4, init_lora_weights="olora", use_rslora=True).options,
        dtype="float32",
        converted=True,
    ),
)

MERGES = tuple(MergeCase(name=f"merged_{kind}", combination_type=kind) for kind in ("cat", "svd", "linear"))

# Configs that must be refused. A class's name stands for an instance of PEFT's class with these arguments.
REFUSED: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": ("CordaConfig", {})},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": ("LoftQConfig", {"loftq_bits": 4})},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": ("LoraGAConfig", {})},
    "alora": {"alora_invocation_tokens": [7, 8]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "qalora": {"use_qalora": True},
    "bdlora": {"use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["o_proj"], "nblocks": 2})},
    "kasa": {"kasa_config": ("KasaConfig", {})},
    "monteclora": {"monteclora_config": ("MontecloraConfig", {})},
    "arrow": {"arrow_config": ("ArrowConfig", {})},
    "velora": {"velora_config": ("VeloraConfig", {})},
    "megatron": {"megatron_config": {"sequence_parallel": False}, "megatron_core": "megatron.core"},
    "target_parameters": {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}

# Configs whose training differs, but whose files are plain.
HARMLESS: dict[str, dict[str, Any]] = {
    "eva": {"init_lora_weights": "eva", "eva_config": ("EvaConfig", {})},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
