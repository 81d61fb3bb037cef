"""Every program of a model with its abstract arguments: which are compiled at start-up."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qwen2_jax.config import ResolvedConfig
from qwen2_jax.engine.compilation import ProgramSpec
from qwen2_jax.engine.programs import PROMPT_LOGPROBS_CHUNK, Programs
from qwen2_jax.engine.step_inputs import (
    StepLoRA,
    decode_layout,
    packed_size,
    prefill_layout,
    prompt_logprobs_layout,
    sample_layout,
)
from qwen2_jax.lora.sizes import LoRASizes

ProgramKey = tuple[str, int]
"""A program's name and bucket."""
ROW_STATE = ("token_ids", "logit_bias", "logprob_token_ids")
"""The arrays of the state whose rows are set from the host."""
WITH_ADAPTERS = "_lora"
"""The end of the names of programs for calls with adapters."""
WITH_VECTORS = "_lora_vectors"
"""The same where an adapter has biases or magnitudes, and there is a faster program for calls with none."""


_CONCURRENT_ROWS = 32
"""Up to so many rows, the adapters' first products run beside the model's own; those of more fill the GPU alone.

In greedy calls, whose results were compared with the serial build's bit for bit; sampled ones, whose graphs have loops
and conditionals, were not.
"""


@dataclass(frozen=True, kw_only=True)
class ProgramTable:
    """What the programs of one model are made of."""

    config: ResolvedConfig
    programs: Programs
    params: Any
    """Abstract, as all below."""
    kv_cache: Any
    state: Any
    banks: Any
    """The adapters' banks; None without adapters."""
    lora: LoRASizes | None
    replicated: NamedSharding
    matmul_precision: str | None
    is_embedding: bool

    def specs(self) -> dict[ProgramKey, ProgramSpec]:
        """Return every program, those that take longest to compile first."""
        config, programs = self.config, self.programs
        specs: dict[ProgramKey, ProgramSpec] = {}
        for tokens in reversed(config.prefill_buckets):
            rows = config.prefill_rows(tokens)
            name, function = ("embed", programs.embed) if self.is_embedding else ("prefill", programs.prefill)
            results = (self.replicated,) if self.is_embedding else ()
            specs |= self._steps(name, tokens, tokens, rows, function, prefill_layout, *results)
        if self.is_embedding:
            return specs
        for rows in reversed(config.decode_buckets):
            names = {"decode": programs.decode}
            names |= {"decode_greedy": programs.decode_greedy} if config.max_decode_steps > 1 else {}
            for name, function in names.items():
                specs |= self._steps(name, rows, None, rows, function, decode_layout, self.replicated)
        return specs | self._small_specs()

    def _steps(
        self, name: str, bucket: int, tokens: int | None, rows: int, function: Any, layout: Any, *results: Any
    ) -> dict[ProgramKey, ProgramSpec]:
        """Return a step's program and, where there are adapters, the one for calls that use them."""
        width = self.config.blocks_per_sequence
        sizes: dict[str, int] = {"rows": rows}
        sizes |= {"steps": self.config.max_decode_steps} if tokens is None else {"tokens": tokens}
        lead = (rows,) if tokens is None else (tokens, rows)
        caches = jax.tree.map(lambda leaf: leaf.sharding, (self.kv_cache, self.state))

        def spec(function: Any, layout: Any, *banks: Any) -> ProgramSpec:
            return ProgramSpec(
                function=function,
                arguments=(self.params, self.kv_cache, self.state, self._vector(packed_size(layout)), *banks),
                inputs=layout,
                donated=(1, 2),
                out_shardings=(*caches, *results),
                matmul_precision=self.matmul_precision,
                as_graph=tokens is None,
                has_loop_in_graph=name == "decode",
                is_concurrent=bool(banks) and name == "decode_greedy" and rows <= _CONCURRENT_ROWS,
            )

        specs = {(name, bucket): spec(partial(function, **sizes), layout(*lead, width))}
        if self.lora is None:
            return specs
        lora = step_lora(self.lora, tokens or rows, rows)
        device = self.replicated.mesh.abstract_mesh.abstract_device
        splits = device is not None and has_faster_program(lora, device.platform)
        for ending, has_vectors in ((WITH_ADAPTERS, not splits), *([(WITH_VECTORS, True)] if splits else ())):
            lora = replace(lora, has_vectors=has_vectors)
            adapted = partial(function, **sizes, lora=lora)
            specs[name + ending, bucket] = spec(adapted, layout(*lead, width, lora), self.banks)
        return specs

    def _small_specs(self) -> dict[ProgramKey, ProgramSpec]:
        """The programs without layers: sampling, prompt log-probabilities, and setting a row of state."""
        programs, state = self.programs, self.state
        chunk, function = PROMPT_LOGPROBS_CHUNK, programs.prompt_logprobs
        specs = self._heads("prompt_logprobs", 0, chunk, function, prompt_logprobs_layout)
        for rows, greedy in itertools.product(self.config.sample_buckets, (False, True)):
            function = partial(programs.sample, rows=rows, greedy=greedy)
            name = "sample_greedy" if greedy else "sample"
            # As a graph, whose conditionals are nodes: the host would wait for the prefill to read them.
            specs |= self._heads(name, rows, rows, function, sample_layout, donated=(1,), as_graph=not greedy)
        if self.lora is not None:  # which classification heads come with
            specs["last_hidden", 0] = ProgramSpec(
                function=programs.last_hidden,
                arguments=(state, self._vector(self.config.max_num_seqs)),
                donated=(),
                out_shardings=self.replicated,
            )
        for name in ROW_STATE:
            specs[f"set_{name}", 0] = ProgramSpec(
                function=partial(programs.set_row, name=name),
                arguments=(state, self._vector(1 + state[name].shape[1])),
                donated=(0,),
                out_shardings=self.replicated,
            )
        return specs

    def _heads(
        self,
        name: str,
        bucket: int,
        rows: int,
        function: Any,
        layout: Any,
        *,
        donated: tuple[int, ...] = (),
        as_graph: bool = False,
    ) -> dict[ProgramKey, ProgramSpec]:
        """Return a program of the head alone and, where adapters may change it, the one for calls with such."""

        def spec(function: Any, layout: Any, *banks: Any) -> ProgramSpec:
            return ProgramSpec(
                function=function,
                arguments=(self.params, self.state, self._vector(packed_size(layout)), *banks),
                inputs=layout,
                donated=donated,
                out_shardings=self.replicated,
                matmul_precision=self.matmul_precision,
                as_graph=as_graph,
            )

        specs = {(name, bucket): spec(function, layout(rows))}
        if self.lora is not None and self.lora.has_vocab:
            lora = step_lora(self.lora, rows, rows)
            specs[name + WITH_ADAPTERS, bucket] = spec(partial(function, lora=lora), layout(rows, lora), self.banks)
        return specs

    def _vector(self, length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((length,), jnp.int32, sharding=self.replicated)


def families(keys: Iterable[ProgramKey]) -> list[list[ProgramKey]]:
    """Return `keys` in groups that share kernels, one bucket's variants of a step, the largest groups first."""
    groups: dict[ProgramKey, list[ProgramKey]] = {}
    for name, bucket in keys:
        family = name.removesuffix(WITH_VECTORS).removesuffix(WITH_ADAPTERS).removesuffix("_greedy")
        groups.setdefault((family, bucket), []).append((name, bucket))
    return sorted(groups.values(), key=len, reverse=True)


def has_faster_program(lora: StepLoRA, platform: str) -> bool:
    """Return whether a step is faster where no adapter has biases or magnitudes, and so has a program for either."""
    return platform == "gpu" and lora.tables.window is not None


def step_lora(sizes: LoRASizes, tokens: int, rows: int) -> StepLoRA:
    """Return what a step of `tokens` tokens in `rows` rows takes of adapters."""
    return StepLoRA(tables=sizes.tables(tokens, rows), vocab=sizes.vocab_tables(tokens, rows))


def abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    """Return an array's shape, dtype and sharding."""
    assert isinstance(array.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
