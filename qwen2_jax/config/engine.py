"""What the engine may use and how it runs: options as users give them, and what they become on a machine."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwen2_jax.config.checks import check_choice, check_int, check_number, check_type
from qwen2_jax.config.load import LoadConfig
from qwen2_jax.config.lora import LoRAConfig
from qwen2_jax.config.model import ModelConfig
from qwen2_jax.errors import ConfigError, reject_unknown

SchedulingPolicy = Literal["fcfs", "priority"]

# vLLM's options that are not built: what each means here, and the values that ask for nothing.
_NOT_BUILT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "quantization": ("quantised weights are not served", (None,)),
    "speculative_config": ("speculative decoding is not served yet", (None,)),
    "pipeline_parallel_size": ("layers are not split over devices; use tensor_parallel_size", (1, None)),
    "data_parallel_size": ("run one engine per replica", (1, None)),
    "trust_remote_code": ("no code of a checkpoint is ever run", (False, None)),
    "enforce_eager": ("every step is a compiled program", (False, None)),
    "cpu_offload_gb": ("weights stay on the device", (0, None)),
    "swap_space": ("preempted sequences are computed again, not swapped", (0, None)),
}

_FEWEST_MIXED_TOKENS = 2048
"""Tokens of a step that decodes beside prompts, at least: fewer would be slower a token."""
_MIXED_PRODUCTS = 13_400_000_000_000
"""Tokens times weights of such a step: 44 ms on an H100."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged key-value cache."""

    block_size: int | None = None
    """Tokens in a block. None: 64 on a GPU, whose kernels copy whole blocks, and 16 on a CPU."""
    gpu_memory_utilization: float = 0.92
    """The share of a GPU's memory that weights, workspace and cache may take together."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of cache on each device; None takes what is free on a GPU, and at most `CPU_CACHE_BYTES` on a CPU."""
    num_gpu_blocks_override: int | None = None
    """Number of blocks, whatever the memory; for tests and experiments."""
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
    """`"auto"` is the model's dtype."""

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 1, 1024, optional=True)
        if not 0 < check_number("gpu_memory_utilization", self.gpu_memory_utilization) <= 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization} is not in (0, 1]")
        check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, optional=True)
        check_int("num_gpu_blocks_override", self.num_gpu_blocks_override, 2, optional=True)
        check_type("enable_prefix_caching", self.enable_prefix_caching, bool, "True or False")
        if self.kv_cache_dtype != "auto":
            raise ConfigError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not served yet: only 'auto', the model's dtype, is"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs. None leaves a value to the platform; `resolve` fills it in."""

    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    max_model_len: int | None = None
    """The longest sequence, prompt and output together, in tokens. None: the model's context length."""
    max_num_seqs: int | None = None
    """Sequences that run together. None: 256 on a GPU, 16 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step, over all its sequences. None: 8192 on a GPU, 512 on a CPU."""
    max_num_mixed_tokens: int | None = None
    """The same for a step that decodes, beside prompts, a sequence whose tokens are streamed: who reads them waits for
    it. None: on a GPU 2048 for a model of 7B and more, for a smaller one what takes as long, at least twice
    `max_num_seqs`; as many as others on a CPU, and without chunked prefill."""
    max_decode_steps: int | None = None
    """Decode steps that the host starts without looking at their tokens. None: 8 on a GPU, 1 on a CPU."""
    enable_chunked_prefill: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    """`"fcfs"`, or `"priority"`: lower numbers first."""
    tensor_parallel_size: int = 1
    seed: int = 0
    """Draws the seeds of requests that bring none."""
    max_logprobs: int = 20
    """The most log-probabilities that a request may ask for per token; -1 allows the whole vocabulary."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_mixed_tokens"):
            check_int(name, getattr(self, name), 1, optional=True)
        check_int("max_decode_steps", self.max_decode_steps, 1, 64, optional=True)
        check_int("tensor_parallel_size", self.tensor_parallel_size, 1)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_int("max_logprobs", self.max_logprobs, -1)
        check_choice("scheduling_policy", self.scheduling_policy, get_args(SchedulingPolicy))
        check_type("enable_chunked_prefill", self.enable_chunked_prefill, bool, "True or False")

    def resolve(self, model: ModelConfig, platform: str, *, skips_padding: bool = False) -> "ResolvedConfig":
        """Fill in what depends on the model and on `platform` (`"gpu"` or `"cpu"`), and check the whole.

        `skips_padding` says that this platform's kernels take no time for the padding of a prefill of many tokens.
        """
        gpu = platform != "cpu"
        max_num_seqs = self.max_num_seqs or (256 if gpu else 16)
        context = model.context_length
        max_model_len = self.max_model_len or context
        if max_model_len > context:
            raise ConfigError(
                f"max_model_len={max_model_len} is longer than the model's context of {context} tokens; "
                "use at most that, or extend it through hf_overrides (rope_parameters of type 'yarn')"
            )
        if max_model_len < 2 and not model.is_embedding_model:
            raise ConfigError(f"max_model_len={max_model_len} has no room for a prompt and an answer; use at least 2")
        tokens = self.max_num_batched_tokens or max(8192 if gpu else 512, max_num_seqs)
        if not self.enable_chunked_prefill or not model.is_causal:
            if self.max_num_batched_tokens is not None and tokens < max_model_len:
                raise ConfigError(
                    f"max_num_batched_tokens={tokens} is less than max_model_len={max_model_len}, but prompts are not "
                    "computed in chunks (enable_chunked_prefill=False, or a model that is not causal)"
                )
            tokens = max(tokens, max_model_len)
        if tokens < max_num_seqs:
            raise ConfigError(f"max_num_batched_tokens={tokens} is less than max_num_seqs={max_num_seqs}")
        mixed = self._mixed_tokens(model, tokens, max_num_seqs, gpu=gpu)
        if not model.is_causal and any(window is not None for window in model.layer_windows):
            raise ConfigError("is_causal=False with a sliding window is not supported; override use_sliding_window")
        return ResolvedConfig(
            config=self,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            max_num_mixed_tokens=mixed,
            max_decode_steps=self.max_decode_steps or (8 if gpu else 1),
            block_size=self.cache.block_size or (64 if gpu else 16),
            max_logprobs=model.vocab_size if self.max_logprobs == -1 else min(self.max_logprobs, model.vocab_size),
            smallest_batch=8 if gpu else 4,
            smallest_prefill=128 if gpu else 32,
            decode_growth=2 if gpu else 4,
            skips_padding=skips_padding,
        )

    def _mixed_tokens(self, model: ModelConfig, tokens: int, max_num_seqs: int, *, gpu: bool) -> int:
        given = self.max_num_mixed_tokens
        if given is None and not (gpu and self.enable_chunked_prefill):
            return tokens
        if given is None:
            as_long = _MIXED_PRODUCTS * self.tensor_parallel_size // model.num_layer_parameters // 512 * 512
            return min(tokens, max(_FEWEST_MIXED_TOKENS, as_long, 2 * max_num_seqs))
        if not max_num_seqs < given <= tokens:
            raise ConfigError(
                f"max_num_mixed_tokens={given} is not above max_num_seqs={max_num_seqs} and at most "
                f"max_num_batched_tokens={tokens}"
            )
        if not self.enable_chunked_prefill:
            raise ConfigError(f"max_num_mixed_tokens={given} needs enable_chunked_prefill=True, to cut prompts")
        return given


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """`EngineConfig` on one machine with one model: every size is a number."""

    config: EngineConfig
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int
    max_decode_steps: int
    block_size: int
    max_logprobs: int
    smallest_batch: int
    """Rows of the smallest decode program after that of one row: on a GPU fewer take as long as 8."""
    smallest_prefill: int
    """Tokens of the smallest prefill program: on a GPU fewer take about as long as 128, the time of reading weights."""
    decode_growth: int
    """How many times the last one each larger decode bucket is: compilation time against padding."""
    skips_padding: bool = False
    """Whether a prefill of many tokens takes no time for its padding, so that few buckets do."""

    @property
    def cache(self) -> CacheConfig:
        """The cache's options."""
        return self.config.cache

    @property
    def blocks_per_sequence(self) -> int:
        """M: the blocks that the longest sequence takes."""
        return -(-self.max_model_len // self.block_size)

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """R of the decode programs: 1, `smallest_batch`, four times that, and finer from there on."""
        sizes, largest = [1, self.smallest_batch, 4 * self.smallest_batch], self.max_num_seqs
        while sizes[-1] < largest:
            sizes.append(sizes[-1] * self.decode_growth)
        return tuple(sorted({min(size, largest) for size in sizes}))

    @property
    def sample_buckets(self) -> tuple[int, ...]:
        """R of the programs that sample behind a prefill: few of the decode buckets, for sampling costs little."""
        return tuple(sorted({1, *self.decode_buckets[::-3]}))

    @property
    def prefill_buckets(self) -> tuple[int, ...]:
        """T of the prefill programs; R of each is `prefill_rows(T)`.

        Few small ones, which take as long as reading the weights; finer ones above, where padding takes time.
        """
        sizes, largest = [self.smallest_prefill, 128, 512, 1024, 1536, 2048], self.max_num_batched_tokens
        while sizes[-1] < largest:
            between = [] if self.skips_padding else [sizes[-1] * 3 // 2]
            sizes += [*between, sizes[-1] * 2]
        return tuple(sorted({min(size, largest) for size in sizes}))

    def prefill_rows(self, tokens: int) -> int:
        """R of the prefill program for `tokens` tokens."""
        return min(tokens, self.max_num_seqs)


def split_options(options: Mapping[str, Any]) -> tuple[LoadConfig, EngineConfig]:
    """Sort keyword options, named as vLLM names them, into what loads the model and what runs it.

    Raises `ConfigError` for an unknown name, with the nearest known one, and for an option of vLLM's that is not built.
    """
    load, cache = _names(LoadConfig), _names(CacheConfig)
    lora, engine = _names(LoRAConfig), _names(EngineConfig) - {"cache", "lora"}
    reject_unknown("option", options, [*load, *cache, *lora, *engine, *_NOT_BUILT])
    for name, (why, harmless) in _NOT_BUILT.items():
        if name in options and not any(options[name] is ok or options[name] == ok for ok in harmless):
            raise ConfigError(f"{name}={options[name]!r} is refused: {why}")

    def pick(names: set[str]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in names}

    parts = {"cache": CacheConfig(**pick(cache)), "lora": LoRAConfig(**pick(lora))}
    for name in lora - {"enable_lora"}:
        if options.get(name) is not None and not options.get("enable_lora"):
            raise ConfigError(
                f"{name}={options[name]!r} has no effect without adapters; add enable_lora=True, or leave it out"
            )
    return LoadConfig(**pick(load)), EngineConfig(**parts, **pick(engine))


def _names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}
