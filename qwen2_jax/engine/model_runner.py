"""Runs scheduled calls on the devices: owns weights, caches and per-request state, and the compiled programs.

`launch` returns at once; what a call gives comes back through `Launched.read`. Calls run in the order of their
launches, and each finds the tokens of the one before in the per-request state, so that the host need not know them.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qwen2_jax.cache.kv_cache import PoolLayout, count_blocks
from qwen2_jax.config import ResolvedConfig
from qwen2_jax.engine.batch_builder import BatchBuilder
from qwen2_jax.engine.compilation import CompilationCounter, ProgramSpec, compile_program, compile_programs
from qwen2_jax.engine.executable_cache import ExecutableCache
from qwen2_jax.engine.model_loader import LoadedModel
from qwen2_jax.engine.programs import PROMPT_LOGPROBS_CHUNK, Programs
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import ScheduledRow, SchedulerOutput
from qwen2_jax.engine.step_inputs import decode_layout, packed_size, prefill_layout
from qwen2_jax.engine.step_results import Launched
from qwen2_jax.models.qwen2 import KVCache
from qwen2_jax.parallel import pad_to_multiple, replicated

logger = logging.getLogger(__name__)

ProgramKey = tuple[str, int]
_PROBE_BLOCKS = 16
ROW_STATE = ("token_ids", "logit_bias", "logprob_token_ids")
"""The arrays of the state whose rows are set from the host."""


class ModelRunner:
    """One model, compiled for its buckets."""

    def __init__(
        self, model: LoadedModel, config: ResolvedConfig, *, blocks_needed: int, cache_directory: Path | None = None
    ) -> None:
        """Count the cache blocks that fit beside the model; nothing can run before `compile`.

        One sequence of the full length holds `blocks_needed` blocks at most: `CapacityError` if they do not fit.
        Programs for a GPU are kept in `cache_directory`. On a CPU they are not: its code fits one kind of processor,
        which JAX's own cache knows how to tell from others.
        """
        self._model, self._config = model, config
        self._cache_directory = None if jax.default_backend() == "cpu" else cache_directory
        self._is_embedding = model.config.is_embedding_model
        self._replicated = replicated(model.mesh)
        self._builder = BatchBuilder(config)
        self._step_numbers = [self._to_device(np.int32(step)) for step in range(config.max_decode_steps)]
        self._programs = Programs(
            graphdef=model.graphdef,
            vocab_size=model.config.vocab_size,
            hidden_size=model.config.hidden_size,
            block_size=config.block_size,
            blocks_per_sequence=config.blocks_per_sequence,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            dtype=model.dtype,
            max_logprobs=config.max_logprobs,
        )
        # Who asks for float32 means it: TF32 has ten bits of mantissa, log-probabilities would be off by 1e-2.
        self._matmul_precision = "highest" if model.dtype == "float32" else None
        self._params_spec = jax.tree.map(_spec, model.params)
        initial = self._programs.initial_pooled if self._is_embedding else self._programs.initial_state
        self._state = jax.jit(initial, out_shardings=self._replicated)()
        self._pools = PoolLayout.of(model.config, config.block_size, model.dtype, model.mesh.shape["tp"])
        self.num_blocks = self._count_blocks(blocks_needed)
        self._compiled: dict[ProgramKey, jax.stages.Compiled] = {}
        self._kv_cache: KVCache = ()
        self._counter = CompilationCounter()

    def compile(self, *, use_tqdm: bool = True) -> None:
        """Compile every program and allocate the cache."""
        cache = self._executable_cache(self.num_blocks)
        self._compiled = compile_programs(self._specs(), self._model.mesh, cache, use_tqdm=use_tqdm)
        self._kv_cache = self._pools.allocate(self._model.mesh, self.num_blocks)

    @property
    def num_compilations(self) -> int:
        """Compilations since start-up: anything but 0 is a mistake of this package."""
        return self._counter.count

    @property
    def programs(self) -> dict[ProgramKey, jax.stages.Compiled]:
        """The compiled programs, by name and bucket."""
        return dict(self._compiled)

    def launch(self, output: SchedulerOutput) -> Launched:
        """Start one call; it returns before the devices are done."""
        with self._counter.watch():
            for request in output.admitted:
                self._admit(request)
            for row in output.rows:
                self._update_logit_bias(row)
            return self._embed(output) if self._is_embedding else self._generate(output)

    def close(self) -> None:
        """Let go of the device's memory."""
        self._counter.close()
        for array in jax.tree.leaves((self._model.params, self._kv_cache, self._state)):
            array.delete()

    def _generate(self, output: SchedulerOutput) -> Launched:
        if output.is_decode:
            return Launched(output, self._decode(output))
        bucket, packed = self._builder.prefill(output)
        self._kv_cache, self._state, outputs = self._run("prefill", bucket, self._kv_cache, self._state, packed)
        return Launched(output, [outputs], prompt_logprobs=self._prompt_logprobs(output))

    def _decode(self, output: SchedulerOutput) -> list[Any]:
        """Launch the call's steps one behind another; each one's samples."""
        bucket, packed, greedy = self._builder.decode(output)
        name = "decode_greedy" if greedy and ("decode_greedy", bucket) in self._compiled else "decode"
        inputs, samples = self._to_device(packed), []
        for step in self._step_numbers[: output.num_steps]:
            self._kv_cache, self._state, outputs = self._run(name, bucket, self._kv_cache, self._state, inputs, step)
            samples.append(outputs)
        return samples

    def _prompt_logprobs(self, output: SchedulerOutput) -> list[Any]:
        """Report on the tokens of the step, as many chunks of them as hold rows that ask for it."""
        ends = np.cumsum([row.num_tokens for row in output.rows])
        end = max(
            (int(end) for row, end in zip(output.rows, ends, strict=True) if _wants_prompt_logprobs(row)), default=0
        )
        targets = _next_prompt_tokens(output, pad_to_multiple(end, PROMPT_LOGPROBS_CHUNK))
        return [
            self._run("prompt_logprobs", 0, self._state, np.concatenate([[start], chunk]).astype(np.int32))
            for start, chunk in zip(
                range(0, end, PROMPT_LOGPROBS_CHUNK), targets.reshape(-1, PROMPT_LOGPROBS_CHUNK), strict=True
            )
        ]

    def _embed(self, output: SchedulerOutput) -> Launched:
        bucket, packed = self._builder.prefill(output)
        self._kv_cache, self._state, embeddings = self._run("embed", bucket, self._kv_cache, self._state, packed)
        return Launched(output, embeddings=embeddings)

    def _run(self, name: str, bucket: int, *arguments: Any) -> Any:
        """Run a program on the weights, device arrays, and host arrays, which are copied over."""
        placed = [self._to_device(a) if isinstance(a, np.ndarray) else a for a in arguments]
        return self._compiled[name, bucket](self._model.params, *placed)

    def _to_device(self, array: np.ndarray | np.int32) -> jax.Array:
        return jax.device_put(array, self._replicated)

    def _admit(self, request: Request) -> None:
        """Fill the row of device state that `request` has got, as far as it will be read."""
        self._builder.admit(request, request.seed)
        params = request.sampling_params
        if params is None:
            return
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._set_row("token_ids", request, np.asarray(request.tokens(0, request.num_tokens), np.int32))
        if params.num_logprobs is not None:
            self._set_row("logprob_token_ids", request, np.asarray(params.logprob_token_ids or (), np.int32), fill=-1)
        if request.logit_bias is not None:
            request.logit_bias.reset()

    def _update_logit_bias(self, row: ScheduledRow) -> None:
        request = row.request
        if request.logit_bias is None or not row.samples or request.row_index is None:
            return
        num_outputs = row.start + row.num_tokens - request.num_prompt_tokens
        present, vector = request.logit_bias.update(request, num_outputs)
        self._builder.set_logit_bias(request.row_index, present)
        if vector is not None:
            self._set_row("logit_bias", request, vector)

    def _set_row(self, name: str, request: Request, values: np.ndarray, fill: int = 0) -> None:
        packed = np.full(1 + self._state[name].shape[1], fill, np.int32)
        assert request.row_index is not None
        packed[0] = request.row_index
        packed[1 : 1 + len(values)] = values.view(np.int32)
        self._state = self._compiled[f"set_{name}", 0](self._state, self._to_device(packed))

    def _count_blocks(self, blocks_needed: int) -> int:
        """Size the cache by what the step with the largest workspace leaves, which XLA tells once it is compiled."""
        config = self._config
        return count_blocks(
            self._pools,
            config.cache,
            workspace_bytes=0 if jax.default_backend() == "cpu" else self._workspace_bytes(),
            blocks_needed=blocks_needed,
            blocks_useful=config.max_num_seqs * config.blocks_per_sequence,
        )

    def _workspace_bytes(self) -> int:
        """Return what the largest step takes besides its arguments; the number of cache blocks does not change it."""
        cache = self._executable_cache(_PROBE_BLOCKS)
        known = None if cache is None else cache.read("workspace")
        if known is not None:
            return int(known)
        key = ("embed" if self._is_embedding else "prefill", self._config.prefill_buckets[-1])
        memory = compile_program(self._specs(_PROBE_BLOCKS)[key], self._model.mesh).memory_analysis()
        assert memory is not None
        workspace = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        workspace += memory.generated_code_size_in_bytes
        if cache is not None:
            cache.write("workspace", str(workspace).encode())
        return workspace

    def _executable_cache(self, num_blocks: int) -> ExecutableCache | None:
        if self._cache_directory is None:
            return None
        facts = (self._model.config, self._model.dtype, self._config, num_blocks)
        return ExecutableCache(self._cache_directory / "programs", self._model.mesh, *facts)

    def _specs(self, num_blocks: int | None = None) -> dict[ProgramKey, ProgramSpec]:
        """Return every program with its abstract arguments, for a cache of `num_blocks`."""
        config, programs, mesh = self._config, self._programs, self._model.mesh
        kv_cache = self._pools.abstract(mesh, num_blocks or self.num_blocks)
        state = jax.tree.map(_spec, self._state)
        caches = jax.tree.map(lambda leaf: leaf.sharding, (kv_cache, state))

        def step(function: Any, layout: Any, *more: jax.Array) -> ProgramSpec:
            return ProgramSpec(
                function=function,
                arguments=(self._params_spec, kv_cache, state, self._vector(packed_size(layout)), *map(_spec, more)),
                donated=(1, 2),
                out_shardings=(*caches, self._replicated),
                matmul_precision=self._matmul_precision,
            )

        specs: dict[ProgramKey, ProgramSpec] = {}
        width = config.blocks_per_sequence
        for tokens in reversed(config.prefill_buckets):
            rows = config.prefill_rows(tokens)
            name, function = ("embed", programs.embed) if self._is_embedding else ("prefill", programs.prefill)
            specs[name, tokens] = step(partial(function, tokens=tokens, rows=rows), prefill_layout(tokens, rows, width))
        if self._is_embedding:
            return specs
        for rows in reversed(config.decode_buckets):
            for name in ("decode", "decode_greedy")[: 1 + (jax.default_backend() != "cpu")]:
                function = partial(programs.decode, rows=rows, greedy=name == "decode_greedy")
                specs[name, rows] = step(function, decode_layout(rows, width), self._step_numbers[0])
        return specs | self._small_specs(state)

    def _small_specs(self, state: dict[str, Any]) -> dict[ProgramKey, ProgramSpec]:
        """The programs that are not steps: prompt log-probabilities, and setting a row of state."""
        programs = self._programs
        specs: dict[ProgramKey, ProgramSpec] = {
            ("prompt_logprobs", 0): ProgramSpec(
                function=programs.prompt_logprobs,
                arguments=(self._params_spec, state, self._vector(1 + PROMPT_LOGPROBS_CHUNK)),
                out_shardings=self._replicated,
                matmul_precision=self._matmul_precision,
            )
        }
        for name in ROW_STATE:
            specs[f"set_{name}", 0] = ProgramSpec(
                function=partial(programs.set_row, name=name),
                arguments=(state, self._vector(1 + state[name].shape[1])),
                donated=(0,),
                out_shardings=self._replicated,
            )
        return specs

    def _vector(self, length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((length,), jnp.int32, sharding=self._replicated)


def _spec(array: jax.Array) -> jax.ShapeDtypeStruct:
    assert isinstance(array.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _wants_prompt_logprobs(row: ScheduledRow) -> bool:
    request = row.request
    params = request.sampling_params
    return params is not None and params.prompt_logprobs is not None and row.start < request.num_prompt_tokens - 1


def _next_prompt_tokens(output: SchedulerOutput, size: int) -> np.ndarray:
    """Return, for each of the step's first `size` tokens, the prompt token that follows it (0 where none does)."""
    targets = np.zeros(size, np.int32)
    start = 0
    for row in output.rows:
        if start >= size:
            break
        following = row.request.prompt_token_ids[row.start + 1 : row.start + 1 + row.num_tokens][: size - start]
        targets[start : start + len(following)] = following
        start += row.num_tokens
    return targets
