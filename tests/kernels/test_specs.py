"""The shared shapes: Qwen2.5's geometries have the published sizes, and the ragged batches fit their specs."""

import pytest
from qwen2_kernels.specs import QWEN2_5, RAGGED_SPECS, Geometry, RaggedSpec

# Billions of parameters, and without embeddings, as the model cards have them.
PUBLISHED = {
    "0.5b": (0.49, 0.36),
    "1.5b": (1.54, 1.31),
    "3b": (3.09, 2.77),
    "7b": (7.61, 6.53),
    "14b": (14.7, 13.1),
    "32b": (32.5, 31.0),
    "72b": (72.7, 70.0),
}


@pytest.mark.parametrize("name, geometry", QWEN2_5.items())
def test_geometries_have_the_published_number_of_parameters(name: str, geometry: Geometry) -> None:
    total, without_embeddings = PUBLISHED[name]
    embeddings = (2 - geometry.tie_word_embeddings) * geometry.vocab_size * geometry.hidden_size
    assert geometry.num_parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert (geometry.num_parameters - embeddings) / 1e9 == pytest.approx(without_embeddings, rel=0.01)
    assert geometry.num_attention_heads * geometry.head_dim == geometry.hidden_size
    assert geometry.group * geometry.num_key_value_heads == geometry.num_attention_heads


@pytest.mark.parametrize("spec", RAGGED_SPECS, ids=lambda spec: spec.name)
def test_batches_fit(spec: RaggedSpec) -> None:
    for rows in spec.batches:
        assert len(rows) <= spec.num_rows
        assert sum(queries for queries, _ in rows) <= spec.num_tokens
        assert all(length <= spec.max_context for _, length in rows)
        assert all(queries <= length or spec.is_decode for queries, length in rows)
    assert not spec.is_decode or spec.num_tokens == spec.num_rows
