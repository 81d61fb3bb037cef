"""Lowers whole steps for an H100 that need not be here: tracing, Triton's compiler and Mosaic's run on the CPU."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.config import EngineConfig, ModelConfig
from qwen2_jax.engine.program_facts import ProgramFacts, make_programs
from qwen2_jax.engine.program_specs import ProgramKey
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.models.registry import model_class

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)


def lower_step(
    model: ModelConfig, key: ProgramKey, *, lora: LoRASizes | None = None, num_blocks: int = 500, **options: Any
) -> jax.stages.Lowered:
    """Lower a program of an engine with these options, in bfloat16 on one device."""
    mesh = AbstractMesh((1,), ("tp",), axis_types=(AxisType.Explicit,), abstract_device=H100)
    config = EngineConfig(**options).resolve(model, "gpu")
    facts = ProgramFacts(model=model, dtype="bfloat16", config=config, num_blocks=num_blocks, lora=lora)
    with jax.sharding.use_abstract_mesh(mesh):
        graphdef, weights = nnx.split(nnx.eval_shape(lambda: model_class(model)(model, dtype=jnp.bfloat16)))
        params = jax.tree.map(partial(_place, mesh), nnx.to_pure_dict(weights))
        spec = facts.table(cast(Mesh, mesh), make_programs(model, config, "bfloat16", graphdef), params).specs()[key]
        step = jax.jit(spec.function, donate_argnums=spec.donated)
        return step.trace(*spec.arguments).lower(lowering_platforms=("cuda",))


def _place(mesh: AbstractMesh, leaf: Any) -> jax.ShapeDtypeStruct:
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
