"""The command line: `qwen2-jax generate | chat | embed | classify | convert | merge`; imports come late.

Answers go to standard output; progress, speed and errors to standard error, where a mistake is one line (exit code 2).
"""

import asyncio
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qwen2_jax
from qwen2_jax.cli_options import COMMANDS, ENGINE_OPTIONS, MERGE_OPTIONS, SAMPLING_OPTIONS, parse
from qwen2_jax.errors import ConfigError, Qwen2JaxError, RequestError, nearest
from qwen2_jax.types import AdapterRequest, LoRARequest, MergedLoRARequest, MergeOptions, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from qwen2_jax.llm import LLM

DEFAULT_MAX_TOKENS = 256
"""What `generate` stops at where neither the command line nor the model says; a chat answer may fill the context."""

Messages = list[dict[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake in what was asked, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _dispatch(argv)
    except (Qwen2JaxError, OSError, UnicodeDecodeError) as error:
        print(f"qwen2-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _dispatch(argv: list[str]) -> int:
    if argv in ([], ["-h"], ["--help"]):
        print("usage: qwen2-jax COMMAND ... (qwen2-jax COMMAND --help lists its options)\n")
        print("\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items()))
        return 0 if argv else 2
    if argv == ["--version"]:
        print(qwen2_jax.__version__)
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{nearest(name, COMMANDS)}; use {', '.join(COMMANDS)}")
    _RUN[name](parse(name, rest))
    return 0


def _given(args: Namespace, names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in names}


def _split_model(args: Namespace) -> tuple[str, list[str]]:
    if "model" in args:
        return args.model, args.inputs
    if not args.inputs:
        raise ConfigError("no model was named; give a hub id, a folder, a .gguf file or smollm2 as the first argument")
    return args.inputs[0], args.inputs[1:]


def _read_stdin(what: str) -> str:
    if sys.stdin.isatty():
        raise ConfigError(f"no {what} was given; write it after the model, or pipe it into standard input")
    return sys.stdin.read()


def _read_lines(what: str) -> list[str]:
    """Return the lines of standard input, which a line feed ends, or a carriage return and one, and nothing else."""
    lines = _read_stdin(what).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


@contextmanager
def _engine(model: str, args: Namespace, **options: Any) -> Iterator["LLM"]:
    from qwen2_jax.llm import LLM

    # A wrong value shows before the model is loaded.
    SamplingParams(**{"max_tokens": None, **_given(args, SAMPLING_OPTIONS)})
    options |= {} if _lora(args) is None else {"enable_lora": True}
    llm = LLM(model, **_given(args, ENGINE_OPTIONS), **options)
    try:
        yield llm
    finally:
        llm.shutdown()


def _sampling_params(llm: "LLM", args: Namespace, max_tokens: int | None) -> SamplingParams:
    """Return what is asked for; `max_tokens` stands in where neither the command line nor the model has a number."""
    given = _given(args, (*SAMPLING_OPTIONS, "seed"))
    return llm.get_default_sampling_params(max_tokens=max_tokens).replace(**given)


def _lora(args: Namespace) -> AdapterRequest | None:
    """Return the adapter that is asked for; several, or one with a weight, are a merge."""
    if "lora" not in args:
        return None
    paths, weights = zip(*(_split_weight("lora", text) for text in args.lora), strict=True)
    names = [Path(path).name or Path(path).resolve().name for path in paths]
    adapters = [
        LoRARequest(name, number, path) for number, (name, path) in enumerate(zip(names, paths, strict=True), 1)
    ]
    if weights == (1.0,):
        return adapters[0]
    return MergedLoRARequest("+".join(adapter.lora_name for adapter in adapters), 1, adapters, weights)


async def _stream(llm: "LLM", prompt: str | Messages, params: SamplingParams, lora: AdapterRequest | None) -> str:
    """Print an answer as it grows, then its speed, and return it."""
    started = time.perf_counter()
    first: tuple[float, int] | None = None
    text, count, now = "", 0, started
    async for output in llm.stream(prompt, params, lora_request=lora):
        answer = output.outputs[0]
        print(answer.text[len(text) :], end="", flush=True)
        text, count, now = answer.text, len(answer.token_ids), time.perf_counter()
        if first is None and count:
            first = now, count
    print(flush=True)
    since, before = first if first is not None and count > first[1] else (started, 0)
    rate = (count - before) / max(now - since, 1e-9)
    print(f"[{count} tokens, {rate:.1f} tokens/s]", file=sys.stderr)
    return text


def _as_json(output: RequestOutput) -> str:
    answer = output.outputs[0]
    return json.dumps(
        {
            "prompt": output.prompt,
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        },
        ensure_ascii=False,
    )


def _generate(args: Namespace) -> None:
    model, prompts = _split_model(args)
    prompts = prompts or [_read_stdin("prompt").removesuffix("\n")]
    options = vars(args)
    if options.get("stream") and ("json" in args or len(prompts) > 1):
        raise ConfigError("--stream prints the text of one prompt as it grows; leave it out for --json or more prompts")
    with _engine(model, args) as llm:
        params = _sampling_params(llm, args, DEFAULT_MAX_TOKENS)
        if options.get("stream", "json" not in args and len(prompts) == 1):
            asyncio.run(_stream(llm, prompts[0], params, _lora(args)))
            return
        for output in llm.generate(prompts, params, lora_request=_lora(args)):
            print(_as_json(output) if "json" in args else output.outputs[0].text)


def _embed(args: Namespace) -> None:
    model, texts = _split_model(args)
    texts = texts or _read_lines("text")
    with _engine(model, args, runner="pooling") as llm:
        for text, output in zip(texts, llm.embed(texts, lora_request=_lora(args)), strict=True):
            print(json.dumps({"text": text, "embedding": output.outputs.embedding}, ensure_ascii=False))


def _classify(args: Namespace) -> None:
    model, texts = _split_model(args)
    texts = texts or _read_lines("text")
    with _engine(model, args) as llm:
        for text, output in zip(texts, llm.classify(texts, lora_request=_lora(args)), strict=True):
            found = {"text": text, "logits": output.outputs.logits, "probs": output.outputs.probs}
            print(json.dumps(found, ensure_ascii=False))


def _convert(args: Namespace) -> None:
    if len(args.inputs) != 2:
        raise ConfigError(f"convert takes SOURCE and DESTINATION, not {len(args.inputs)} arguments")
    from qwen2_jax.models.convert import convert

    source, destination = args.inputs
    convert(source, destination, **_given(args, ENGINE_OPTIONS))


def _merge(args: Namespace) -> None:
    model, rest = _split_model(args)
    if rest:
        raise ConfigError(f"merge takes a model and nothing after it, not {rest[0]!r}; --adapter names an adapter")
    for name, advice in (("adapter", "PATH or PATH:WEIGHT, once for each adapter"), ("out", "a new folder")):
        if name not in args:
            raise ConfigError(f"merge needs --{name}: {advice}")
    adapters = [_split_weight("adapter", text) for text in args.adapter]
    from qwen2_jax.lora.merge_folders import merge_folders

    options = MergeOptions(**_given(args, MERGE_OPTIONS))
    given = _given(args, ("checkpoint", "revision", "hf_token"))
    merged = merge_folders(model, adapters, args.out, options, use_tqdm=True, **given)
    size = f"{merged.adapter.num_modules} modules of rank {merged.adapter.max_rank} or less"
    print(f"[{size}, largest relative error {merged.largest_error:.2g}]", file=sys.stderr)
    print(args.out)


def _split_weight(option: str, text: str) -> tuple[str, float]:
    """Split an option's `PATH:WEIGHT`; a path that exists is one as a whole."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise ConfigError(f"--{option} {text!r}: {weight!r} is not a number; write PATH or PATH:WEIGHT") from None


def _chat(args: Namespace) -> None:
    model, rest = _split_model(args)
    if rest:
        raise ConfigError(f"chat takes a model and nothing after it, not {rest[0]!r}; --message says something")
    system: Messages = [{"role": "system", "content": args.system}] if "system" in args else []
    with _engine(model, args) as llm, asyncio.Runner() as runner:
        params = _sampling_params(llm, args, None)

        def take_turn(messages: Messages, text: str) -> Messages:
            turn = [*messages, {"role": "user", "content": text}]
            return [*turn, {"role": "assistant", "content": runner.run(_stream(llm, turn, params, _lora(args)))}]

        messages = system
        if "message" in args:
            print(f"> {args.message}", file=sys.stderr)
            messages = take_turn(messages, args.message)
        if "message" not in args or "interactive" in args:
            _converse(messages, system, take_turn)


def _converse(messages: Messages, system: Messages, take_turn: Callable[[Messages, str], Messages]) -> None:
    """Answer what is typed until it ends; Ctrl-C ends an answer, and a turn that fails is forgotten."""
    import readline  # noqa: F401  gives `input` line editing and a history

    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/clear":
            messages = system
        elif text:
            try:
                messages = take_turn(messages, text)
            except KeyboardInterrupt:
                print()
            except RequestError as error:
                print(f"{error} (/clear forgets the conversation)", file=sys.stderr)


_RUN: Mapping[str, Callable[[Namespace], None]] = {
    "generate": _generate,
    "chat": _chat,
    "embed": _embed,
    "classify": _classify,
    "convert": _convert,
    "merge": _merge,
}
