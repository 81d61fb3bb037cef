"""Writes any checkpoint that this package reads as an Orbax checkpoint."""

from pathlib import Path

import jax.numpy as jnp

from qwen2_jax.config import LoadConfig, ModelConfig
from qwen2_jax.config.load import DType
from qwen2_jax.models.hub import resolve
from qwen2_jax.models.new_folder import check_new
from qwen2_jax.models.orbax import save_orbax
from qwen2_jax.models.weights import load_weights, open_checkpoint


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    hf_token: str | None = None,
    dtype: DType | None = None,
) -> Path:
    """Write the model `source` with its config and tokenizer to the new folder `destination`, and return that.

    The whole model is in host memory meanwhile. What is written serves any `tensor_parallel_size`.

    Args:
        source: what `LLM` takes: a folder, a GGUF file, a hub id, or the name of an embedded model.
        destination: a folder that does not exist yet, or an empty one.
        revision: a branch, tag or commit on the hub.
        hf_token: an access token for the hub.
        dtype: of the weights that are written; None or `"auto"` keeps the one that the source's config names.

    Raises:
        CheckpointError: the source cannot be read, or the destination is not empty; nothing is written then.
        ConfigError: an unknown dtype, or a model that is not supported.
    """
    folder = Path(destination).expanduser()
    check_new(folder)
    load = LoadConfig(dtype=dtype or "auto")
    checkpoint = open_checkpoint(resolve(source, revision=revision, token=hf_token))
    config = ModelConfig.from_hf(checkpoint.config)
    written = jnp.dtype(config.dtype if load.dtype == "auto" else load.dtype)
    params = load_weights(checkpoint, config, dtype=written, put=lambda _, array: array)
    save_orbax(folder, params, config=checkpoint.config, checkpoint=checkpoint)
    return folder
