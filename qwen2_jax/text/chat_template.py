"""Renders a conversation with a model's chat template: sandboxed jinja with the extras that Hugging Face gives it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen2_jax.errors import CheckpointError, RequestError, nearest

ChatTemplate = str | Mapping[str, str]
"""A template's source, or the sources of several by name."""

# Private-use characters, which no prompt has. The space shows whether the template trims its messages.
_CONTINUE_HERE = "\ue0c0\ue0c1\ue0c0 "
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


def load_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """Return a checkpoint's chat template, or None if it has none.

    `chat_template.jinja` comes first, with named ones in `additional_chat_templates/`, then tokenizer_config.json's.

    Raises:
        CheckpointError: the entry of tokenizer_config.json is neither a string nor a list of names and templates.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        named = {path.stem: path.read_text("utf-8") for path in (folder / "additional_chat_templates").glob("*.jinja")}
        default = file.read_text("utf-8")
        return {"default": default, **named} if named else default
    given = tokenizer_config.get("chat_template")
    if given is None or isinstance(given, str):
        return given
    try:
        return {entry["name"]: entry["template"] for entry in given}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            "chat_template in tokenizer_config.json must be a string or a list of {name, template} objects"
        ) from error


def select_chat_template(templates: ChatTemplate | None, requested: str | None, *, has_tools: bool) -> str:
    """Return the template's source for one request, by Hugging Face's rules.

    Args:
        templates: what the model has.
        requested: the name of one of several templates, the source of another template, or None for the model's own.
        has_tools: whether the request brings tools; `tool_use` then comes before `default`.

    Raises:
        RequestError: the model has no template, or several and none of them is a default.
    """
    named = templates if isinstance(templates, Mapping) else {}
    if requested is not None:
        if requested not in named and "{" not in requested:
            known = f"one of {sorted(named)}, or " if named else ""
            raise RequestError(
                f"unknown chat template {requested!r}{nearest(requested, named)}; use {known}a template's own text"
            )
        return named.get(requested, requested)
    if isinstance(templates, str):
        return templates
    for name in ("tool_use", "default") if has_tools else ("default",):
        if name in named:
            return named[name]
    if named:
        raise RequestError(f"the model has no default chat template; use chat_template= with one of {sorted(named)}")
    raise RequestError("the model has no chat template; pass chat_template=, or a plain prompt instead of messages")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt for a conversation.

    Args:
        template: jinja source.
        messages: dicts with `role`, and `content` as a string or a list of `{"type": "text", "text": ...}` parts.
        tools: the JSON schemas of the functions that the model may call.
        add_generation_prompt: whether to end with the head of the assistant's answer.
        continue_final_message: whether to end inside the last message, so that the model goes on with it.
        variables: whatever else the template reads.

    Raises:
        RequestError: the messages are malformed, the template fails or refuses them, or the two flags contradict.
    """
    if add_generation_prompt and continue_final_message:
        raise RequestError("add_generation_prompt and continue_final_message exclude each other; use one of them")
    chat = [_plain_message(message) for message in _plain("messages", messages)]
    if not chat:
        raise RequestError("messages is empty; pass at least one message")
    if continue_final_message:
        if not isinstance(chat[-1].get("content"), str):
            raise RequestError("continue_final_message needs a last message with content")
        chat[-1]["content"] += _CONTINUE_HERE
    values = {**_plain("chat template variables", variables or {}), "messages": chat, "tools": _plain("tools", tools)}
    try:
        text = _compile(template).render(**values, add_generation_prompt=add_generation_prompt)
    except RecursionError as error:
        raise RequestError("the chat template nests too deeply for these messages") from error
    except _RENDER_ERRORS as error:
        raise RequestError(f"the chat template does not accept these messages: {error}") from error
    return _cut_at_marker(text) if continue_final_message else text


def _cut_at_marker(text: str) -> str:
    before, marker, after = text.rpartition(_CONTINUE_HERE.strip())
    if not marker:
        raise RequestError("continue_final_message: the chat template drops the last message's content")
    return before if after.startswith(" ") else before.rstrip()


def _plain(name: str, value: Any) -> Any:
    # A template is a program from a checkpoint: it sees copies made of JSON types only, never a caller's objects.
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} must consist of JSON types: {error}") from error


def _plain_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"message {message!r} is not a dict with a role; use {{'role': ..., 'content': ...}}")
    # OpenAI's clients send `content: null` beside tool calls; templates are written for an absent key.
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = "\n".join(_text_part(part) for part in message["content"])
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise RequestError(f"tool_calls={calls!r} is not a list; use a list of calls, each a dict with a function")
    for call in calls:
        _parse_arguments(call)
    return message


def _text_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RequestError(f"content part {part!r} is not text; use {{'type': 'text', 'text': ...}}")


def _parse_arguments(call: Any) -> None:
    # OpenAI's protocol has the arguments as a JSON string, templates write them with `tojson`.
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(f"tool call {call!r} is not a dict with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError as error:
            raise RequestError(f"the arguments of tool call {function.get('name')!r} are not JSON: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's words for training; here it renders what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format_: str) -> str:
    return datetime.now().strftime(format_)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)
