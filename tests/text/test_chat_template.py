"""Chat templates; the expected prompts are what transformers' `apply_chat_template` renders."""

from pathlib import Path
from typing import Any

import pytest

from qwen2_jax.errors import RequestError
from qwen2_jax.text import Tokenizer
from qwen2_jax.text.chat_template import load_chat_template, render_chat, select_chat_template

# The shape of Qwen2.5's template: a default system prompt, tool schemas, tool calls, grouped tool responses.
QWEN_LIKE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You answer briefly.' }}
    {%- endif %}
    {{- "\\n\\n## Functions\\n<functions>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</functions>\\nCall {\\"name\\": ...}<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<call>{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<response>' + message.content + '</response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TOOL = {"type": "function", "function": {"name": "weather", "description": "für <Ort> & Tag", "parameters": {}}}
QUESTION = {"role": "user", "content": "Köln?"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
        {"type": "function", "id": "2", "function": {"name": "weather", "arguments": {"city": "Bonn"}}},
    ],
}
RESULTS = [{"role": "tool", "content": "12 C"}, {"role": "tool", "content": "13 C"}]


def render(template: str, *messages: dict[str, Any], **options: Any) -> str:
    """Render messages given one by one."""
    return render_chat(template, messages, **options)


def test_a_question() -> None:
    expected = "<|im_start|>system\nYou answer briefly.<|im_end|>\n<|im_start|>user\nKöln?<|im_end|>\n"
    assert render(QWEN_LIKE, QUESTION) == expected + "<|im_start|>assistant\n"
    assert render(QWEN_LIKE, QUESTION, add_generation_prompt=False) == expected
    system = {"role": "system", "content": "Rhyme."}
    assert render(QWEN_LIKE, system, QUESTION).startswith("<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user")


def test_tools_calls_and_responses() -> None:
    assert render(QWEN_LIKE, QUESTION, CALLS, *RESULTS, tools=[TOOL]) == (
        "<|im_start|>system\nYou answer briefly.\n\n## Functions\n<functions>\n"
        '{"type": "function", "function": {"name": "weather", "description": "für <Ort> & Tag", "parameters": {}}}\n'
        '</functions>\nCall {"name": ...}<|im_end|>\n'
        "<|im_start|>user\nKöln?<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<call>{"name": "weather", "arguments": {"city": "Köln"}}</call>\n'
        '<call>{"name": "weather", "arguments": {"city": "Bonn"}}</call><|im_end|>\n'
        "<|im_start|>user\n<response>12 C</response>\n<response>13 C</response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_rendering_leaves_the_callers_messages_alone() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    render(QWEN_LIKE, QUESTION, message)
    assert message["content"] is None
    assert message["tool_calls"] == [{"function": {"name": "f", "arguments": "{}"}}]


def test_the_last_message_can_be_continued() -> None:
    prefix = {"role": "assistant", "content": "It is "}
    text = render(QWEN_LIKE, QUESTION, prefix, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nIt is ")
    trimming = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    text = render(trimming, QUESTION, prefix, add_generation_prompt=False, continue_final_message=True)
    assert text == "user: Köln?\nassistant: It is"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", {"role": "user", "content": parts}) == "one\ntwo"


def test_huggingface_extras() -> None:
    template = (
        "{% for m in messages %}\n"
        "    {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ {'b': [1, 'ü<'], 'a': 2} | tojson(indent=2, sort_keys=true) }} {{ strftime_now('%Y') | length }} {{ word }}"
    )
    text = render(template, *RESULTS, QUESTION, variables={"word": "hi"})
    assert text == 'Köln?{\n  "a": 2,\n  "b": [\n    1,\n    "ü<"\n  ]\n} 4 hi'


def test_special_tokens_are_variables_and_can_be_overridden(qwen2_folder: Path) -> None:
    tokenizer = Tokenizer.from_dir(qwen2_folder)
    template = "{{ messages[0].content }}{{ eos_token }}{{ bos_token is defined }}"
    assert tokenizer.apply_chat_template([QUESTION], chat_template=template) == "Köln?<|im_end|>False"
    assert tokenizer.apply_chat_template([QUESTION], chat_template=template, eos_token="!") == "Köln?!False"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], chat_template=template, tokenize=True)
    assert ids == tokenizer.encode("he<|im_end|>False")


def test_continuing_needs_no_second_flag(qwen2_folder: Path) -> None:
    tokenizer = Tokenizer.from_dir(qwen2_folder)
    chat = [QUESTION, {"role": "assistant", "content": "It"}]
    text = tokenizer.apply_chat_template(chat, chat_template=QWEN_LIKE, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nIt")


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "messages is empty"),
        (["hi"], {}, "message 'hi' is not a dict with a role"),
        ([{"content": "hi"}], {}, "is not a dict with a role"),
        ([{"role": "user", "content": object()}], {}, "messages must consist of JSON types"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "is not text"),
        ([{"role": "user", "content": ["hi"]}], {}, "is not text"),
        ([{"role": "assistant", "tool_calls": [3]}], {}, "tool call 3 is not a dict"),
        ([{"role": "assistant", "tool_calls": 5}], {}, "tool_calls=5 is not a list"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            {},
            "'f' are not JSON",
        ),
        ([{"role": "user"}], {}, "does not accept these messages"),
        ([{"role": "tool"}], {"add_generation_prompt": False, "continue_final_message": True}, "last message with"),
        ([QUESTION], {"continue_final_message": True}, "exclude each other"),
        ([QUESTION], {"tools": [print]}, "tools must consist of JSON types"),
    ],
)
def test_bad_messages(messages: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render_chat(QWEN_LIKE, messages, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "does not accept"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ range(10000000) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
    ],
)
def test_templates_that_fail_or_try_to_escape(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(template, QUESTION)


def test_a_template_without_the_last_message_cannot_continue_it() -> None:
    with pytest.raises(RequestError, match="drops the last message"):
        render("{{ messages[0].role }}", QUESTION, add_generation_prompt=False, continue_final_message=True)


def test_selection_by_name() -> None:
    both = {"default": "d", "tool_use": "t"}
    assert select_chat_template("only", None, has_tools=True) == "only"
    assert select_chat_template(both, None, has_tools=False) == "d"
    assert select_chat_template(both, None, has_tools=True) == "t"
    assert select_chat_template({"default": "d"}, None, has_tools=True) == "d"
    assert select_chat_template(both, "tool_use", has_tools=False) == "t"
    assert select_chat_template(both, "{{ x }}", has_tools=False) == "{{ x }}"
    assert select_chat_template("only", "{{ x }}", has_tools=False) == "{{ x }}"
    with pytest.raises(RequestError, match="did you mean 'tool_use'"):
        select_chat_template(both, "tool_us", has_tools=False)
    with pytest.raises(RequestError, match=r"unknown chat template '\./t.jinja'; use a template's own text"):
        select_chat_template("only", "./t.jinja", has_tools=False)
    with pytest.raises(RequestError, match="no default chat template"):
        select_chat_template({"rag": "r"}, None, has_tools=False)
    with pytest.raises(RequestError, match="no chat template"):
        select_chat_template(None, None, has_tools=False)


def test_a_jinja_file_goes_before_the_config(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None
    assert load_chat_template(tmp_path, {"chat_template": "config"}) == "config"
    (tmp_path / "chat_template.jinja").write_text("file", "utf-8")
    assert load_chat_template(tmp_path, {"chat_template": "config"}) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools", "utf-8")
    assert load_chat_template(tmp_path, {}) == {"default": "file", "tool_use": "tools"}
