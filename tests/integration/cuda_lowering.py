"""Lowers whole steps for an H100 that need not be here: tracing, Triton's compiler and Mosaic's run on the CPU."""

from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from qwen2_jax.config import EngineConfig, ModelConfig
from qwen2_jax.engine.lowering_worker import abstract_programs
from qwen2_jax.engine.program_facts import ProgramFacts
from qwen2_jax.engine.program_specs import ProgramKey
from qwen2_jax.lora.sizes import LoRASizes

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
MESH = AbstractMesh((1,), ("tp",), axis_types=(AxisType.Explicit,), abstract_device=H100)


def step_facts(
    model: ModelConfig, *, lora: LoRASizes | None = None, num_blocks: int = 500, **options: Any
) -> ProgramFacts:
    """Return what the programs of an engine with these options are made from, in bfloat16 on one device."""
    config = EngineConfig(**options).resolve(model, "gpu")
    return ProgramFacts(model=model, dtype="bfloat16", config=config, num_blocks=num_blocks, lora=lora)


def lower_step(model: ModelConfig, key: ProgramKey, **options: Any) -> jax.stages.Lowered:
    """Lower a program of such an engine."""
    spec = abstract_programs(step_facts(model, **options), MESH)[key]
    with jax.sharding.use_abstract_mesh(MESH):
        step = jax.jit(spec.function, donate_argnums=spec.donated)
        return step.trace(*spec.arguments).lower(lowering_platforms=("cuda",))
