"""Ask the embedded model one question, then talk to it if there is a terminal. Run by `make demo`."""

import sys

from qwen2_jax.cli import main

QUESTION = "What is the capital of France?"

if __name__ == "__main__":
    arguments = ["chat", "smollm2", "--message", QUESTION, "--temperature", "0"]
    # One conversation of moderate length needs few programs, so that little is compiled before the answer.
    arguments += ["--max-num-seqs", "1", "--max-num-batched-tokens", "128", "--max-model-len", "2048"]
    sys.exit(main([*arguments, "--interactive"] if sys.stdin.isatty() else arguments))
