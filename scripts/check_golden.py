"""Compare this machine's devices with Hugging Face's golden data: greedy tokens and prompt log-probabilities.

    python scripts/check_golden.py --out golden.json

It loads golden checkpoints and compares, for each, the prompts whose 48 greedy tokens are all equal, and the largest
error of a log-probability against Hugging Face in float32. In float32 all must be equal and the error small, or it
exits with 1; bfloat16 takes other turns among a tiny random model's close tokens and is only shown. On a CPU the
tests do the same and more; this is for a GPU.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking.record import write_record

from qwen2_jax import LLM, SamplingParams

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
CASES = ("untied", "heads_14_2", "window_partial", "window_all", "yarn_rope_scaling")
PROMPTS = 4
TOLERANCE = 1e-4
"""Of a log-probability in float32."""


def compare(case: str, dtype: str) -> dict[str, Any]:
    """Return one row of the table."""
    with np.load(GOLDEN / case / "golden.npz") as arrays:
        golden = dict(arrays)
    llm = LLM(
        GOLDEN / case,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_decode_steps=4,
        kv_cache_memory_bytes=64 * 2**20,
        use_tqdm_on_load=False,
    )
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    prompts = [golden[f"prompt_token_ids_{i}"].tolist() for i in range(PROMPTS)]
    same, error = 0, 0.0
    for i, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        same += list(output.outputs[0].token_ids) == golden[f"output_token_ids_{i}"].tolist()
        pairs = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
        found = [position[token].logprob for token, position in pairs if position is not None]
        error = max(error, float(np.abs(np.array(found) - golden[f"prompt_logprobs_{i}"]).max()))
    llm.shutdown()
    return {"case": case, "dtype": dtype, "greedy_equal": same, "prompts": PROMPTS, "largest_error": error}


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Return what differs in float32 that must not."""
    return [
        f"{row['case']} in float32: {row['greedy_equal']}/{PROMPTS} prompts equal, error {row['largest_error']:.2g} "
        f"(at most {TOLERANCE})"
        for row in rows
        if row["dtype"] == "float32" and not (row["greedy_equal"] == PROMPTS and row["largest_error"] <= TOLERANCE)
    ]


def main() -> None:
    """Print the table, and exit with 1 if float32 is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="folders of tests/golden, comma-separated")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    arguments = parser.parse_args()
    rows = []
    for case in arguments.cases.split(","):
        for dtype in arguments.dtypes.split(","):
            row = compare(case, dtype)
            rows.append(row)
            equal = f"{row['greedy_equal']}/{PROMPTS} equal"
            print(f"{case:20} {dtype:9} {equal}, largest error {row['largest_error']:.2g}", flush=True)
    failed = failures(rows)
    if arguments.out:
        write_record(arguments.out, rows, failures=failed)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
