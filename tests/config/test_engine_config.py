"""Options as users give them: each is checked, a wrong one is named, and what is left out follows the machine."""

import dataclasses
import itertools
from typing import Any

import pytest
from qwen2_kernels.specs import QWEN2_5

from qwen2_jax.config import (
    CacheConfig,
    EngineConfig,
    LoadConfig,
    LoRAConfig,
    ModelConfig,
    ResolvedConfig,
    split_options,
)
from qwen2_jax.errors import ConfigError

MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
SIZES = {name: dataclasses.asdict(geometry) for name, geometry in QWEN2_5.items()}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


def resolve(platform: str = "gpu", model: dict[str, Any] | None = None, **options: Any) -> ResolvedConfig:
    _, engine = split_options(options)
    return engine.resolve(ModelConfig.from_hf(MODEL | (model or {})), platform)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("load_format", "pt", "load_format='pt' is not one of 'auto', 'safetensors', 'gguf', 'orbax', 'dummy'"),
        ("dtype", "int8", "dtype='int8' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ("runner", "draft", "runner='draft' is not one of 'auto', 'generate', 'pooling'"),
        ("revision", 7, "revision=7 is not a string or None"),
        ("hf_token", 7, "hf_token=7 is not a string, True, False or None"),
        ("hf_overrides", "{}", "hf_overrides='{}' is not a dict or None"),
        ("use_tqdm_on_load", 1, "use_tqdm_on_load=1 is not True or False"),
        ("lowering_workers", -1, "lowering_workers=-1 is not an integer from 0 to 64"),
        ("lowering_workers", True, "lowering_workers=True is not"),
        ("block_size", 0, "block_size=0 is not an integer from 1 to 1024"),
        ("block_size", 2000, "block_size=2000 is not"),
        ("block_size", 16.0, "block_size=16.0 is not"),
        ("gpu_memory_utilization", 0, r"gpu_memory_utilization=0 is not in \(0, 1\]"),
        ("gpu_memory_utilization", 1.5, "gpu_memory_utilization=1.5 is not"),
        ("gpu_memory_utilization", float("nan"), "gpu_memory_utilization=nan is not"),
        ("gpu_memory_utilization", "0.9", "gpu_memory_utilization='0.9' is not a number"),
        ("gpu_memory_utilization", True, "gpu_memory_utilization=True is not a number"),
        ("kv_cache_memory_bytes", 0, "kv_cache_memory_bytes=0 is not an integer of at least 1"),
        ("num_gpu_blocks_override", 1, "num_gpu_blocks_override=1 is not an integer of at least 2"),
        ("enable_prefix_caching", "no", "enable_prefix_caching='no' is not True or False"),
        ("kv_cache_dtype", "fp8", "kv_cache_dtype='fp8' is not served yet: only 'auto'"),
        ("max_model_len", 0, "max_model_len=0 is not an integer of at least 1"),
        ("max_model_len", "4k", "max_model_len='4k' is not"),
        ("max_num_seqs", 0, "max_num_seqs=0 is not"),
        ("max_num_seqs", True, "max_num_seqs=True is not"),
        ("max_num_batched_tokens", -1, "max_num_batched_tokens=-1 is not"),
        ("max_num_mixed_tokens", 0, "max_num_mixed_tokens=0 is not"),
        ("max_decode_steps", 0, "max_decode_steps=0 is not an integer from 1 to 64"),
        ("max_decode_steps", 65, "max_decode_steps=65 is not"),
        ("enable_chunked_prefill", None, "enable_chunked_prefill=None is not True or False"),
        ("scheduling_policy", "lifo", "scheduling_policy='lifo' is not one of 'fcfs', 'priority'"),
        ("tensor_parallel_size", 0, "tensor_parallel_size=0 is not an integer of at least 1"),
        ("seed", -1, "seed=-1 is not an integer from 0"),
        ("seed", 2**63, "seed=9223372036854775808 is not"),
        ("max_logprobs", -2, "max_logprobs=-2 is not an integer of at least -1"),
    ],
)
def test_a_wrong_value_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_options({option: value})


def test_every_option_is_checked() -> None:
    """An object that no option can be is refused whichever takes it."""
    for config in (LoadConfig, CacheConfig, LoRAConfig, EngineConfig):
        for field in dataclasses.fields(config):
            if field.name not in ("cache", "lora"):
                with pytest.raises(ConfigError, match=rf"^{field.name}=\[None\] is not"):
                    split_options({field.name: [None]})


@pytest.mark.parametrize(
    "typo, known",
    [
        ("max_modle_len", "max_model_len"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("load_formt", "load_format"),
        ("enable_lor", "enable_lora"),
    ],
)
def test_an_unknown_option_names_the_nearest(typo: str, known: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown option '{typo}'; did you mean '{known}'\?"):
        split_options({typo: 1})


@pytest.mark.parametrize("name, part", [("cache", CacheConfig()), ("lora", LoRAConfig())])
def test_a_part_is_given_by_its_options(name: str, part: CacheConfig | LoRAConfig) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{name}'"):
        split_options({name: part})


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("quantization", "awq", "quantization='awq' is refused: quantised weights"),
        ("speculative_config", {"model": "x"}, r"speculative_config={'model': 'x'} is refused: speculative"),
        ("pipeline_parallel_size", 2, "pipeline_parallel_size=2 is refused: .* use tensor_parallel_size"),
        ("data_parallel_size", 2, "data_parallel_size=2 is refused: run one engine per replica"),
        ("trust_remote_code", True, "trust_remote_code=True is refused: no code of a checkpoint is ever run"),
        ("enforce_eager", True, "enforce_eager=True is refused: every step is a compiled program"),
        ("cpu_offload_gb", 4, "cpu_offload_gb=4 is refused: weights stay on the device"),
        ("swap_space", 4, "swap_space=4 is refused: preempted sequences are computed again"),
    ],
)
def test_what_is_not_built_is_refused_by_name(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_options({option: value})


@pytest.mark.parametrize("option", ["max_loras", "max_lora_rank", "max_cpu_loras", "max_vocab_loras", "max_full_vocab"])
def test_an_option_of_adapters_without_adapters_is_refused(option: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{option}=64 has no effect without adapters; add enable_lora=True, or leave it out"
    ):
        split_options({option: 64})
    split_options({option: 64, "enable_lora": True})


def test_asking_for_nothing_that_is_not_built_is_fine() -> None:
    nothing = {"enable_lora": False, "max_loras": None, "pipeline_parallel_size": 1, "swap_space": 0}
    assert split_options(nothing) == split_options({}) == (LoadConfig(), EngineConfig())


def test_options_are_sorted_into_their_configs() -> None:
    load, engine = split_options({"dtype": "bfloat16", "block_size": 32, "max_num_seqs": 7, "seed": 5})
    assert load == LoadConfig(dtype="bfloat16")
    assert engine == EngineConfig(cache=CacheConfig(block_size=32), max_num_seqs=7, seed=5)


def test_configs_do_not_change() -> None:
    for config in (LoadConfig(), CacheConfig(), EngineConfig(), resolve()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.dtype = "float32"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "dtype, checkpoint, platform, expected",
    [
        ("auto", "bfloat16", "gpu", "bfloat16"),
        ("auto", "bfloat16", "cpu", "float32"),
        ("bfloat16", "float32", "cpu", "bfloat16"),
        ("float32", "bfloat16", "gpu", "float32"),
    ],
)
def test_dtype(dtype: Any, checkpoint: str, platform: str, expected: str) -> None:
    assert LoadConfig(dtype=dtype).resolve_dtype(checkpoint, platform) == expected


def test_what_is_left_out_follows_the_machine() -> None:
    gpu, cpu = resolve("gpu"), resolve("cpu")
    assert (gpu.max_num_seqs, gpu.max_num_batched_tokens, gpu.max_decode_steps) == (256, 8192, 8)
    assert (cpu.max_num_seqs, cpu.max_num_batched_tokens, cpu.max_decode_steps) == (16, 512, 1)
    assert (gpu.max_num_mixed_tokens, cpu.max_num_mixed_tokens) == (8192, 512)
    assert gpu.max_model_len == cpu.max_model_len == 1000
    given: dict[str, Any] = {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 40,
        "max_num_mixed_tokens": 20,
        "max_decode_steps": 2,
        "max_model_len": 50,
    }
    for platform in ("gpu", "cpu"):
        resolved = resolve(platform, **given)
        assert {name: getattr(resolved, name) for name in given} == given


def test_max_model_len_is_within_the_context() -> None:
    with pytest.raises(ConfigError, match="max_model_len=1001 is longer than the model's context of 1000 tokens"):
        resolve(max_model_len=1001)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    assert resolve(model={"rope_scaling": yarn}, max_model_len=4000).max_model_len == 4000
    with pytest.raises(ConfigError, match="max_model_len=1 has no room for a prompt and an answer; use at least 2"):
        resolve(max_model_len=1)
    assert resolve(model={"architectures": ["Qwen2Model"]}, max_model_len=1).max_model_len == 1


def test_a_mixed_step_has_room_for_every_row_and_a_prompt() -> None:
    for wrong in (9, 41):
        with pytest.raises(ConfigError, match=f"max_num_mixed_tokens={wrong} is not above max_num_seqs=9 and at most"):
            resolve(max_num_mixed_tokens=wrong, max_num_batched_tokens=40, max_num_seqs=9)
    with pytest.raises(ConfigError, match="max_num_mixed_tokens=20 needs enable_chunked_prefill=True"):
        resolve("cpu", max_num_mixed_tokens=20, enable_chunked_prefill=False)
    assert resolve("gpu", model=SIZES["7b"], max_num_seqs=3000).max_num_mixed_tokens == 6000
    assert resolve("gpu", model=SIZES["7b"], enable_chunked_prefill=False).max_num_mixed_tokens == 8192


@pytest.mark.parametrize("name, expected", [("0.5b", 8192), ("3b", 4608), ("7b", 2048), ("14b", 2048)])
def test_a_mixed_step_of_a_smaller_model_takes_more_tokens(name: str, expected: int) -> None:
    assert resolve("gpu", model=SIZES[name]).max_num_mixed_tokens == expected
    assert resolve("gpu", model=SIZES["14b"], tensor_parallel_size=4).max_num_mixed_tokens == 3584


def test_a_step_has_room_for_every_row_and_for_prompts_in_one_piece() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=8 is less than max_num_seqs=9"):
        resolve(max_num_batched_tokens=8, max_num_seqs=9)
    assert resolve("cpu", max_num_seqs=600).max_num_batched_tokens == 600
    assert resolve("cpu", enable_chunked_prefill=False).max_num_batched_tokens == 1000
    with pytest.raises(ConfigError, match="max_num_batched_tokens=999 is less than max_model_len=1000, but prompts"):
        resolve(enable_chunked_prefill=False, max_num_batched_tokens=999)
    assert resolve("cpu", model={"is_causal": False}).max_num_batched_tokens == 1000
    with pytest.raises(ConfigError, match="max_num_batched_tokens=512 is less than max_model_len"):
        resolve(model={"is_causal": False}, max_num_batched_tokens=512)


def test_a_window_needs_a_causal_model() -> None:
    assert resolve(model=WINDOW).max_model_len == 1000
    with pytest.raises(ConfigError, match="is_causal=False with a sliding window is not supported"):
        resolve(model=WINDOW | {"is_causal": False})


@pytest.mark.parametrize("asked, expected", [(20, 20), (0, 0), (500, 100), (-1, 100)])
def test_max_logprobs_is_within_the_vocabulary(asked: int, expected: int) -> None:
    assert resolve(max_logprobs=asked).max_logprobs == expected


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("seqs, tokens", [(1, 1), (1, 512), (7, 100), (16, 512), (256, 8192), (100, 100)])
def test_buckets_hold_every_size_without_too_much_padding(platform: str, seqs: int, tokens: int) -> None:
    config = resolve(platform, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    for buckets, largest in ((config.decode_buckets, seqs), (config.prefill_buckets, tokens)):
        assert buckets[-1] == largest and list(buckets) == sorted(set(buckets))
        for low, high in itertools.pairwise(buckets):
            assert high <= 4 * low or high <= config.smallest_batch
    assert config.decode_buckets[0] == 1
    assert config.prefill_buckets[0] == min(config.smallest_prefill, tokens)
    for bucket in config.prefill_buckets:
        assert config.prefill_rows(bucket) == min(bucket, seqs)


def test_where_padding_takes_no_time_fewer_buckets_do() -> None:
    config = EngineConfig(max_num_batched_tokens=10000).resolve(ModelConfig.from_hf(MODEL), "gpu", skips_padding=True)
    assert config.prefill_buckets == (128, 512, 1024, 1536, 2048, 4096, 8192, 10000)
    assert resolve(max_num_batched_tokens=4096).prefill_buckets == (128, 512, 1024, 1536, 2048, 3072, 4096)


@pytest.mark.parametrize("length, block_size, expected", [(1000, 16, 63), (64, 16, 4), (65, 16, 5), (5, 8, 1)])
def test_blocks_per_sequence(length: int, block_size: int, expected: int) -> None:
    assert resolve(max_model_len=length, block_size=block_size).blocks_per_sequence == expected
