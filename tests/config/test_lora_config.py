"""Options for adapters are checked one by one and against each other, and reach the engine's config."""

from typing import Any

import pytest

from qwen2_jax.config import LoRAConfig, split_options
from qwen2_jax.errors import ConfigError


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_lora": 1}, "enable_lora=1 is not True or False"),
        ({"max_loras": 0}, "max_loras=0 is not an integer from 1 to 100000"),
        ({"max_loras": True}, "max_loras=True is not an integer"),
        ({"max_loras": 2.0}, r"max_loras=2\.0 is not an integer"),
        ({"max_lora_rank": None}, "max_lora_rank=None is not an integer"),
        ({"max_lora_rank": 100_001}, "max_lora_rank=100001 is not an integer"),
        ({"max_cpu_loras": -1}, "max_cpu_loras=-1 is not an integer"),
        ({"max_loras": 4, "max_cpu_loras": 3}, "max_cpu_loras=3 is less than max_loras=4"),
        ({"max_vocab_loras": -1}, "max_vocab_loras=-1 is not an integer from 0 to 100000"),
        ({"max_full_vocab": False}, "max_full_vocab=False is not an integer from 0"),
    ],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**options)
    with pytest.raises(ConfigError, match=message):
        split_options(options)


@pytest.mark.parametrize("rank, pages", [(1, 1), (16, 1), (17, 2), (64, 4), (65, 5)])
def test_an_adapter_takes_the_pages_of_its_rank(rank: int, pages: int) -> None:
    assert LoRAConfig(max_lora_rank=rank).max_pages == pages


def test_options_reach_the_engine() -> None:
    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 32, "max_cpu_loras": 3, "max_vocab_loras": 1}
    _, engine = split_options(options | {"max_full_vocab": 2})
    assert engine.lora == LoRAConfig(**options, max_full_vocab=2)
    assert not split_options({})[1].lora.enable_lora
