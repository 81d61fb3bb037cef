"""`linear` and `norm_linear` as a step calls them, for each of a model's projections."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import jax.numpy as jnp
from jax import Array
from qwen2_kernels import linear, norm_linear
from qwen2_kernels.linear.api import IMPLEMENTATIONS as LINEAR
from qwen2_kernels.linear.config import GEMV_PREFETCH_BYTES, Config, tuning_key
from qwen2_kernels.norm_linear.api import IMPLEMENTATIONS as NORM_LINEAR
from qwen2_kernels.specs import DECODE_TOKENS, PREFILL_TOKENS

from benchmarking.case import Case, Selection, after, noise, num_arrays, num_calls

HEADLINES = {1, 32, 128, 8192}
Run = Callable[..., Any]


def linear_cases(selection: Selection) -> Iterator[Case]:
    """Every implementation at every number of tokens; the head sees no more than a decode step's."""
    for name, kernel in selection.geometry.projections.items():
        for tokens in (1,) if selection.tune else DECODE_TOKENS + PREFILL_TOKENS * (name != "lm_head"):
            shared = _shared(selection, "linear", name, tokens)
            activation = "silu" if name == "gate_up" else None
            run = partial(linear, activation=activation, out_dtype=_out_dtype(name))
            if not selection.tune:
                for implementation in LINEAR.keys() - {"reference"}:
                    yield _case(_project, partial(run, implementation=implementation), implementation, shared)
                continue
            key = tuning_key(tokens, *kernel[-2:], gated=len(kernel) == 3)
            for config in _gemv_configs():
                tiled = partial(run, implementation="triton", config=config)
                yield _case(_project, tiled, "triton", shared | {"key": key, "config": config})


def norm_linear_cases(selection: Selection) -> Iterator[Case]:
    """The projections behind a norm, of one token: what several tokens get is `rms_norm` and `linear`."""
    for name in () if selection.tune else ("qkv", "gate_up"):
        shared = _shared(selection, "norm_linear", name, 1)
        run = partial(norm_linear, eps=1e-6, activation="silu" if name == "gate_up" else None)
        for implementation in NORM_LINEAR.keys() - {"reference"}:
            yield _case(_normalise, partial(run, implementation=implementation), implementation, shared)


def _case(chain: Run, run: Run, implementation: str, shared: dict[str, Any]) -> Case:
    return Case(implementation=implementation, function=partial(chain, run), **shared)


def _out_dtype(name: str) -> jnp.dtype:
    """Logits are in float32, as the sampler reads them."""
    return jnp.dtype(jnp.float32 if name == "lm_head" else jnp.bfloat16)


def _shared(selection: Selection, op: str, name: str, tokens: int) -> dict[str, Any]:
    """What the cases of one projection have in common: `make` returns results, tokens, kernels, and for a norm more."""
    kernel, out_dtype = selection.geometry.projections[name], _out_dtype(name)
    features, size = kernel[-2:]
    weights, with_norm = 2 * math.prod(kernel), op == "norm_linear"
    num_bytes = weights + tokens * features * out_dtype.itemsize + 2 * size * (tokens + with_norm * (2 * tokens + 1))
    flops = 2 * tokens * math.prod(kernel)
    arrays = num_arrays(weights, least=2)
    calls = num_calls(num_bytes, flops, least=arrays)

    def make(seed: Array) -> tuple[Any, ...]:
        results: list[Any] = [jnp.zeros((tokens, features), out_dtype) for _ in range(calls)]
        if with_norm:
            results = [(result, jnp.zeros((tokens, size), jnp.bfloat16)) for result in results]
        kernels = [noise(seed, stream, kernel) for stream in range(arrays)]
        x, residual = (noise(seed, arrays + i, (tokens, size)) for i in range(2))
        return results, x, kernels, *((residual, noise(seed, arrays + 2, (size,))) if with_norm else ())

    return dict(
        op=op,
        geometry=selection.name,
        dtype="bfloat16",
        shape=f"{name}, {tokens} tokens",
        make=make,
        calls=calls,
        num_bytes=num_bytes,
        flops=flops,
        headline=tokens in HEADLINES,
    )


def _project(run: Run, results: list[Array], x: Array, kernels: list[Array]) -> tuple[list[Array]]:
    """Project the same tokens through kernel after kernel, each when the last one is done."""
    outputs: list[Any] = []
    for index in range(len(results)):
        if outputs:
            x, outputs[-1] = after(x, outputs[-1])
        kernel, following = (kernels[i % len(kernels)] for i in (index, index + 1))
        outputs.append(run(x, kernel, prefetch=following))
    return (outputs,)


def _normalise(
    run: Run, results: list[Any], x: Array, kernels: list[Array], residual: Array, weight: Array
) -> tuple[list[Any]]:
    """Normalise and project the same tokens through kernel after kernel, each when the last one is done."""
    outputs: list[Any] = []
    for index in range(len(results)):
        if outputs:
            x, outputs[-1] = after(x, outputs[-1])
        kernel, following = (kernels[i % len(kernels)] for i in (index, index + 1))
        outputs.append(run(x, weight, kernel, residual, prefetch=following))
    return (outputs,)


def _gemv_configs() -> Iterator[Config]:
    for block_n, block_k, warps, stages in product((1, 2, 4, 8), (512, 1024, 2048), (2, 4), (1, 4)):
        if block_n * block_k <= 8192:
            yield Config(
                block_n=block_n,
                block_k=block_k,
                num_warps=warps,
                num_stages=stages,
                prefetch_bytes=GEMV_PREFETCH_BYTES,
            )
