"""What a model's programs are made from, in a form that another process understands, and the programs made from it.

`ProgramFacts` has no arrays and no devices. It is the key under which programs are kept on disk, and it is what a
lowering worker is sent: whoever has equal facts and equal devices makes equal programs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.cache.kv_cache import PoolLayout
from qwen2_jax.config import ModelConfig, ResolvedConfig
from qwen2_jax.engine.program_specs import ProgramTable
from qwen2_jax.engine.programs import Programs, State
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.models.adapters import Banks, bank_specs, init_banks
from qwen2_jax.models.vocab_adapters import init_vocab_banks, vocab_bank_shapes, vocab_bank_specs
from qwen2_jax.parallel import TP, replicated


@dataclass(frozen=True, kw_only=True)
class ProgramFacts:
    """All that tells one model's programs from another's on the same devices."""

    model: ModelConfig
    dtype: str
    config: ResolvedConfig
    num_blocks: int
    """P, of the pools."""
    lora: LoRASizes | None

    def table(self, mesh: Mesh, programs: Programs, params: Any) -> ProgramTable:
        """Return what is compiled for `mesh`.

        `programs` are those of `make_programs`, `params` the abstract weights, as `model_loader.abstract_model` makes
        them.
        """
        pools = PoolLayout.of(self.model, self.config.block_size, self.dtype, mesh.shape[TP])
        state = jax.eval_shape(initializer(self.model, programs))
        return ProgramTable(
            config=self.config,
            programs=programs,
            params=params,
            kv_cache=pools.abstract(mesh, self.num_blocks),
            state=jax.tree.map(lambda leaf: _placed(mesh, leaf, P()), state),
            banks=None if self.lora is None else _abstract_banks(self, self.lora, mesh),
            lora=self.lora,
            replicated=replicated(mesh),
            # Who asks for float32 means it: TF32 has ten bits of mantissa, log-probabilities would be off by 1e-2.
            matmul_precision="highest" if self.dtype == "float32" else None,
            is_embedding=self.model.is_embedding_model,
        )


def make_programs(model: ModelConfig, config: ResolvedConfig, dtype: str, graphdef: nnx.GraphDef) -> Programs:
    """Return the step functions of a model; `graphdef` is its NNX structure."""
    return Programs(
        graphdef=graphdef,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        block_size=config.block_size,
        blocks_per_sequence=config.blocks_per_sequence,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        dtype=dtype,
        max_logprobs=config.max_logprobs,
    )


def initializer(model: ModelConfig, programs: Programs) -> Callable[[], State]:
    """Return the function that makes the per-request state of a model of this kind."""
    return programs.initial_pooled if model.is_embedding_model else programs.initial_state


def _abstract_banks(facts: ProgramFacts, sizes: LoRASizes, mesh: Mesh) -> Banks:
    """Return the shapes, dtypes and shardings of the adapters' banks, as `lora.placing.Placer` allocates them."""
    model, tp, place = facts.model, mesh.shape[TP], partial(_placed, mesh)
    counts = {"num_pages": sizes.num_pages, "num_vectors": sizes.num_vectors}
    layers = jax.eval_shape(partial(init_banks, model, tp, facts.dtype, **counts))
    banks = Banks(layers=tuple(jax.tree.map(place, layer, bank_specs()) for layer in layers), vocab=None)
    if not sizes.has_vocab:
        return banks
    shapes = vocab_bank_shapes(
        model,
        tp,
        num_pages=sizes.num_vocab_pages,
        num_full=sizes.num_full_vocab,
        num_vectors=sizes.num_vocab_vectors,
        max_pages=sizes.max_pages,
    )
    vocab = jax.eval_shape(partial(init_vocab_banks, shapes, facts.dtype))
    return replace(banks, vocab=jax.tree.map(place, vocab, vocab_bank_specs()))


def _placed(mesh: Mesh, leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
