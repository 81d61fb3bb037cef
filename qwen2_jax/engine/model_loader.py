"""Puts a model on the devices: config, mesh, NNX structure, and weights that stream straight to their shards."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from qwen2_jax.config import EngineConfig, LoadConfig, ModelConfig
from qwen2_jax.errors import ConfigError
from qwen2_jax.models.checkpoint import Checkpoint
from qwen2_jax.models.registry import model_class
from qwen2_jax.models.weight_layout import WeightLayout
from qwen2_jax.models.weights import load_weights
from qwen2_jax.parallel import TP, make_mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on its devices."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: dict[str, Any]
    """A pure dict of sharded arrays, the argument of every program."""
    mesh: Mesh
    dtype: str


def model_config(checkpoint: Checkpoint, load: LoadConfig) -> ModelConfig:
    """Return the checkpoint's config, as an embeddings model's if `runner="pooling"` asks for one."""
    config = ModelConfig.from_hf(checkpoint.config, hf_overrides=load.hf_overrides)
    if load.runner == "pooling" and not config.is_embedding_model:
        return dataclasses.replace(config, architecture="FlashQwen2ForEmbeddings")
    if load.runner == "generate" and config.is_embedding_model:
        raise ConfigError(f"runner='generate' needs a language model; {config.architecture!r} gives embeddings")
    return config


def load_model(checkpoint: Checkpoint, config: ModelConfig, load: LoadConfig, engine: EngineConfig) -> LoadedModel:
    """Read (or, with `load_format="dummy"`, draw) the weights onto the devices of a mesh of `tensor_parallel_size`."""
    tp = engine.tensor_parallel_size
    mesh = make_mesh(tp)
    dtype = load.resolve_dtype(config.dtype, jax.default_backend())
    if dtype == "float16":
        logger.warning("float16 overflows in some Qwen2 models; bfloat16 has float32's range")
    graphdef, shapes = abstract_model(config, mesh, dtype)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    if load.load_format == "dummy":
        params = draw_weights(shapes, shardings, config.initializer_range, engine.seed)
    else:
        params = _read_weights(checkpoint, config, load, tp, dtype, shardings)
        _check_tree(params, shapes)
    return LoadedModel(config=config, graphdef=graphdef, params=params, mesh=mesh, dtype=dtype)


def abstract_model(config: ModelConfig, mesh: Mesh | AbstractMesh, dtype: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Return a model's NNX structure and, as a pure dict, its weights' shapes, dtypes and shardings over `mesh`."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        model = nnx.eval_shape(lambda: model_class(config)(config, tp=mesh.shape[TP], dtype=jnp.dtype(dtype)))
    graphdef, state = nnx.split(model)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        assert isinstance(leaf.sharding, NamedSharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec))

    return graphdef, jax.tree.map(placed, nnx.to_pure_dict(state))


def draw_weights(shapes: Any, shardings: Any, std: float, seed: int) -> Any:
    """Return random weights made on the devices: normal matrices, zero biases, norms of one."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        key, name = next(keys), path[-1].key
        make = _drawer(leaf.shape, leaf.dtype, sharding, name if name in ("bias", "weight") else "matrix")
        return make(key, std)

    return jax.tree.map_with_path(draw, shapes, shardings)


@functools.cache
def _drawer(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, kind: str) -> Callable[..., jax.Array]:
    """Return the compiled function for weights of one shape; layers share it."""

    def make(key: jax.Array, std: float) -> jax.Array:
        if kind == "bias":
            return jnp.zeros(shape, dtype)
        if kind == "weight":
            return jnp.ones(shape, dtype)
        return (jax.random.normal(key, shape, dtype) * std).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def _read_weights(
    checkpoint: Checkpoint, config: ModelConfig, load: LoadConfig, tp: int, dtype: str, shardings: Any
) -> dict[str, Any]:
    layout = WeightLayout.on(config, tp)

    def put(path: tuple[str | int, ...], array: np.ndarray) -> jax.Array:
        sharding = shardings
        for key in path:
            sharding = sharding[key]
        return jax.device_put(array, sharding)

    return load_weights(
        checkpoint, config, dtype=jnp.dtype(dtype), put=put, layout=layout, use_tqdm=load.use_tqdm_on_load
    )


def _check_tree(params: Any, shapes: Any) -> None:
    """The tree that was read is the tree that the model takes; anything else is a mistake of this package."""
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    if found != expected:
        raise AssertionError(f"weights {found} do not match the model's {expected}")
