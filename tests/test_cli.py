"""The command line, against an `LLM` that answers from a list."""

import io
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from qwen2_jax.cli import DEFAULT_MAX_TOKENS, main
from qwen2_jax.cli_options import COMMANDS, MERGE_OPTIONS, SAMPLING_OPTIONS, parse
from qwen2_jax.errors import CheckpointError, RequestError
from qwen2_jax.types import (
    AdapterRequest,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    LoRARequest,
    MergedLoRARequest,
    MergeOptions,
    RequestOutput,
    SamplingParams,
)

UNTIED = str(Path(__file__).parent / "golden" / "untied")


class FakeLLM:
    """Answers with the prompt's last words in capitals, two characters a token, and records what it was asked."""

    made: ClassVar[list["FakeLLM"]] = []

    def __init__(self, model: str, **options: Any) -> None:
        if model == "missing":
            raise CheckpointError("missing is neither a folder nor a model on the hub")
        self.model, self.options, self.closed = model, options, False
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.loras: list[AdapterRequest | None] = []
        FakeLLM.made.append(self)

    def get_default_sampling_params(self, **defaults: Any) -> SamplingParams:
        return SamplingParams(**{"top_k": 20, **defaults})

    def _output(self, prompt: Any, length: int | None = None) -> RequestOutput:
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text = question.upper()[:length]
        answer = CompletionOutput(
            index=0, text=text, token_ids=range(-(-len(text) // 2)), finish_reason=None if length else "stop"
        )
        return RequestOutput(request_id="0", prompt=question, prompt_token_ids=[1], outputs=[answer], finished=True)

    def generate(
        self, prompts: Sequence[str], params: SamplingParams, lora_request: AdapterRequest | None = None
    ) -> list[RequestOutput]:
        self.loras.append(lora_request)
        self.asked += [(prompt, params) for prompt in prompts]
        return [self._output(prompt) for prompt in prompts]

    async def stream(
        self, prompt: Any, params: SamplingParams, lora_request: AdapterRequest | None = None
    ) -> AsyncIterator[RequestOutput]:
        self.loras.append(lora_request)
        self.asked.append((prompt, params))
        if "too long" in str(prompt):
            raise RequestError("the prompt has 9 tokens, the context 8")
        if "interrupt" in str(prompt):
            raise KeyboardInterrupt
        for length in (1, 4, None):
            yield self._output(prompt, length)

    def embed(self, texts: Sequence[str], lora_request: AdapterRequest | None = None) -> list[EmbeddingRequestOutput]:
        self.loras.append(lora_request)
        return [
            EmbeddingRequestOutput(
                request_id=str(i),
                outputs=EmbeddingOutput(embedding=[float(len(text)), 0.5]),
                prompt_token_ids=[1],
                finished=True,
            )
            for i, text in enumerate(texts)
        ]

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def llm(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """Put the fake in the place of `qwen2_jax.llm.LLM`; return the list of those that a command makes."""
    module = ModuleType("qwen2_jax.llm")
    module.LLM = FakeLLM  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "qwen2_jax.llm", module)
    monkeypatch.setattr(FakeLLM, "made", [])
    return FakeLLM.made


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_generate_streams_one_prompt(llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "model", "--max-tokens", "7", "hello", "--temperature", "0", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == "HELLO\n"
    assert err.startswith("[3 tokens, ")
    [(prompt, params)] = llm[0].asked
    assert (llm[0].model, llm[0].options, prompt) == ("model", {"seed": 3}, "hello")
    assert (params.max_tokens, params.temperature, params.seed) == (7, 0.0, 3)
    assert llm[0].closed


def test_defaults_are_the_models(llm: list[FakeLLM]) -> None:
    main(["generate", "model", "hello"])
    main(["chat", "model", "--message", "hello"])
    assert llm[0].asked[0][1] == SamplingParams(top_k=20, max_tokens=DEFAULT_MAX_TOKENS)
    assert llm[1].asked[0][1] == SamplingParams(top_k=20, max_tokens=None)


def test_prompt_from_standard_input(llm: list[FakeLLM], type_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("two\nlines\n")
    assert main(["generate", "--model", "model"]) == 0
    assert llm[0].asked[0][0] == "two\nlines"
    assert capsys.readouterr().out == "TWO\nLINES\n"


def test_several_prompts_are_a_batch(llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "model", "a", "b"]) == 0
    assert capsys.readouterr().out == "A\nB\n"
    assert [prompt for prompt, _ in llm[0].asked] == ["a", "b"]


def test_generate_without_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "model", "a", "--no-stream"]) == 0
    assert capsys.readouterr() == ("A\n", "")


def test_generate_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "model", "grüße", "--json"]) == 0
    expected = {"prompt": "grüße", "text": "GRÜSSE", "token_ids": [0, 1, 2], "finish_reason": "stop"}
    assert json.loads(capsys.readouterr().out) == {**expected, "stop_reason": None}


def test_chat_answers_one_message(llm: list[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "model", "--system", "be brief", "--message", "hi"]) == 0
    assert capsys.readouterr().out == "HI\n"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert llm[0].asked[0][0] == messages


def test_chat_remembers_until_cleared(llm: list[FakeLLM], type_in: Any) -> None:
    type_in("one\n\ntwo\n/clear\nthree\n/exit\nfour\n")
    assert main(["chat", "model", "--system", "be brief"]) == 0
    told = [[message["content"] for message in messages] for messages, _ in llm[0].asked]
    assert told == [["be brief", "one"], ["be brief", "one", "ONE", "two"], ["be brief", "three"]]


def test_chat_goes_on_after_its_first_message(llm: list[FakeLLM], type_in: Any) -> None:
    type_in("two\n")
    assert main(["chat", "model", "--message", "one", "--interactive"]) == 0
    assert [message["content"] for message in llm[0].asked[1][0]] == ["one", "ONE", "two"]


@pytest.mark.parametrize("bad", ["too long", "interrupt"])
def test_chat_forgets_a_turn_that_fails(llm: list[FakeLLM], type_in: Any, bad: str) -> None:
    type_in(f"one\n{bad}\ntwo\n")
    assert main(["chat", "model"]) == 0
    assert [message["content"] for message in llm[0].asked[2][0]] == ["one", "ONE", "two"]


def test_embed_prints_a_json_line_a_text(llm: list[FakeLLM], type_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    type_in("ab\nabc\n")
    assert main(["embed", "model"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"text": "ab", "embedding": [2.0, 0.5]}, {"text": "abc", "embedding": [3.0, 0.5]}]
    assert llm[0].options == {"runner": "pooling"}


def test_engine_options_reach_the_engine(llm: list[FakeLLM]) -> None:
    options = ["-tp", "2", "--no-enable-prefix-caching", "--hf-overrides", '{"rope_theta": 1e6}', "--block-size=32"]
    main(["generate", "model", "a", *options])
    expected = {"tensor_parallel_size": 2, "enable_prefix_caching": False, "hf_overrides": {"rope_theta": 1e6}}
    assert llm[0].options == {**expected, "block_size": 32}


@pytest.mark.parametrize(
    "argv", [["generate", "m", "a"], ["generate", "m", "a", "b"], ["chat", "m", "--message", "a"], ["embed", "m", "a"]]
)
def test_an_adapter_is_served_with_room_for_it(argv: list[str], llm: list[FakeLLM]) -> None:
    assert main([*argv, "--lora", "adapters/pirate", "--max-lora-rank", "8"]) == 0
    assert llm[0].options == {"enable_lora": True, "max_lora_rank": 8} | (
        {"runner": "pooling"} if "embed" in argv else {}
    )
    assert llm[0].loras == [LoRARequest("pirate", 1, "adapters/pirate")]
    assert main(argv) == 0
    assert llm[1].loras == [None] and "enable_lora" not in llm[1].options


def test_several_adapters_are_served_as_their_merge(llm: list[FakeLLM]) -> None:
    a, b = LoRARequest("a", 1, "adapters/a"), LoRARequest("b", 2, "adapters/b")
    main(["generate", "m", "a", "--lora", "adapters/a:-0.7", "--lora", "adapters/b"])
    main(["generate", "m", "a", "--lora", "adapters/a:0.5"])
    assert llm[0].loras == [MergedLoRARequest("a+b", 1, [a, b], [-0.7, 1.0])]
    assert llm[1].loras == [MergedLoRARequest("a", 1, [a], [0.5])]


def test_stop_may_be_repeated(llm: list[FakeLLM]) -> None:
    main(["generate", "model", "a", "--stop", "x", "--stop", "y", "--top-k", "-1"])
    params = llm[0].asked[0][1]
    assert (list(params.stop), params.top_k) == (["x", "y"], -1)


def test_convert_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    module = ModuleType("qwen2_jax.models.convert")
    module.convert = lambda *args, **options: calls.append((args, options))  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "qwen2_jax.models.convert", module)
    assert main(["convert", "model", str(tmp_path), "--dtype", "bfloat16"]) == 0
    assert calls == [(("model", str(tmp_path)), {"dtype": "bfloat16"})]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generat", "model"], "unknown command 'generat'; did you mean 'generate'?"),
        (
            ["generate", "model", "a", "--temprature", "0"],
            "unknown option '--temprature'; did you mean '--temperature'?",
        ),
        (["generate", "model", "a", "--max_tokens=1"], "unknown option '--max_tokens'; did you mean '--max-tokens'?"),
        (["generate", "model", "a", "--max", "1"], "unknown option '--max'"),
        (["generate", "model", "a", "--top-k", "many"], "--top-k: invalid int value: 'many'"),
        (["generate", "model", "a", "--top-p", "7"], "top_p=7.0 is out of range"),
        (["generate", "model", "a", "--hf-overrides", "[1]"], "'[1]' is not a JSON object"),
        (["generate", "model", "a", "--hf-overrides", "{"], "'{' is not JSON"),
        (["generate", "model", "a", "b", "--stream"], "--stream prints the text of one prompt"),
        (["generate", "model", "a", "--lora", "a:half"], "--lora 'a:half': 'half' is not a number"),
        (["generate"], "no model was named"),
        (["generate", "missing", "a"], "missing is neither a folder nor a model on the hub"),
        (["chat", "model", "hello"], "chat takes a model and nothing after it, not 'hello'"),
        (["convert", "model"], "convert takes SOURCE and DESTINATION, not 1 arguments"),
        (["merge", "model", "adapter"], "merge takes a model and nothing after it, not 'adapter'; --adapter names"),
        (["merge", "model", "--out", "new"], "merge needs --adapter: PATH or PATH:WEIGHT"),
        (["merge", "model", "--adapter", "a"], "merge needs --out: a new folder"),
        (["merge", "model", "--adapter", "a:half", "--out", "new"], "--adapter 'a:half': 'half' is not a number"),
        (["merge", "model", "--adapter", "a", "--out", "new", "--method", "tie"], "method='tie' is unknown"),
        (["merge", "model", "--adapter", "a", "--out", "new", "--method", "ties"], "method='ties' needs density"),
        (["merge", UNTIED, "--adapter", "./a:0.5", "--out", "new"], "there is no adapter './a'"),
    ],
)
def test_mistake_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("qwen2-jax: error: ") and message in err and err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("option", ["--max-tokens=0", "--lora=a:inf"])
def test_wrong_value_shows_before_the_model_is_loaded(llm: list[FakeLLM], option: str) -> None:
    assert main(["generate", "model", "a", option]) == 2
    assert llm == []


def test_no_prompt_at_a_terminal_is_a_mistake(monkeypatch: pytest.MonkeyPatch, type_in: Any) -> None:
    type_in("")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["generate", "model"]) == 2


def test_interrupt_ends_with_its_exit_code(llm: list[FakeLLM]) -> None:
    assert main(["generate", "model", "interrupt"]) == 130
    assert llm[0].closed


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(name, ["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for options in (COMMANDS[name].own_options, *COMMANDS[name].shared_options.values()):
        for option in options:
            assert f"--{option.replace('_', '-')}" in text


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(out.count(f"  {name} ") == 2 for name in COMMANDS)


def test_options_are_fields_of_what_they_are_for() -> None:
    assert SAMPLING_OPTIONS.keys() <= {field.name for field in fields(SamplingParams)}
    assert MERGE_OPTIONS.keys() == {field.name for field in fields(MergeOptions)}
