"""Compare this machine's devices with Hugging Face's golden data: greedy tokens and prompt log-probabilities.

    python scripts/check_golden.py --out golden.json

It loads each golden checkpoint in float32 and in bfloat16 and prints, beside the prompts whose 48 greedy tokens are all
equal, the largest error of a log-probability against Hugging Face in float32. On a CPU the tests do the same and more;
this is for a GPU, which they do not run on.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from qwen2_jax import LLM, SamplingParams

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
CASES = ("untied", "heads_14_2", "window_partial", "window_all", "yarn_rope_scaling")


def compare(case: str, dtype: str) -> dict[str, object]:
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
    prompts = [golden[f"prompt_token_ids_{i}"].tolist() for i in range(4)]
    same, error = 0, 0.0
    for i, output in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        same += list(output.outputs[0].token_ids) == golden[f"output_token_ids_{i}"].tolist()
        pairs = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
        found = [position[token].logprob for token, position in pairs if position is not None]
        error = max(error, float(np.abs(np.array(found) - golden[f"prompt_logprobs_{i}"]).max()))
    llm.shutdown()
    return {"case": case, "dtype": dtype, "greedy_equal": f"{same}/4", "largest_logprob_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        for dtype in ("float32", "bfloat16"):
            rows.append(compare(case, dtype))
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        table = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
