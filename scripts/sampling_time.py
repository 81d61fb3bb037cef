"""Measure what a decode step takes by what its rows ask of sampling: greedy, random, cut, with log-probabilities.

    python scripts/sampling_time.py --geometry 0.5b --batches 1,32,256 --out sampling.json

A step's time is the difference of a long and a short run of the same rows, each the faster of two, as in `workload.py`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking.record import write_record

from qwen2_jax import LLM, SamplingParams
from scripts.workload import GEOMETRIES, write_model

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-k and top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "greedy, 5 log-probabilities": {"temperature": 0.0, "logprobs": 5},
    "all, with penalties": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "logprobs": 5,
        "seed": 3,
    },
}
PROMPT, SHORT, LONG = 512, 8, 200
"""Tokens: of each prompt, and to generate in the two runs. With fewer, what the host takes now and then hides a step's
time."""


def seconds(llm: LLM, rng: np.random.Generator, rows: int, new_tokens: int, kind: str) -> float:
    """Return the seconds of one run."""
    prompts = [{"prompt_token_ids": rng.integers(1000, 90000, PROMPT).tolist()} for _ in range(rows)]
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False, **KINDS[kind])
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def measure(llm: LLM, rng: np.random.Generator, rows: int, kind: str) -> dict[str, Any]:
    """Return a row of the record."""
    seconds(llm, rng, rows, SHORT, kind)
    short, long = (min(seconds(llm, rng, rows, count, kind) for _ in range(2)) for count in (SHORT, LONG))
    return {"decode_batch": rows, "sampling": kind, "step_ms": round((long - short) / (LONG - SHORT) * 1e3, 3)}


def main() -> None:
    """Measure each number of rows and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="0.5b")
    parser.add_argument("--batches", default="1,32,256", help="rows, separated by commas")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    batches = [int(rows) for rows in arguments.batches.split(",")]
    rng, measured = np.random.default_rng(0), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), arguments.geometry)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=8192,
            max_num_seqs=max(batches),
            enable_prefix_caching=False,
            use_tqdm_on_load=False,
        )
    for rows in batches:
        for kind in KINDS:
            measured.append(measure(llm, rng, rows, kind))
            print(json.dumps(measured[-1]), flush=True)
            if arguments.out is not None:
                write_record(arguments.out, measured, geometry=arguments.geometry)
    llm.shutdown()


if __name__ == "__main__":
    main()
