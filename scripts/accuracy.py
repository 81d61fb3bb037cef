"""Compare log-probabilities in bfloat16, this package's and transformers', with transformers' in float32 on the CPU.

    python scripts/accuracy.py --out accuracy.json

For each model it sends prompts of many lengths at once, longer than a step, and lets each continue: prompt tokens are
read whole and in chunks, new tokens come from decode steps. transformers reads the same sequences. The models are
random Qwen2 checkpoints with a 0.5B and a 7B model's heads, and the embedded SmolLM2 where it is installed. An error
is that of one token's log-probability; the check is that neither its mean nor the mean of each sequence's largest is
more than `--ratio` times transformers' own in bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking.record import write_record

LENGTHS = (5, 33, 64, 100, 161, 250, 333, 400, 512, 700)
"""Tokens of the prompts."""
NEW_TOKENS = 48
STEP_TOKENS = 256
"""Tokens of a step at most, so that longer prompts are read in chunks."""
SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.05,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_heads_64": SHARED
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2_heads_128": SHARED
    | {
        "hidden_size": 1792,
        "intermediate_size": 4736,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
EMBEDDED = "smollm2"


def installed() -> list[str]:
    """Return the embedded model's name if its package is there."""
    from qwen2_jax.errors import CheckpointError
    from qwen2_jax.models.embedded import embedded_model

    try:
        embedded_model(EMBEDDED)
    except CheckpointError as error:
        print(f"without {EMBEDDED}: {error}")
        return []
    return [EMBEDDED]


def make_models(folder: Path, names: list[str]) -> None:
    """Write each model as a Hugging Face checkpoint in bfloat16; the embedded one is dequantised for that."""
    from scripts.make_tiny_model import make_tiny_model, write_checkpoint

    for name in names:
        if name in MODELS:
            make_tiny_model(folder / name, **MODELS[name])
            continue
        import ml_dtypes

        from qwen2_jax.models.embedded import embedded_model
        from qwen2_jax.models.gguf import open_gguf

        checkpoint = open_gguf(embedded_model(name))
        tensors = {key: entry.load().astype(ml_dtypes.bfloat16) for key, entry in checkpoint.tensors.items()}
        write_checkpoint(folder / name, checkpoint.config | {"torch_dtype": "bfloat16"}, tensors)


def run_qwen2_jax(folder: Path, name: str) -> None:
    """Write sequences, and the log-probabilities of all of their tokens but the first, to `ours.npz`."""
    from qwen2_jax import LLM, SamplingParams

    vocab_size = json.loads((folder / name / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, vocab_size, length).tolist() for length in LENGTHS]
    llm = LLM(
        folder / name,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_num_seqs=16,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
        lowering_workers=0,  # engines beside one another, with few layers
    )
    params = [
        SamplingParams(
            temperature=1.0,
            seed=index,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            prompt_logprobs=0,
            logprobs=0,
            detokenize=False,
        )
        for index in range(len(prompts))
    ]
    arrays = {}
    for index, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        completion = output.outputs[0]
        tokens = [*output.prompt_token_ids, *completion.token_ids]
        pairs = zip(tokens, [*(output.prompt_logprobs or ()), *(completion.logprobs or ())], strict=True)
        found = [position[token].logprob for token, position in pairs if position is not None]
        arrays[f"tokens_{index}"] = np.asarray(tokens, np.int64)
        arrays[f"logprobs_{index}"] = np.asarray(found, np.float32)
    llm.shutdown()
    np.savez(folder / name / "ours.npz", **arrays)


def run_transformers(folder: Path, name: str) -> None:
    """Write transformers' log-probabilities of the same tokens, in float32 and in bfloat16, to `theirs.npz`."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.utils.logging.disable_progress_bar()
    with np.load(folder / name / "ours.npz") as file:
        sequences = [torch.from_numpy(file[f"tokens_{index}"]) for index in range(len(LENGTHS))]
    arrays, gpu = {}, "cuda" if torch.cuda.is_available() else "cpu"
    for label, dtype, device in (("float32", torch.float32, "cpu"), ("bfloat16", torch.bfloat16, gpu)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype).to(device).eval()
        for index, tokens in enumerate(sequences):
            with torch.inference_mode():
                logits = model(tokens[None].to(device)).logits[0, :-1].float()
            chosen = torch.log_softmax(logits, -1).gather(1, tokens[1:, None].to(device))
            arrays[f"{label}_{index}"] = chosen[:, 0].cpu().numpy()
        del model
    np.savez(folder / name / "theirs.npz", **arrays)


def compare(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return a row for the prompts' tokens and one for the new ones."""
    with np.load(folder / name / "ours.npz") as ours, np.load(folder / name / "theirs.npz") as theirs:
        exact = [theirs[f"float32_{index}"] for index in range(len(LENGTHS))]
        found = {
            "qwen2_jax": [abs(ours[f"logprobs_{index}"] - exact[index]) for index in range(len(LENGTHS))],
            "transformers": [abs(theirs[f"bfloat16_{index}"] - exact[index]) for index in range(len(LENGTHS))],
        }
    rows = []
    for kind, part in (("prompt", slice(None, -NEW_TOKENS)), ("new", slice(-NEW_TOKENS, None))):
        row: dict[str, Any] = {"model": name, "tokens": kind, "count": sum(len(errors[part]) for errors in exact)}
        for engine, errors in found.items():
            parts = [sequence[part] for sequence in errors]
            row[engine] = {
                "mean": round(float(np.concatenate(parts).mean()), 6),
                "mean_largest": round(float(np.mean([values.max() for values in parts])), 5),
                "largest": round(float(max(values.max() for values in parts)), 5),
            }
        rows.append(row)
    return rows


def failures(rows: list[dict[str, Any]], ratio: float) -> list[str]:
    """Return what is less accurate than it may be."""
    return [
        f"{row['model']}, {row['tokens']} tokens: {what.replace('_', ' ')} error {row['qwen2_jax'][what]} is more than "
        f"{ratio} x transformers' {row['transformers'][what]}"
        for row in rows
        for what in ("mean", "mean_largest")
        if not row["qwen2_jax"][what] <= ratio * row["transformers"][what]
    ]


def format_rows(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [f"{'':32}{'mean':>20}{'mean of largest':>20}{'largest':>20}"]
    for row in rows:
        pairs = [(row["qwen2_jax"][what], row["transformers"][what]) for what in ("mean", "mean_largest", "largest")]
        cells = "".join(f"{f'{ours:.4g} / {theirs:.4g}':>20}" for ours, theirs in pairs)
        lines.append(f"{row['model']:16} {row['tokens']:6} {row['count']:5}   {cells}")
    return "\n".join(lines) + "\n(absolute error of a log-probability in bfloat16, qwen2_jax / transformers)"


def run_worker(python: str, worker: str, folder: Path, name: str) -> None:
    """Run one engine on one model in a process of its own."""
    # Several share the GPU: none may take its memory as a whole.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"}
    command = [python, __file__, "--worker", worker, "--folder", str(folder), "--models", name]
    subprocess.run(command, check=True, env=environment)


def main() -> None:
    """Run the engines, print the table, and exit with 1 if the check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", help=f"comma-separated, of {', '.join([*MODELS, EMBEDDED])}; default: what is there"
    )
    parser.add_argument("--ratio", type=float, default=1.1)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--worker", choices=["qwen2_jax", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.models.split(",") if arguments.models else [*MODELS, *installed()]
    if arguments.worker:
        worker = run_qwen2_jax if arguments.worker == "qwen2_jax" else run_transformers
        worker(arguments.folder, *names)
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        make_models(Path(folder), names)
        for engine, python in (("qwen2_jax", sys.executable), ("transformers", arguments.torch_python)):
            list(threads.map(lambda name, e=engine, p=python: run_worker(p, e, Path(folder), name), names))
        rows = [row for name in names for row in compare(Path(folder), name)]
    print(format_rows(rows))
    failed = failures(rows, arguments.ratio)
    if arguments.out:
        write_record(arguments.out, rows, ratio=arguments.ratio, failures=failed)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
