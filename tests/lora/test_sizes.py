"""How much room adapters get, and that a step's tables hold whatever fits in it."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.config import LoRAConfig
from qwen2_jax.errors import CapacityError
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.models.adapters import PageUse, TokenGroup, build_lora_tables, init_banks
from qwen2_jax.models.vocab_adapters import init_vocab_banks, vocab_bank_shapes
from tests.lora.adapters import base_config

CONFIG = base_config()
"""Hidden 64, inner 96, 3 layers, 4 query and 2 KV heads of 16."""
# What 16 ranks take in a layer: inputs of A by module, and outputs of B.
_REPLICATED, _SPLIT = 16 * (3 * 64 + 64 + 2 * 64 + 64), 16 * (64 + 2 * 32 + 64 + 2 * 96 + 96)


def make(tp: int = 1, dtype: str = "float32", **options: int) -> LoRASizes:
    return LoRASizes.of(LoRAConfig(enable_lora=True, **options), CONFIG, dtype, tp)


def test_room_is_counted_in_pages_of_the_highest_rank() -> None:
    sizes = make(max_loras=3, max_lora_rank=40, max_vocab_loras=2, max_full_vocab=1)
    assert (sizes.max_pages, sizes.max_rank, sizes.max_on_host) == (3, 40, 36)
    assert sizes.places == {
        "pages": 9, "vectors": 3, "vocab_pages": 6, "vocab_vectors": 2, "full_embed": 1, "full_head": 1
    }  # fmt: skip
    assert sizes.has_vocab and not make().has_vocab and make().vocab_tables(8, 4) is None
    assert make(max_loras=2, max_cpu_loras=5).max_on_host == 5


@pytest.mark.parametrize("tp, dtype", [(1, "float32"), (1, "bfloat16"), (2, "float32")])
@pytest.mark.parametrize("tenths, count", [(0.5, 1), (5.5, 5), (1000, 64)])
def test_without_max_loras_a_tenth_of_the_memory_is_used(
    monkeypatch: pytest.MonkeyPatch, tp: int, dtype: str, tenths: float, count: int
) -> None:
    each = 4 * 3 * (_REPLICATED + _SPLIT // tp) * (2 if dtype == "bfloat16" else 4)
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": int(10 * each * tenths), "bytes_in_use": 0})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert make(tp, dtype).num_vectors == count
    assert make(tp, dtype, max_loras=3).num_vectors == 3


def test_more_than_is_free_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"bytes_limit": 1 << 30, "bytes_in_use": (1 << 30) - (3 << 20)}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    assert make(max_loras=2).num_vectors == 2
    with pytest.raises(CapacityError, match=r"room for 30 adapters of rank 64.* free; lower max_loras, max_lora_rank"):
        make(max_loras=30)
    with pytest.raises(CapacityError, match="2000 whole ones takes"):
        make(max_loras=2, max_full_vocab=2000)


@pytest.mark.parametrize("tp", [1, 2])
def test_bank_bytes_are_those_that_are_allocated(tp: int) -> None:
    sizes = make(max_loras=3, max_vocab_loras=2, max_full_vocab=1)
    banks = init_banks(CONFIG, 1, "bfloat16", num_pages=sizes.num_pages, num_vectors=sizes.num_vectors)
    shapes = vocab_bank_shapes(
        CONFIG, 1, num_pages=sizes.num_vocab_pages, num_full=1, num_vectors=2, max_pages=sizes.max_pages
    )
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves((banks, init_vocab_banks(shapes, "bfloat16"))))
    reckoned = sizes.bank_bytes(CONFIG, "bfloat16", tp)
    assert taken <= reckoned <= 1.1 * taken if tp == 1 else taken / 2 <= reckoned < 0.9 * taken


def test_copies_on_their_way_are_reckoned_with() -> None:
    sizes = make(max_loras=9, max_lora_rank=40, max_vocab_loras=3, max_full_vocab=2)
    copies = make(max_loras=4, max_lora_rank=40, max_vocab_loras=4, max_full_vocab=2)
    assert sizes.staging_bytes(CONFIG, "bfloat16", 1, 4) == copies.bank_bytes(CONFIG, "bfloat16", 1)
    assert (
        0
        < make(max_loras=1).staging_bytes(CONFIG, "bfloat16", 1, 4)
        < 4.1 * make(max_loras=1).bank_bytes(CONFIG, "bfloat16", 1)
    )


def test_a_device_that_does_not_tell_its_memory_has_room_for_eight() -> None:
    assert make().places["vectors"] == 8


@settings(max_examples=100, derandomize=True)
@given(data=st.data())
def test_tables_hold_whatever_fits(data: st.DataObject) -> None:
    """Also adapters without pages, which replace biases alone."""
    sizes = make(max_loras=data.draw(st.integers(1, 3)), max_lora_rank=data.draw(st.sampled_from([16, 40])))
    tokens = data.draw(st.sampled_from([1, 4, 32, 300]))
    rows = data.draw(st.integers(1, tokens))
    free = {"pages": sizes.num_pages, "vectors": sizes.num_vectors}
    groups: list[TokenGroup] = []
    for pages, vector in data.draw(st.lists(st.tuples(st.integers(0, sizes.max_pages), st.booleans()), max_size=rows)):
        if (pages or vector) and pages <= free["pages"] and vector <= free["vectors"]:
            free = {"pages": free["pages"] - pages, "vectors": free["vectors"] - vector}
            uses = tuple(PageUse(page=free["pages"] + index, modules=1) for index in range(pages))
            groups.append(TokenGroup(pages=uses, vector=free["vectors"] if vector else -1))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tables = build_lora_tables(rng.integers(-1, len(groups), tokens), groups, sizes.tables(tokens, rows))
    assert tables["num_segments"][0] >= 1
