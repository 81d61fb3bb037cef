"""adapter_config.json: what is accepted, what is refused and how scaling follows from it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from qwen2_jax.errors import AdapterError
from qwen2_jax.lora.config import AdapterConfig, parse_config
from qwen2_jax.lora.files import read_config
from tests.lora.adapters import ADAPTERS

FILE = Path("adapter_config.json")
# PEFT's own configs of the kinds that are refused: folder -> the field that the message names.
REFUSED = {
    "pissa": "init_lora_weights='pissa_niter_16' changed the base's weights",
    "olora": "init_lora_weights='olora' changed the base's weights",
    "corda": "init_lora_weights='corda' changed the base's weights",
    "loftq": "init_lora_weights='loftq' changed the base's weights",
    "lora_ga": "init_lora_weights='lora_ga' changed the base's weights",
    "alora": r"alora_invocation_tokens=\[7, 8\]",
    "layer_replication": "layer_replication=",
    "qalora": "use_qalora=True",
    "bdlora": "use_bdlora=",
    "kasa": "kasa_config=",
    "velora": "velora_config=",
    "monteclora": "monteclora_config=",
    "arrow": "arrow_config=",
    "megatron": "megatron_config=",
    "target_parameters": "target_parameters=",
    "fan_in_fan_out": "fan_in_fan_out=True",
}


def parse(**fields: Any) -> AdapterConfig:
    """Parse a LoRA config with `fields` as JSON would bring them."""
    return parse_config(FILE, json.loads(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | fields)))


@pytest.mark.parametrize("kind", sorted(path.name for path in (ADAPTERS / "refused").iterdir()))
def test_what_is_not_served_is_refused_by_name(kind: str) -> None:
    with pytest.raises(AdapterError, match=REFUSED[kind]):
        read_config(ADAPTERS / "refused" / kind)


@pytest.mark.parametrize("kind", sorted(path.name for path in (ADAPTERS / "harmless").iterdir()))
def test_initialisations_that_leave_the_base_alone_are_plain(kind: str) -> None:
    assert read_config(ADAPTERS / "harmless" / kind) == parse()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not served"),
        ({"peft_type": None}, "peft_type=None is not served"),
        ({"r": 0}, "r=0 is not an integer from 1"),
        ({"r": -4}, "r=-4 is not"),
        ({"r": 8.0}, r"r=8\.0 is not"),
        ({"r": True}, "r=True is not"),
        ({"r": None}, "r=None is not"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan is not a finite number"),
        ({"lora_alpha": math.inf}, "lora_alpha=inf is not"),
        ({"lora_alpha": 10**400}, "lora_alpha=an integer of 1329 bits is not"),
        ({"lora_alpha": "16"}, "lora_alpha='16' is not"),
        ({"lora_alpha": 0}, "lora_alpha=0 is not a finite number other than 0"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 is not"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern=\['q_proj'\] is not an object"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\]=None is not"),
        ({"alpha_pattern": {"(q": 1}}, r"key '\(q' of alpha_pattern is not a regular expression"),
        ({"rank_pattern": {r"\p{L}": 1}}, r"of rank_pattern is not a regular expression: bad escape"),
        ({"use_rslora": 1}, "use_rslora=1 is not true or false"),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias are both true"),
        ({"bias": "some"}, "bias='some' is not"),
        ({"init_lora_weights": "magic"}, "init_lora_weights='magic' is not true, false or one of gaussian"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is not a list"),
        ({"trainable_token_indices": {"wte": [1]}}, "trainable_token_indices names 'wte'; use 'embed_tokens'"),
        ({"trainable_token_indices": [1, 1]}, "is not a list of distinct token ids"),
        ({"trainable_token_indices": [-1]}, "is not a list of distinct token ids"),
        ({"trainable_token_indices": {"lm_head": []}}, "is not a list of distinct token ids"),
        ({"trainable_token_indices": 5}, "trainable_token_indices=5 is not a list of token ids, or an object"),
        ({"use_new_trick": True}, "the field 'use_new_trick'=True is unknown"),
        ({"new_config": {"a": 1}}, "the field 'new_config'=.* is unknown"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        parse(**fields)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_and_a_refused_one_at_its_default_are_accepted(value: Any) -> None:
    assert parse(use_new_trick=value, use_qalora=value, alora_invocation_tokens=value) == parse()


@pytest.mark.parametrize(
    ("fields", "path", "rank", "scaling"),
    [
        ({}, "model.layers.0.self_attn.q_proj", 8, 2.0),
        ({"use_rslora": True}, "model.layers.0.self_attn.q_proj", 8, 16 / math.sqrt(8)),
        ({"rank_pattern": {"q_proj": 4}}, "model.layers.0.self_attn.q_proj", 4, 4.0),
        ({"rank_pattern": {"q_proj": 4}}, "model.layers.0.self_attn.eq_proj", 8, 2.0),
        ({"rank_pattern": {"q_proj": 4, r"layers\.0\..*": 2}}, "model.layers.0.self_attn.q_proj", 4, 4.0),
        ({"rank_pattern": {r"layers\.0\..*": 2, "q_proj": 4}}, "model.layers.0.self_attn.q_proj", 2, 8.0),
        ({"rank_pattern": {"^q_proj": 4}}, "model.layers.0.self_attn.q_proj", 8, 2.0),
        ({"alpha_pattern": {"q_proj|k_proj": 4}, "use_rslora": True}, "layers.9.self_attn.k_proj", 8, 4 / math.sqrt(8)),
        ({"alpha_pattern": {"lm_head": 2.5}, "rank_pattern": {"lm_head": 5}}, "lm_head", 5, 0.5),
        ({"lora_alpha": -8}, "lm_head", 8, -1.0),
    ],
)
def test_the_first_pattern_that_matches_gives_rank_and_alpha(
    fields: dict[str, Any], path: str, rank: int, scaling: float
) -> None:
    config = parse(**fields)
    assert config.rank(path) == rank
    assert config.scaling(path) == pytest.approx(scaling)


STALLING = "(l|[a-l]|a|e|y)+r*(.|\\w)*[A-Z]"


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_does_not_come_to_an_end_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("qwen2_jax.lora.config._MATCH_SECONDS", 0.05)
    found = parse(**{name: {STALLING: 2}})
    message = f"the key {STALLING!r} of {name} takes more than 0.05 s to match 'model.layers.0"
    with pytest.raises(AdapterError, match=re.escape(message)):
        found.scaling("model.layers.0.self_attn.q_proj" + "a" * 30)
    assert found.scaling("lm_head") == 2.0


def test_patterns_match_as_those_of_peft_do() -> None:
    """PEFT uses `re.match`."""
    keys = (
        "q_proj|k_proj",
        r"layers\.(1|2\d)\..*",
        "(?i:Q_PROJ)",
        r".*[^.]proj",
        "",
        r"(?<!e)q_proj",
        r"(?P<x>q)(?P=x)*_proj",
    )
    paths = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1, 27) for name in ("q_proj", "eq_proj", "qq_proj")]
    for key in keys:
        config = parse(alpha_pattern={key: 3}, r=1, lora_alpha=5)
        for path in [*paths, "q_proj", "q_proj\n", "lm_head"]:
            matches = re.match(rf"(.*\.)?({key})$", path) is not None
            assert config.scaling(path) == (3 if matches else 5), (key, path)


def test_fields_that_are_absent_have_the_defaults_of_peft() -> None:
    config = parse_config(FILE, {"peft_type": "LORA"})
    assert (config.r, config.lora_alpha, config.scaling("model.layers.0.mlp.up_proj")) == (8, 8.0, 1.0)


def test_a_list_of_tokens_is_for_the_embedding() -> None:
    assert parse(trainable_token_indices=[3, 1]).trainable_token_indices == {"embed_tokens": (3, 1)}
    both = parse(trainable_token_indices={"model.embed_tokens": [3], "lm_head": [4]})
    assert both.trainable_token_indices == {"embed_tokens": (3,), "lm_head": (4,)}
