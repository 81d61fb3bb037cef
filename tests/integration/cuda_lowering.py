"""Lowers whole steps for an H100 that need not be here: tracing, Triton's compiler and Mosaic's run on the CPU."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.cache.kv_cache import PoolLayout
from qwen2_jax.config import EngineConfig, ModelConfig
from qwen2_jax.engine.programs import Programs
from qwen2_jax.engine.step_inputs import decode_layout, packed_size, prefill_layout
from qwen2_jax.models.registry import model_class

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)


def lower_step(
    model: ModelConfig, name: str, size: int, *, num_blocks: int = 500, **options: Any
) -> jax.stages.Lowered:
    """Lower the program `name` ("decode_greedy" or "prefill") of bucket `size`, in bfloat16 on one device."""
    mesh = AbstractMesh((1,), ("tp",), axis_types=(AxisType.Explicit,), abstract_device=H100)
    config = EngineConfig(**options).resolve(model, "gpu")
    with jax.sharding.use_abstract_mesh(mesh):
        graphdef, weights = nnx.split(nnx.eval_shape(lambda: model_class(model)(model, dtype=jnp.bfloat16)))
        programs = Programs(
            graphdef=graphdef,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            block_size=config.block_size,
            blocks_per_sequence=config.blocks_per_sequence,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            dtype="bfloat16",
            max_logprobs=config.max_logprobs,
        )
        params = jax.tree.map(partial(_place, mesh), nnx.to_pure_dict(weights))
        state = jax.tree.map(partial(_place, mesh), jax.eval_shape(programs.initial_state))
        pools = PoolLayout.of(model, config.block_size, "bfloat16", 1).abstract(cast(Mesh, mesh), num_blocks)
        width = config.blocks_per_sequence
        if name == "decode_greedy":
            function, layout = partial(programs.decode_greedy, rows=size, steps=8), decode_layout(size, width)
        else:
            rows = config.prefill_rows(size)
            function, layout = partial(programs.prefill, tokens=size, rows=rows), prefill_layout(size, rows, width)
        packed = jax.ShapeDtypeStruct((packed_size(layout),), jnp.int32, sharding=NamedSharding(mesh, P()))
        step = jax.jit(function, donate_argnums=(1, 2))
        return step.trace(params, pools, state, packed).lower(lowering_platforms=("cuda",))


def _place(mesh: AbstractMesh, leaf: Any) -> jax.ShapeDtypeStruct:
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
