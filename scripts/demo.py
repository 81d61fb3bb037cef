"""Ask the embedded model and three adapters of it one question, all in one batch. Run by `make demo`.

    python scripts/demo.py "Who wrote Hamlet?"

In a terminal it then answers whatever is typed, until an empty line.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from qwen2_jax import LLM, LoRARequest, SamplingParams

ADAPTERS = Path(__file__).parent.parent / "demo" / "adapters"
NAMES = ("pirate", "json", "one-word")
QUESTION = "What is the capital of France?"
MAX_RANK = 16
MIN_COLUMN = 12


def answer(llm: LLM, question: str) -> dict[str, str]:
    """Return what the base and each adapter answer, from one call that serves them together."""
    adapters = [LoRARequest(name, number, str(ADAPTERS / name)) for number, name in enumerate(NAMES, start=1)]
    chat = [{"role": "user", "content": question}]
    params = SamplingParams(temperature=0, max_tokens=64)
    outputs = llm.chat([chat] * (1 + len(adapters)), params, lora_request=[None, *adapters], use_tqdm=False)
    return dict(zip(("base", *NAMES), (output.outputs[0].text.strip() for output in outputs), strict=True))


def columns(answers: Mapping[str, str], width: int) -> str:
    """Return the answers side by side under their names, in lines of at most `width` characters."""
    gap = " | "
    column = max(MIN_COLUMN, (width - len(gap) * (len(answers) - 1)) // len(answers))
    cells = [[name, "-" * column, *textwrap.wrap(text, column)] for name, text in answers.items()]
    rows = zip_longest(*cells, fillvalue="")
    return "\n".join(gap.join(cell.ljust(column) for cell in row).rstrip() for row in rows)


def next_question() -> str:
    """Return what is typed next; nothing at the end of the input, or where nobody can type."""
    if not sys.stdin.isatty():
        return ""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def main() -> None:
    """Answer the question of the command line, and those that are typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION)
    question = parser.parse_args().question
    # Four short conversations need few programs, so that little is compiled before the answers.
    llm = LLM(
        "smollm2",
        enable_lora=True,
        max_loras=len(NAMES),
        max_lora_rank=MAX_RANK,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        max_model_len=512,
    )
    print(f"> {question}")
    while question:
        print(columns(answer(llm, question), shutil.get_terminal_size().columns), flush=True)
        question = next_question()
    llm.shutdown()


if __name__ == "__main__":
    main()
