"""The options of each command, as tables; a row is an argument of `LLM` or a field of `SamplingParams` by its own name.

Rows carry no defaults: what the user leaves out is left to `LLM`, the model's generation_config.json and
`SamplingParams`, so that a default is written down once. Values are checked there too.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from qwen2_jax.errors import ConfigError, nearest

Options = Mapping[str, Mapping[str, Any]]
"""From an option's name (`max_tokens` is typed `--max-tokens`) to the arguments of argparse's `add_argument`."""


def json_object(text: str) -> dict[str, Any]:
    """Parse an option's value that must be a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object; write it like {{"rope_theta": 1e6}}')
    return value


ENGINE_OPTIONS: Options = {
    "tokenizer": {"help": "folder or hub id of the tokenizer, if it is not the model's own"},
    "revision": {"help": "branch, tag or commit on the hub"},
    "hf_token": {"metavar": "TOKEN", "help": "access token for the hub"},
    "dtype": {"help": "auto, float32, bfloat16 or float16"},
    "load_format": {"help": "auto, safetensors, gguf, orbax or dummy (random weights)"},
    "hf_overrides": {"type": json_object, "metavar": "JSON", "help": "keys of the model's config.json to replace"},
    "generation_config": {"help": "auto, vllm (no defaults from the model), or a folder with generation_config.json"},
    "max_model_len": {"type": int, "metavar": "TOKENS", "help": "longest prompt and output together"},
    "max_num_seqs": {"type": int, "metavar": "N", "help": "most sequences that run at once"},
    "max_num_batched_tokens": {"type": int, "metavar": "TOKENS", "help": "most tokens in one step"},
    "max_num_mixed_tokens": {"type": int, "metavar": "TOKENS", "help": "the same beside what is streamed"},
    "max_lora_rank": {"type": int, "metavar": "N", "help": "highest rank of an adapter, with --lora"},
    "max_vocab_loras": {"type": int, "metavar": "N", "help": "adapters of embeddings and head, with --lora"},
    "max_full_vocab": {"type": int, "metavar": "N", "help": "adapters with whole embeddings or heads, with --lora"},
    "tensor_parallel_size": {"type": int, "metavar": "N", "help": "devices to shard the model over"},
    "gpu_memory_utilization": {"type": float, "metavar": "SHARE", "help": "share of a GPU's memory to use"},
    "kv_cache_memory_bytes": {"type": int, "metavar": "BYTES", "help": "size of the key-value cache on each device"},
    "kv_cache_dtype": {"metavar": "DTYPE", "help": "auto is the model's"},
    "block_size": {"type": int, "metavar": "TOKENS", "help": "tokens in a block of the key-value cache"},
    "enable_chunked_prefill": {
        "action": argparse.BooleanOptionalAction,
        "help": "compute long prompts in several steps",
    },
    "enable_prefix_caching": {
        "action": argparse.BooleanOptionalAction,
        "help": "reuse the cache blocks of equal beginnings",
    },
    "seed": {"type": int, "help": "makes a run reproducible"},
}
"""Arguments of `LLM`; `seed` also seeds each request."""

SAMPLING_OPTIONS: Options = {
    "max_tokens": {"type": int, "metavar": "N", "help": "most tokens to generate"},
    "min_tokens": {"type": int, "metavar": "N", "help": "fewest tokens to generate"},
    "temperature": {"type": float, "metavar": "T", "help": "0 is greedy"},
    "top_p": {"type": float, "metavar": "P", "help": "keep the likeliest tokens with this much probability"},
    "top_k": {"type": int, "metavar": "K", "help": "keep this many likeliest tokens; 0 or -1 keeps all"},
    "min_p": {"type": float, "metavar": "P", "help": "keep tokens with this share of the likeliest one's probability"},
    "presence_penalty": {"type": float, "metavar": "X", "help": "against tokens that the output has, -2 to 2"},
    "frequency_penalty": {"type": float, "metavar": "X", "help": "the same per occurrence, -2 to 2"},
    "repetition_penalty": {"type": float, "metavar": "X", "help": "against tokens seen anywhere; 1 is off"},
    "stop": {"action": "append", "metavar": "TEXT", "help": "end the output at this text; may be repeated"},
    "ignore_eos": {"action": "store_true", "help": "go on after the end-of-sequence token"},
}
"""Fields of `SamplingParams`."""


MERGE_OPTIONS: Options = {
    "method": {"help": "linear, ties, dare_linear, dare_ties or magnitude_prune"},
    "density": {"type": float, "metavar": "SHARE", "help": "share of entries that all methods but linear keep"},
    "majority_sign_method": {"metavar": "HOW", "help": "total or frequency: which sign prevails in ties and dare_ties"},
    "seed": {"type": int, "help": "what dare_linear and dare_ties draw from"},
    "rank": {"type": int, "metavar": "R", "help": "most that a module may have; without it, the sum of the ranks"},
}
"""Fields of `MergeOptions`."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What one command takes."""

    usage: str
    """Its positional arguments, as the usage line shows them."""
    help: str
    """One sentence."""
    own_options: Options
    """The options of this command alone."""
    shared_options: Mapping[str, Options]
    """Groups of options that other commands have too, by title."""


_HELP: Options = {"help": {"action": "help", "help": "show this and end"}}
_MODEL: Options = {"model": {"help": "hub id, folder, .gguf file or smollm2; instead of the first argument"}}
LORA: Options = {
    "lora": {
        "action": "append",
        "metavar": "ADAPTER[:WEIGHT]",
        "help": "folder or hub id of the LoRA adapter to answer with; several are merged, with these weights (1)",
    }
}
_ENGINE = {"adapter": LORA, "engine": ENGINE_OPTIONS}
_SAMPLING = {"sampling": SAMPLING_OPTIONS}

COMMANDS: Mapping[str, Command] = {
    "generate": Command(
        usage="MODEL [PROMPT ...]",
        help="continue prompts: one is streamed, several run as a batch; without any, standard input is the prompt",
        own_options=_MODEL
        | {
            "stream": {"action": argparse.BooleanOptionalAction, "help": "print while generating; on for one prompt"},
            "json": {"action": "store_true", "help": "print one JSON object a prompt"},
        },
        shared_options=_SAMPLING | _ENGINE,
    ),
    "chat": Command(
        usage="MODEL",
        help="talk to a model: /clear forgets the conversation, /exit or Ctrl-D ends it",
        own_options=_MODEL
        | {
            "system": {"metavar": "TEXT", "help": "the system message"},
            "message": {"metavar": "TEXT", "help": "answer this message and end"},
            "interactive": {"action": "store_true", "help": "go on after --message"},
        },
        shared_options=_SAMPLING | _ENGINE,
    ),
    "embed": Command(
        usage="MODEL [TEXT ...]",
        help="print texts' embeddings, a JSON object a line; without any, each line of standard input is a text",
        own_options=_MODEL,
        shared_options=_ENGINE,
    ),
    "classify": Command(
        usage="MODEL --lora ADAPTER [TEXT ...]",
        help="print what an adapter's classification head says of texts, a JSON object a line; "
        "without any, each line of standard input is a text",
        own_options=_MODEL,
        shared_options=_ENGINE,
    ),
    "convert": Command(
        usage="SOURCE DESTINATION",
        help="write a model as an Orbax checkpoint with its config and tokenizer",
        own_options={},
        shared_options={"source": {name: ENGINE_OPTIONS[name] for name in ("revision", "hf_token", "dtype")}},
    ),
    "merge": Command(
        usage="MODEL --adapter PATH[:WEIGHT] ... --out FOLDER",
        help="write LoRA adapters of a model as one adapter, or merged into a checkpoint of it",
        own_options=_MODEL
        | {
            "adapter": {
                "action": "append",
                "metavar": "PATH[:WEIGHT]",
                "help": "folder or hub id, and what multiplies its update (1); may be repeated",
            },
            "out": {"metavar": "FOLDER", "help": "the new folder to write"},
            "checkpoint": {"action": "store_true", "help": "write the whole model with the merge in its weights"},
        },
        shared_options={
            "merging": MERGE_OPTIONS,
            "source": {name: ENGINE_OPTIONS[name] for name in ("revision", "hf_token")},
        },
    ),
}
"""Every command by name."""

_SHORT = {"help": ("-h",), "tensor_parallel_size": ("-tp",)}


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as the package's own error, which the command line prints as one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise ConfigError(message)


def flag(name: str) -> str:
    """Return what is typed for an option: `--max-tokens` for `max_tokens`."""
    return "--" + name.replace("_", "-")


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command's arguments; only the options that were given are attributes, besides the list `inputs`.

    Raises:
        ConfigError: an unknown option (the message names the nearest) or a value of the wrong form.
    """
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"qwen2-jax {name}",
        usage=f"%(prog)s {command.usage} [options]",
        description=command.help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("inputs", nargs="*", default=[], help=argparse.SUPPRESS)
    known = []
    for title, options in {"options": {**_HELP, **command.own_options}, **command.shared_options}.items():
        group = parser.add_argument_group(title)
        for option, arguments in options.items():
            group.add_argument(*_SHORT.get(option, ()), flag(option), dest=option, **arguments)
            known.append(flag(option))
    args, unknown = parser.parse_known_intermixed_args(argv)
    for argument in unknown:
        given = argument.split("=")[0]
        raise ConfigError(f"unknown option {given!r}{nearest(given, known)} (qwen2-jax {name} --help lists them)")
    return args
