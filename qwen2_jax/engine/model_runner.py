"""Runs scheduled calls on the devices: owns weights, caches and per-request state, and the compiled programs.

`launch` returns at once; what a call gives comes back through `Launched.read`. Calls run in the order of their
launches, and each finds the tokens of the one before in the per-request state, so that the host need not know them.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen2_jax.cache.kv_cache import PoolLayout, count_blocks
from qwen2_jax.config import ResolvedConfig
from qwen2_jax.engine.adapter_tables import changes_vocab, has_vectors, uses_adapters
from qwen2_jax.engine.batch_builder import BatchBuilder
from qwen2_jax.engine.compilation import CompilationCounter, ProgramSpec, compile_programs
from qwen2_jax.engine.executable_cache import ExecutableCache
from qwen2_jax.engine.logit_bias import LogitBias
from qwen2_jax.engine.lowered_programs import import_program
from qwen2_jax.engine.lowering_pool import LoweringPool
from qwen2_jax.engine.model_loader import LoadedModel
from qwen2_jax.engine.program_facts import ProgramFacts, initializer, make_programs
from qwen2_jax.engine.program_specs import WITH_ADAPTERS, WITH_VECTORS, ProgramKey, abstract
from qwen2_jax.engine.programs import PROMPT_LOGPROBS_CHUNK
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import ScheduledRow, SchedulerOutput
from qwen2_jax.engine.step_inputs import Layout, allocate
from qwen2_jax.engine.step_results import Launched
from qwen2_jax.engine.workspace import largest_workspace, reported_workspace
from qwen2_jax.lora.placing import Placer
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.lora.staging import MAX_STAGED
from qwen2_jax.models.qwen2 import KVCache
from qwen2_jax.parallel import replicated

logger = logging.getLogger(__name__)


class ModelRunner:
    """One model, compiled for its buckets."""

    def __init__(
        self,
        model: LoadedModel,
        config: ResolvedConfig,
        *,
        blocks_needed: int,
        cache_directory: Path | None = None,
        adapters: Placer | None = None,
        lora: LoRASizes | None = None,
    ) -> None:
        """Count the cache blocks that fit beside the model and the adapters' banks; nothing can run before `compile`.

        One sequence of the full length holds `blocks_needed` blocks at most: `CapacityError` if they do not fit.
        Programs for a GPU are kept in `cache_directory`. On a CPU they are not: its code fits one kind of processor,
        which JAX's own cache knows how to tell from others.
        """
        self._model, self._config = model, config
        self._cache_directory = None
        if cache_directory is not None and jax.default_backend() != "cpu":
            self._cache_directory = cache_directory / "programs"
        self._is_embedding = model.config.is_embedding_model
        self._replicated = replicated(model.mesh)
        self._adapters, self._lora = adapters, lora
        self._builder = BatchBuilder(config, lora)
        self._programs = make_programs(model.config, config, model.dtype, model.graphdef)
        self._params_spec = jax.tree.map(abstract, model.params)
        self._state = jax.jit(initializer(model.config, self._programs), out_shardings=self._replicated)()
        self._pools = PoolLayout.of(model.config, config.block_size, model.dtype, model.mesh.shape["tp"])
        self._blocks_needed = blocks_needed
        self._workspace = largest_workspace(model.config, config, model.dtype, model.mesh.shape["tp"])
        self._adapter_bytes = 0
        if adapters is not None and lora is not None:
            adapters.compile()
            copies = lora.staging_bytes(model.config, model.dtype, model.mesh.shape["tp"], MAX_STAGED)
            self._adapter_bytes = copies + max(map(reported_workspace, adapters.programs))
        self.num_blocks = self._count_blocks()
        self._compiled: dict[ProgramKey, jax.stages.Compiled] = {}
        self._inputs: dict[ProgramKey, Layout] = {}
        self._kv_cache: KVCache = ()
        self._counter = CompilationCounter()

    def compile(self, pool: LoweringPool | None = None, *, use_tqdm: bool = True) -> None:
        """Compile every program, of which `pool` lowers those that are not kept, and allocate the cache."""
        self._compile(pool, use_tqdm)
        workspace = max(reported_workspace(program) for program in self._compiled.values())
        if workspace > self._workspace and jax.default_backend() != "cpu":
            logger.warning("a step takes %d bytes where %d were expected; compiling again", workspace, self._workspace)
            self._workspace = workspace
            self.num_blocks = self._count_blocks()
            self._compile(pool, use_tqdm)
        self._kv_cache = self._pools.allocate(self._model.mesh, self.num_blocks)
        if jax.default_backend() != "cpu":
            self.warm_up()

    def warm_up(self) -> None:
        """Run every program once, on padding alone: a GPU loads kernels and makes graphs at their first launch."""
        for (name, bucket), layout in self._inputs.items():
            packed, _ = allocate(layout, self._config.max_num_seqs)
            banks = () if self._adapters is None or WITH_ADAPTERS not in name else (self._adapters.banks,)
            if name.startswith("prompt_logprobs"):
                self._run(name, bucket, self._state, packed, *banks)
            elif name.startswith("sample"):
                self._state, _ = self._run(name, bucket, self._state, packed, *banks)
            else:
                self._kv_cache, self._state, *_ = self._run(name, bucket, self._kv_cache, self._state, packed, *banks)
        jax.block_until_ready(self._state)

    def specs(self) -> dict[ProgramKey, ProgramSpec]:
        """Return what each program is compiled from."""
        return self._facts().table(self._model.mesh, self._programs, self._params_spec).specs()

    def _facts(self) -> ProgramFacts:
        model = self._model
        return ProgramFacts(
            model=model.config, dtype=model.dtype, config=self._config, num_blocks=self.num_blocks, lora=self._lora
        )

    def _compile(self, pool: LoweringPool | None, use_tqdm: bool) -> None:
        mesh, facts, specs = self._model.mesh, self._facts(), self.specs()
        self._inputs = {key: spec.inputs for key, spec in specs.items() if spec.inputs is not None}
        cache = None if self._cache_directory is None else ExecutableCache(self._cache_directory, mesh, facts)

        def lowered(keys: list[ProgramKey]) -> Iterator[tuple[ProgramKey, ProgramSpec]]:
            assert pool is not None
            for key, data in pool.lower(facts, mesh.abstract_mesh, keys):
                yield key, specs[key] if data is None else import_program(data, specs[key])

        lowers = None if pool is None else lowered
        self._compiled = compile_programs(specs, mesh, cache, use_tqdm=use_tqdm, lowered=lowers)

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
                if row.request.logit_bias is not None:
                    self._update_logit_bias(row, row.request.logit_bias)
            return self._embed(output) if self._is_embedding else self._generate(output)

    def close(self) -> None:
        """Let go of the device's memory."""
        self._counter.close()
        for array in jax.tree.leaves((self._model.params, self._kv_cache, self._state)):
            array.delete()

    def _generate(self, output: SchedulerOutput) -> Launched:
        greedy = self._builder.is_greedy(output)
        if output.is_decode:
            bucket, packed = self._builder.decode(output)
            # The greedy program always runs all steps; the other one as many as it is told.
            whole = greedy and output.num_steps == self._config.max_decode_steps
            name = "decode_greedy" if whole and ("decode_greedy", bucket) in self._compiled else "decode"
            self._kv_cache, self._state, samples = self._run_step(name, bucket, output, packed)
            return Launched(output, samples)
        bucket, packed = self._builder.prefill(output)
        self._kv_cache, self._state = self._run_step("prefill", bucket, output, packed)
        samples = None
        if any(row.samples for row in output.rows):
            bucket, packed = self._builder.sample(output)
            name = "sample_greedy" if greedy else "sample"
            self._state, samples = self._run_head(name, bucket, output, packed)
        chunks = self._builder.prompt_logprobs(output, PROMPT_LOGPROBS_CHUNK)
        reports = [self._run_head("prompt_logprobs", 0, output, chunk) for chunk in chunks]
        pooled = None
        if any(row.completes_pooling for row in output.rows):
            pooled = self._compiled["last_hidden", 0](self._state, self._builder.last_hidden(output))
        return Launched(output, samples, prompt_logprobs=reports, pooled=pooled)

    def _embed(self, output: SchedulerOutput) -> Launched:
        bucket, packed = self._builder.prefill(output)
        self._kv_cache, self._state, embeddings = self._run_step("embed", bucket, output, packed)
        return Launched(output, pooled=embeddings)

    def _run_step(self, name: str, bucket: int, output: SchedulerOutput, packed: np.ndarray) -> Any:
        """Run a step's program, the one with the adapters' banks where a row has an adapter."""
        if self._adapters is None or not uses_adapters(output):
            return self._run(name, bucket, self._kv_cache, self._state, packed)
        if has_vectors(output) and (name + WITH_VECTORS, bucket) in self._compiled:
            name += WITH_VECTORS
        else:
            name += WITH_ADAPTERS
        return self._run(name, bucket, self._kv_cache, self._state, packed, self._adapters.banks)

    def _run_head(self, name: str, bucket: int, output: SchedulerOutput, packed: np.ndarray) -> Any:
        """Run a program of the head alone, the one with the adapters' banks where one changes the head."""
        if self._adapters is None or not changes_vocab(output):
            return self._run(name, bucket, self._state, packed)
        return self._run(name + WITH_ADAPTERS, bucket, self._state, packed, self._adapters.banks)

    def _run(self, name: str, bucket: int, *arguments: Any) -> Any:
        """Run a program on the weights, device arrays, and host arrays, which it copies over.

        That costs the host less than `jax.device_put`. Nobody may write to these arrays afterwards.
        """
        return self._compiled[name, bucket](self._model.params, *arguments)

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

    def _update_logit_bias(self, row: ScheduledRow, bias: LogitBias) -> None:
        request = row.request
        if not row.samples or request.row_index is None:
            return
        num_outputs = row.start + row.num_tokens - request.num_prompt_tokens
        present, vector = bias.update(request, num_outputs)
        self._builder.set_logit_bias(request.row_index, present)
        if vector is not None:
            self._set_row("logit_bias", request, vector)

    def _set_row(self, name: str, request: Request, values: np.ndarray, fill: int = 0) -> None:
        packed = np.full(1 + self._state[name].shape[1], fill, np.int32)
        assert request.row_index is not None
        packed[0] = request.row_index
        packed[1 : 1 + len(values)] = values.view(np.int32)
        self._state = self._compiled[f"set_{name}", 0](self._state, packed)

    def _count_blocks(self) -> int:
        """Size the cache by what is left beside the largest step's workspace, and adapters on their way."""
        return count_blocks(
            self._pools,
            self._config.cache,
            workspace_bytes=0 if jax.default_backend() == "cpu" else self._workspace + self._adapter_bytes,
            blocks_needed=self._blocks_needed,
            blocks_useful=self._config.max_num_seqs * self._config.blocks_per_sequence,
        )
