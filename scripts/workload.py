"""The yardstick: the same requests through qwen2_jax or vLLM, timed the same way.

    python scripts/workload.py --engine qwen2_jax --geometry 7b --out 7b.json
    python scripts/workload.py --engine qwen2_jax --geometry 7b --adapters 32 --rank 16
    python scripts/workload.py --engine vllm --geometry 7b --adapters 32 --rank 16

Weights are random, prompts are random token ids, decoding is greedy, and end-of-sequence is ignored. Each row is a JSON
object on a line of its own; all of them are in --out.

- decode: `--context` prompt tokens a row, with 8 and with 136 new tokens: a step is a 128th of the difference.
- prefill: one new token a row; prompt tokens per second.
- mixed: 512 requests at once, of 64 to 959 prompt tokens and 32 to 255 new tokens; output tokens per second.

With `--adapters N` all of it runs with 0, 1, 8 and N of them, row i using adapter i modulo that number: 0 is what
adapters cost that nobody uses. Needs nothing of this repository, so that it runs where vLLM is installed.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GEOMETRIES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "14b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
"""Sizes of Qwen2.5 models, as their config.json has them."""

FAMILY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "sliding_window": None,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
}
"""What all of them share."""

PREFILLS = ((1, 2048), (16, 2048), (1, 8000))
"""Prompts and their length."""
MIXED_REQUESTS = 512
SHORT, LONG = 8, 136
"""New tokens of a decode measurement's two runs."""

Run = Callable[[Sequence[int], Sequence[int], int], float]
Report = Callable[..., None]


def write_model(folder: Path, geometry: str) -> None:
    """Write the config of a model without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = GEOMETRIES[geometry]
    config = FAMILY | sizes | {"max_window_layers": sizes["num_hidden_layers"]}
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, geometry: str, rank: int, seed: int) -> None:
    """Write a random PEFT adapter of all seven projections, unless it is there."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    if (folder / "adapter_config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = GEOMETRIES[geometry]
    hidden, intermediate = sizes["hidden_size"], sizes["intermediate_size"]
    kv = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (hidden, intermediate), "up_proj": (hidden, intermediate), "down_proj": (intermediate, hidden)}
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(sizes["num_hidden_layers"]):
        for block, projections in (("self_attn", attention), ("mlp", mlp)):
            for name, (fan_in, fan_out) in projections.items():
                for letter, shape in (("A", (rank, fan_in)), ("B", (fan_out, rank))):
                    values = rng.standard_normal(shape, np.float32) * 0.02
                    key = f"base_model.model.model.layers.{layer}.{block}.{name}.lora_{letter}.weight"
                    tensors[key] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [*attention, *mlp],
        "base_model_name_or_path": None,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def start_engine(arguments: argparse.Namespace, model: Path, adapters: Sequence[Path]) -> Run:
    """Start the engine; return what generates and gives the seconds that it took.

    `run(lengths, new_tokens, used)` sends one prompt of each length at once; row i uses adapter i modulo `used`; 0 is
    no adapter.
    """
    options: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "max_num_seqs": 256,
        "enable_prefix_caching": False,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "seed": 0,
    }
    if adapters:
        count = len(adapters)
        options |= {"enable_lora": True, "max_loras": count, "max_lora_rank": arguments.rank, "max_cpu_loras": count}
    if arguments.engine == "vllm":
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        options |= {"gpu_memory_utilization": 0.88, "disable_log_stats": True}
    else:
        from qwen2_jax import LLM, LoRARequest, SamplingParams
    llm: Any = LLM(**options)
    make_request: Any = LoRARequest
    rng = random.Random(0)

    def run(lengths: Sequence[int], new_tokens: Sequence[int], used: int) -> float:
        prompts = [{"prompt_token_ids": [rng.randrange(1000, 150000) for _ in range(length)]} for length in lengths]
        params = [
            SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0, detokenize=False) for count in new_tokens
        ]
        rows = range(len(prompts)) if used else ()
        lora = [make_request(f"adapter{i % used}", 1 + i % used, str(adapters[i % used])) for i in rows] or None
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        seconds = time.perf_counter() - start
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if counts != list(new_tokens):
            raise RuntimeError(f"asked for {list(new_tokens)} new tokens, got {counts}")
        return seconds

    return run


def measure_decode(run: Run, report: Report, batches: Sequence[int], context: int, used: int) -> None:
    """Report the time of a decode step at each batch."""
    for batch in batches:
        run([context] * batch, [4] * batch, used)
        short, long = (min(run([context] * batch, [count] * batch, used) for _ in range(2)) for count in (SHORT, LONG))
        step = (long - short) / (LONG - SHORT)
        report(
            adapters_used=used,
            decode_batch=batch,
            step_ms=round(step * 1e3, 3),
            decode_tok_s=round(batch / step, 1),
        )


def measure_prefill(run: Run, report: Report, used: int) -> None:
    """Report how fast prompts are read."""
    for batch, length in PREFILLS:
        run([length] * batch, [1] * batch, used)
        seconds = min(run([length] * batch, [1] * batch, used) for _ in range(3))
        report(
            adapters_used=used,
            prefill_batch=batch,
            length=length,
            seconds=round(seconds, 4),
            prompt_tok_s=round(batch * length / seconds, 1),
        )


def measure_mixed(run: Run, report: Report, used: int) -> None:
    """Report the throughput of many different requests."""
    rng = random.Random(1)
    lengths = [rng.randrange(64, 960) for _ in range(MIXED_REQUESTS)]
    new_tokens = [rng.randrange(32, 256) for _ in range(MIXED_REQUESTS)]
    seconds = run(lengths, new_tokens, used)
    report(
        adapters_used=used,
        mixed_requests=MIXED_REQUESTS,
        seconds=round(seconds, 3),
        output_tok_s=round(sum(new_tokens) / seconds, 1),
        total_tok_s=round((sum(new_tokens) + sum(lengths)) / seconds, 1),
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["qwen2_jax", "vllm"], required=True)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of a decode measurement")
    parser.add_argument("--batches", default="1,8,32,64,128,256", help="of the decode measurements")
    parser.add_argument("--skip", default="", help="comma-separated: decode, prefill, mixed")
    scratch = Path(tempfile.gettempdir()) / "qwen2_workload"
    parser.add_argument("--scratch", type=Path, default=scratch, help="where configs and adapters are written")
    parser.add_argument("--out", type=Path, default=Path("workload.json"))
    arguments = parser.parse_args()
    arguments.skip = set(filter(None, arguments.skip.split(",")))
    if unknown := arguments.skip - {"decode", "prefill", "mixed"}:
        parser.error(f"--skip {','.join(sorted(unknown))}: use decode, prefill, mixed")
    arguments.batches = [int(batch) for batch in arguments.batches.split(",")]
    return arguments


def main() -> None:
    """Run what the command line asks for."""
    arguments = parse_arguments()
    model = arguments.scratch / arguments.geometry
    write_model(model, arguments.geometry)
    folder = arguments.scratch / f"{arguments.geometry}_r{arguments.rank}"
    adapters = [folder / str(index) for index in range(arguments.adapters)]
    for index, path in enumerate(adapters):
        write_adapter(path, arguments.geometry, arguments.rank, index)
    rows: list[dict[str, Any]] = []

    def report(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        arguments.out.write_text(json.dumps(rows, indent=1))

    start = time.perf_counter()
    run = start_engine(arguments, model, adapters)
    report(
        engine=arguments.engine,
        geometry=arguments.geometry,
        adapters=arguments.adapters,
        rank=arguments.rank if adapters else None,
        kv_cache_dtype=arguments.kv_cache_dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        startup_s=round(time.perf_counter() - start, 1),
    )
    for used in sorted({count for count in (0, 1, 8, len(adapters)) if count <= len(adapters)}):
        run([arguments.context] * max(1, used), [4] * max(1, used), used)  # every adapter is resident before timing
        if "decode" not in arguments.skip:
            measure_decode(run, report, arguments.batches, arguments.context, used)
        if "prefill" not in arguments.skip:
            measure_prefill(run, report, used)
        if "mixed" not in arguments.skip:
            measure_mixed(run, report, used)


if __name__ == "__main__":
    main()
