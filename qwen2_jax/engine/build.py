"""Builds an engine from options: resolves the model, loads it, compiles it, and ties the parts together."""

import gc
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from qwen2_jax.config import EngineConfig, LoadConfig, ModelConfig, ResolvedConfig
from qwen2_jax.engine.block_manager import peak_blocks
from qwen2_jax.engine.compilation import use_persistent_cache
from qwen2_jax.engine.engine import Engine
from qwen2_jax.engine.executable_cache import ExecutableCache
from qwen2_jax.engine.input_processor import InputProcessor
from qwen2_jax.engine.lowering_pool import LoweringPool, choose_workers
from qwen2_jax.engine.model_loader import LoadedModel, load_model, model_config
from qwen2_jax.engine.model_runner import ModelRunner
from qwen2_jax.engine.schedule import SchedulerConfig
from qwen2_jax.engine.scheduler import Scheduler
from qwen2_jax.errors import ConfigError
from qwen2_jax.lora.banks import DeviceBanks
from qwen2_jax.lora.manager import AdapterManager
from qwen2_jax.lora.pages import PageLayout
from qwen2_jax.lora.placing import Placer
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.lora.vocab import DeviceVocabBanks, VocabLayout
from qwen2_jax.models.activations import FUSED_ACTIVATIONS
from qwen2_jax.models.checkpoint import Checkpoint
from qwen2_jax.models.ops import skips_padding
from qwen2_jax.models.weight_layout import WeightLayout
from qwen2_jax.models.weights import open_checkpoint
from qwen2_jax.parallel import TP, make_mesh
from qwen2_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def build_engine(
    path: Path,
    load: LoadConfig,
    options: EngineConfig,
    *,
    tokenizer: Tokenizer | None,
    generation_config: Mapping[str, Any],
    checkpoint: Checkpoint,
) -> tuple[Engine, ModelConfig, ResolvedConfig]:
    """Return an engine that is ready to serve. Raises `ConfigError` and its kin for what cannot be served."""
    _reserve_device_memory(options.cache.gpu_memory_utilization)
    cache_directory = use_persistent_cache()
    model = model_config(checkpoint, load)
    platform = jax.default_backend()
    dtype = jnp.dtype(load.resolve_dtype(model.dtype, platform))
    config = options.resolve(model, platform, skips_padding=skips_padding(dtype))
    record = _start_record(cache_directory, platform, model, options, dtype)
    is_known = record is not None and "start" in record
    # Its processes get ready while weights are read, unless a start like this one has kept its programs.
    with _lowering_pool(load.lowering_workers, platform, at_once=not is_known) as pool:
        loaded = load_model(checkpoint, model, load, options)
        logger.info("loaded %s: %s, %s", path, model.architecture, loaded.dtype)
        limits = _scheduler_config(model, config)
        sizes, adapters = _adapters(loaded, options, load)
        runner = ModelRunner(
            loaded,
            config,
            blocks_needed=_blocks_needed(limits),
            cache_directory=cache_directory,
            adapters=None if adapters is None else adapters.placer,
            lora=sizes,
        )
        scheduler, num_blocks = Scheduler(limits, runner.num_blocks, adapters), runner.num_blocks
        # Last, because it takes longest and nothing can be refused after it.
        runner.compile(pool, use_tqdm=load.use_tqdm_on_load)
    if record is not None:
        record.write("start", b"")
    if runner.num_blocks != num_blocks:
        scheduler = Scheduler(limits, runner.num_blocks, adapters)
    inputs = InputProcessor(model, config, tokenizer, _eos_token_ids(model, tokenizer, generation_config))
    # A full garbage collection walks all objects, most of which tracing has made, and holds every step up meanwhile.
    gc.collect()
    gc.freeze()
    return Engine(runner, scheduler, inputs, tokenizer, adapters), model, config


def _start_record(
    cache_directory: Path, platform: str, model: ModelConfig, options: EngineConfig, dtype: jnp.dtype
) -> ExecutableCache | None:
    """Return where a start of this model with these options leaves a note; None on a CPU, which keeps no programs."""
    if platform == "cpu":
        return None
    return ExecutableCache(cache_directory / "starts", make_mesh(options.tensor_parallel_size), model, options, dtype)


def _lowering_pool(count: int | None, platform: str, *, at_once: bool) -> AbstractContextManager[LoweringPool | None]:
    """Start `count` lowering workers, or, with None, as many as this machine has room for; see `LoweringPool`."""
    if count is None:
        cores, memory = os.cpu_count() or 1, psutil.virtual_memory().available
        count = choose_workers(platform=platform, cores=cores, host_bytes=memory)
    return LoweringPool(count, at_once=at_once) if count else nullcontext()


def read_checkpoint(path: Path, load: LoadConfig) -> Checkpoint:
    """Open the checkpoint at `path` in the format that `load` asks for."""
    return open_checkpoint(path, load.load_format)


def _adapters(
    loaded: LoadedModel, options: EngineConfig, load: LoadConfig
) -> tuple[LoRASizes | None, AdapterManager | None]:
    """Make room for adapters, if they are asked for."""
    if not options.lora.enable_lora:
        return None, None
    model, tp = loaded.config, loaded.mesh.shape[TP]
    if model.hidden_act not in FUSED_ACTIVATIONS:
        raise ConfigError(
            f"enable_lora=True with hidden_act={model.hidden_act!r} is not served; adapters need one of "
            f"{', '.join(FUSED_ACTIVATIONS)}"
        )
    sizes = LoRASizes.of(options.lora, model, loaded.dtype, tp)
    banks = DeviceBanks(
        model,
        loaded.graphdef,
        loaded.params,
        loaded.mesh,
        loaded.dtype,
        num_pages=sizes.num_pages,
        num_vectors=sizes.num_vectors,
        max_pages=sizes.max_pages,
    )
    layout = PageLayout(model, WeightLayout.on(model, tp), jnp.dtype(loaded.dtype))
    placer = Placer(layout, banks, _vocab_adapters(loaded, sizes) if sizes.has_vocab else None)
    # Without a number of adapters for it, host memory has as many as half of what is free holds.
    free = None if options.lora.max_cpu_loras else psutil.virtual_memory().available // 2
    return sizes, AdapterManager(model, placer, sizes, max_host_bytes=free, token=load.hf_token)


def _vocab_adapters(loaded: LoadedModel, sizes: LoRASizes) -> tuple[VocabLayout, DeviceVocabBanks]:
    """Make room for adapters of the embeddings and the head."""
    model, mesh = loaded.config, loaded.mesh
    banks = DeviceVocabBanks(
        model,
        loaded.params,
        mesh,
        loaded.dtype,
        num_pages=sizes.num_vocab_pages,
        num_full=sizes.num_full_vocab,
        num_vectors=sizes.num_vocab_vectors,
        max_pages=sizes.max_pages,
    )
    layout = VocabLayout(
        model, mesh.shape[TP], jnp.dtype(loaded.dtype), max_pages=sizes.max_pages, rows=banks.read_rows
    )
    return layout, banks


def _scheduler_config(model: ModelConfig, config: ResolvedConfig) -> SchedulerConfig:
    windows = [window for window in model.layer_windows if window is not None]
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        max_num_mixed_tokens=config.max_num_mixed_tokens if config.config.enable_chunked_prefill else None,
        max_decode_steps=config.max_decode_steps,
        enable_chunked_prefill=config.config.enable_chunked_prefill,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        release_window=max(windows) if len(windows) == model.num_hidden_layers else None,
        policy=config.config.scheduling_policy,
    )


def _blocks_needed(limits: SchedulerConfig) -> int:
    """Return the blocks that one sequence of the full length holds at most."""
    return peak_blocks(
        limits.max_model_len,
        block_size=limits.block_size,
        max_step_tokens=limits.max_num_batched_tokens,
        release_window=limits.release_window,
    )


def _eos_token_ids(
    model: ModelConfig, tokenizer: Tokenizer | None, generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return every token that ends an answer, by config.json, the tokenizer or generation_config.json."""
    given = generation_config.get("eos_token_id")
    ids = list(model.eos_token_ids) + (given if isinstance(given, list) else [] if given is None else [given])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


def _reserve_device_memory(fraction: float) -> None:
    """Have JAX take `fraction` of each GPU, unless the user has set its own variable for that.

    JAX reads it when it first touches a device; a process that has done so already keeps the share it has, and the
    cache's log line says what that is.
    """
    given = os.environ.setdefault(_MEMORY_FRACTION, str(fraction))
    if given != str(fraction):
        logger.warning(
            "gpu_memory_utilization=%s has no effect: %s=%s was set before; unset it, or start a new process",
            fraction, _MEMORY_FRACTION, given,
        )  # fmt: skip
    logger.info("JAX may take %s of each GPU's memory (%s)", os.environ[_MEMORY_FRACTION], _MEMORY_FRACTION)
