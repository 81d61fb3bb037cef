"""What names adapters is checked when it is made, and is a key of tables."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen2_jax import LoRARequest, MergedLoRARequest, MergeOptions
from qwen2_jax.errors import AdapterError

A, B = LoRARequest("a", 1, "adapters/a"), LoRARequest("b", 2, "adapters/b")


def merged(**fields: Any) -> MergedLoRARequest:
    return MergedLoRARequest(
        **({"lora_name": "ab", "lora_int_id": 3, "adapters": [A, B], "weights": [1, 0.5]} | fields)
    )


def options(**fields: Any) -> MergeOptions:
    return MergeOptions(**fields)


def test_equal_merges_are_equal_keys() -> None:
    request = MergedLoRARequest("ab", 3, [A, B], [1, 0.5], MergeOptions(rank=4))
    assert request.adapters == (A, B) and request.weights == (1, 0.5)
    assert {request: 1}[merged(adapters=(A, B), weights=(1.0, 0.5), options=MergeOptions(rank=4))] == 1
    for other in ({"weights": [1, 0.4]}, {"adapters": [B, A]}, {"options": MergeOptions(rank=5)}, {"lora_int_id": 4}):
        assert merged(**{"options": MergeOptions(rank=4)} | other) != request


def test_a_revision_and_a_subfolder_are_part_of_the_key() -> None:
    plain, tagged, inside = (
        LoRARequest("a", 1, "o/n", **extra) for extra in ({}, {"revision": "v1"}, {"subfolder": "x"})
    )
    assert len({plain, tagged, inside}) == 3 and plain == LoRARequest("a", 1, "o/n", revision=None, subfolder=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: merged(lora_name=""), "lora_name='' is not allowed"),
        (lambda: merged(lora_int_id=0), "lora_int_id=0 is not allowed; use an integer of at least 1"),
        (lambda: merged(adapters=[], weights=[]), "0 adapters and 0 weights; give at least one, and a weight each"),
        (lambda: merged(weights=[1]), "2 adapters and 1 weights"),
        (lambda: merged(weights=[1, float("nan")]), "weight=nan is not a finite number"),
        (lambda: merged(weights=[-float("inf"), 1]), "weight=-inf is not a finite number"),
        (lambda: merged(weights=[10**400, 1]), "weight=10+ is not a finite number"),
        (lambda: merged(weights=[True, 1]), "weight=True is not a finite number"),
        (lambda: merged(weights=["1", 1]), "weight='1' is not a finite number"),
        (lambda: merged(weights=np.ones(2)), r"weights=array\(\[1., 1.\]\) is not allowed; use a list"),
        (lambda: merged(adapters="ab"), "adapters='ab' is not allowed; use a list"),
        (lambda: merged(adapters=[A, "adapters/b"]), r"adapters has 'adapters/b', which is not a LoRARequest\(name"),
        (lambda: merged(adapters=[A, merged()]), "which is not a LoRARequest"),
        (lambda: merged(options="ties"), "options='ties' is not a MergeOptions"),
        (lambda: options(method="cat"), "method='cat' is unknown; use one of linear, ties, dare_linear, dare_ties"),
        (lambda: LoRARequest("a", 1, "o/n", revision=""), "revision='' is not allowed"),
        (lambda: LoRARequest("a", 1, "o/n", subfolder=""), "subfolder='' is not allowed"),
    ],
)
def test_what_is_wrong_is_said_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make()


def test_an_adapter_may_come_twice() -> None:
    assert merged(adapters=[A, A]).adapters == (A, A)
