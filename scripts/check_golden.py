"""Compare this machine's devices with Hugging Face's golden data: greedy tokens and log-probabilities.

    python scripts/check_golden.py --out golden.json

It loads golden checkpoints, and the adapters of PEFT that belong to two of them, each adapter a row of one batch. It
compares, for each checkpoint, the prompts whose greedy tokens are all equal, and the largest error of a
log-probability, of prompts and answers, against Hugging Face in float32. In float32 all must be equal and the error
small, or it exits with 1; bfloat16 takes other turns among a tiny random model's close tokens and is only shown. On a
CPU the tests do the same and more; this is for a GPU.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking.record import write_record

from qwen2_jax import LLM, LoRARequest, SamplingParams

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
ADAPTERS = "adapters"
CASES = (
    "untied",
    "heads_14_2",
    "window_partial",
    "window_all",
    "yarn_rope_scaling",
    "adapters/untied",
    "adapters/tied",
)
TOLERANCE = 1e-4
"""Of a log-probability in float32."""
ROOM = {"enable_lora": True, "max_loras": 8, "max_lora_rank": 64, "max_vocab_loras": 2, "max_full_vocab": 1}
Golden = dict[str, np.ndarray]
Prompt = tuple[LoRARequest | None, Golden]


def read_prompts(folder: Path, adapter: LoRARequest | None = None) -> list[Prompt]:
    """Return the prompts of a folder's golden data, each with what came of it."""
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    count = sum(name.startswith("prompt_token_ids_") for name in golden)
    names = ("prompt_token_ids", "prompt_logprobs", "output_token_ids", "output_logprobs")
    return [(adapter, {name: golden[f"{name}_{index}"] for name in names}) for index in range(count)]


def read_case(case: str) -> tuple[Path, list[Prompt]]:
    """Return a case's checkpoint and prompts; `adapters/NAME` are those of the checkpoint NAME with its adapters."""
    parent, _, base = case.rpartition("/")
    if parent != ADAPTERS:
        return GOLDEN / case, read_prompts(GOLDEN / case)
    known = json.loads((GOLDEN / ADAPTERS / "manifest.json").read_text())["cases"]
    # Without a gap between tokens it is a classifier, which has no text.
    names = [name for name, facts in known.items() if name.startswith(f"{base}/") and "smallest_gap" in facts]
    prompts = []
    for index, name in enumerate(names):
        folder = GOLDEN / ADAPTERS / name
        prompts += read_prompts(folder, LoRARequest(folder.name, index + 1, str(folder)))
    return GOLDEN / base, prompts


def compare(case: str, dtype: str) -> dict[str, Any]:
    """Return one row of the table."""
    checkpoint, work = read_case(case)
    options: dict[str, Any] = ROOM if any(adapter for adapter, _ in work) else {}
    llm = LLM(
        checkpoint,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_decode_steps=4,
        kv_cache_memory_bytes=64 * 2**20,
        use_tqdm_on_load=False,
        lowering_workers=0,  # engines beside one another, with few layers
        **options,
    )
    lengths = [len(golden["output_token_ids"]) for _, golden in work]
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False)
        for n in lengths
    ]
    prompts = [golden["prompt_token_ids"].tolist() for _, golden in work]
    adapters = [adapter for adapter, _ in work] if options else None
    same, error, differ = 0, 0.0, []
    outputs = llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    for output, (adapter, golden) in zip(outputs, work, strict=True):
        completion = output.outputs[0]
        is_same = list(completion.token_ids) == golden["output_token_ids"].tolist()
        found = chosen(output.prompt_token_ids, output.prompt_logprobs or ())
        errors = np.abs(np.array(found) - golden["prompt_logprobs"])
        if is_same:  # after another token, other probabilities are right
            answered = chosen(completion.token_ids, completion.logprobs or ())
            errors = np.append(errors, np.abs(np.array(answered) - golden["output_logprobs"]))
        same, error = same + is_same, max(error, float(errors.max()))
        if adapter is not None and not (is_same and errors.max() <= TOLERANCE):
            differ.append(adapter.lora_name)
    llm.shutdown()
    row = {"case": case, "dtype": dtype, "greedy_equal": same, "prompts": len(work), "largest_error": error}
    return row | ({"adapters_that_differ": sorted(set(differ))} if differ else {})


def chosen(token_ids: Sequence[int], positions: Any) -> list[float]:
    """Return the log-probability of each token that has one."""
    pairs = zip(token_ids, positions, strict=True)
    return [position[token].logprob for token, position in pairs if position is not None]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Return what differs in float32 that must not."""
    return [
        f"{row['case']} in float32: {row['greedy_equal']}/{row['prompts']} prompts equal, error "
        f"{row['largest_error']:.2g} (at most {TOLERANCE})"
        + (f"; adapters {', '.join(row['adapters_that_differ'])}" if "adapters_that_differ" in row else "")
        for row in rows
        if row["dtype"] == "float32"
        and not (row["greedy_equal"] == row["prompts"] and row["largest_error"] <= TOLERANCE)
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
            equal = f"{row['greedy_equal']}/{row['prompts']} equal"
            print(f"{case:20} {dtype:9} {equal}, largest error {row['largest_error']:.2g}", flush=True)
    failed = failures(rows)
    if arguments.out:
        write_record(arguments.out, rows, failures=failed)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
