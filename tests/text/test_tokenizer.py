"""The tokenizer of a checkpoint folder; expected ids were checked against transformers' Qwen2Tokenizer."""

import json
from pathlib import Path

import pytest

from qwen2_jax.errors import CheckpointError, RequestError
from qwen2_jax.text import Tokenizer

TEXTS = [
    ("hello world's 1212", [259, 261, 81, 75, 67, 263, 220, 16, 17, 16, 17]),
    ("e\u0301", [264]),
    ("\n\n<|im_end|>x", [265, 268, 87]),
    ("hello\u00e9 hello", [259, 264, 220, 259]),
    ("", []),
]


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file, or make one."""
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}), "utf-8")


@pytest.mark.parametrize(("text", "ids"), TEXTS)
def test_vocab_and_merges(qwen2: Tokenizer, text: str, ids: list[int]) -> None:
    assert qwen2.encode(text) == ids


def test_vocab_and_merges_without_a_config_get_the_tokens_of_every_qwen2(qwen2_folder: Path) -> None:
    (qwen2_folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_dir(qwen2_folder)
    assert tokenizer.encode("<|endoftext|><|im_start|>hello<|im_end|>") == [266, 267, 259, 268]
    assert tokenizer.all_special_ids == {266, 267, 268}
    assert tokenizer.eos_token_ids == (266,)


def test_decode_undoes_encode(qwen2: Tokenizer) -> None:
    text = "<|im_start|>user\nhello wörld 🙂<|im_end|>\n"
    assert qwen2.decode(qwen2.encode(text)) == text
    assert qwen2.decode(qwen2.encode(text), skip_special_tokens=True) == "user\nhello wörld 🙂\n"


def test_special_tokens_and_sizes(qwen2: Tokenizer) -> None:
    assert qwen2.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert (qwen2.bos_token_id, qwen2.eos_token_id, qwen2.pad_token_id) == (None, 268, 266)
    assert (qwen2.vocab_size, len(qwen2)) == (266, 269)
    assert qwen2.all_special_ids == {266, 267, 268}


def test_tokens_and_ids(qwen2: Tokenizer) -> None:
    assert qwen2.convert_ids_to_tokens([259, 261, 268, 5000]) == ["hello", "Ġwo", "<|im_end|>", None]
    assert qwen2.convert_tokens_to_ids(["Ġwo", "nothing"]) == [261, None]
    assert [qwen2.token_bytes(token_id) for token_id in (261, 264, 5000)] == [b" wo", "é".encode(), b""]


def test_saved_and_read_again_it_is_the_same(qwen2_folder: Path, tmp_path: Path) -> None:
    edit_json(qwen2_folder / "tokenizer_config.json", chat_template="{{ messages[0].content }}{{ eos_token }}")
    first = Tokenizer.from_dir(qwen2_folder)
    first.save(tmp_path / "saved")
    second = Tokenizer.from_dir(tmp_path / "saved")
    for text, ids in TEXTS:
        assert second.encode(text) == ids
    assert second.special_tokens == first.special_tokens
    assert second.all_special_ids == first.all_special_ids
    assert second.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"


def test_several_chat_templates_are_saved_by_name(qwen2_folder: Path, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    edit_json(qwen2_folder / "tokenizer_config.json", chat_template=templates)
    Tokenizer.from_dir(qwen2_folder).save(tmp_path / "saved")
    assert Tokenizer.from_dir(tmp_path / "saved").chat_template == {"default": "d", "tool_use": "t"}


def test_generation_config_adds_ends_of_an_answer(qwen2_folder: Path) -> None:
    assert Tokenizer.from_dir(qwen2_folder).eos_token_ids == (268,)
    edit_json(qwen2_folder / "generation_config.json", eos_token_id=[266, 268])
    assert Tokenizer.from_dir(qwen2_folder).eos_token_ids == (268, 266)
    edit_json(qwen2_folder / "generation_config.json", eos_token_id=266)
    assert Tokenizer.from_dir(qwen2_folder).eos_token_ids == (268, 266)


def test_special_tokens_map_fills_what_the_config_leaves_out(qwen2_folder: Path) -> None:
    edit_json(qwen2_folder / "special_tokens_map.json", bos_token="<|im_start|>", eos_token="<|endoftext|>")
    tokenizer = Tokenizer.from_dir(qwen2_folder)
    # The config says `"bos_token": null`, which is an answer too.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 268)


def test_added_bos_token(qwen2_folder: Path) -> None:
    edit_json(qwen2_folder / "tokenizer_config.json", add_bos_token=True, bos_token="<|im_start|>")
    tokenizer = Tokenizer.from_dir(qwen2_folder)
    assert tokenizer.encode("hello") == [267, 259]
    assert tokenizer.encode("hello", add_special_tokens=False) == [259]


@pytest.mark.parametrize(("name", "is_added"), [("LlamaTokenizerFast", True), ("Qwen2Tokenizer", False)])
def test_models_made_from_qwen2_may_begin_as_llamas_do(qwen2_folder: Path, name: str, is_added: bool) -> None:
    """tokenizer.json says nothing of it: Hugging Face's class does."""
    Tokenizer.from_dir(qwen2_folder).save(qwen2_folder)
    path = qwen2_folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"tokenizer_class": name, "bos_token": "<|im_start|>"}
    for add in (True, False):
        path.write_text(json.dumps(config | {"add_bos_token": add}), "utf-8")
        tokenizer = Tokenizer.from_dir(qwen2_folder)
        start = tokenizer.backend.token_to_id("<|im_start|>")
        assert (tokenizer.encode("hello")[0] == start) is (add and is_added)
        assert start not in tokenizer.encode("hello", add_special_tokens=False)
    path.write_text(json.dumps(config | {"bos_token": "<|nowhere|>"}), "utf-8")
    with pytest.raises(CheckpointError, match=r"<\|nowhere\|>"):
        Tokenizer.from_dir(qwen2_folder)


def test_tokens_that_only_the_config_knows_are_added(qwen2_folder: Path, tmp_path: Path) -> None:
    Tokenizer.from_dir(qwen2_folder).save(tmp_path / "saved")
    added = {"268": {"content": "<|im_end|>", "special": True}, "269": {"content": "<tool>", "special": False}}
    edit_json(tmp_path / "saved" / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = Tokenizer.from_dir(tmp_path / "saved")
    assert tokenizer.encode("<tool>") == [269]
    assert 269 not in tokenizer.all_special_ids


def test_truncation_and_padding_of_the_file_do_not_apply(qwen2_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(qwen2_folder)
    tokenizer.backend.enable_truncation(2)
    tokenizer.backend.enable_padding(length=8)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_dir(tmp_path / "saved").encode("abcd") == [64, 65, 66, 67]


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_what_is_no_string_is_refused(qwen2: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match="pass a string"):
        qwen2.encode(text)


def test_lone_surrogates_are_refused(qwen2: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        qwen2.encode("a\ud800")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": 3}, "special token 3"),
        ({"eos_token": {"lstrip": True}}, "neither a string nor an object"),
        ({"added_tokens_decoder": {"300": {"content": "<x>"}}}, "the id 300, but in the vocabulary it is 266"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "must map token ids"),
        ({"added_tokens_decoder": ["<x>"]}, "must map token ids"),
        ({"chat_template": 3}, "must be a string or a list"),
        ({"chat_template": [{"name": "default"}]}, "must be a string or a list"),
    ],
)
def test_bad_tokenizer_config(qwen2_folder: Path, changes: dict[str, object], message: str) -> None:
    edit_json(qwen2_folder / "tokenizer_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_dir(qwen2_folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot read .*tokenizer.json"),
        ("tokenizer.json", '{"model": 3}', "cannot read .*tokenizer.json"),
        ("tokenizer_config.json", "[]", "should be an object"),
        ("tokenizer_config.json", "{", "cannot read .*tokenizer_config.json"),
        ("merges.txt", "#version: 0.2\nh e\na b c\n", "merges.txt, line 3: 'a b c'"),
        ("merges.txt", "q z\n", "do not fit together"),
        ("generation_config.json", '{"eos_token_id": "x"}', "no id or list of ids"),
    ],
)
def test_damaged_files(qwen2_folder: Path, name: str, content: str, message: str) -> None:
    (qwen2_folder / name).write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_dir(qwen2_folder)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer.json, and no vocab.json with merges.txt"):
        Tokenizer.from_dir(tmp_path)


def test_other_decoders_and_unknown_special_tokens_are_refused(qwen2_folder: Path) -> None:
    backend = Tokenizer.from_dir(qwen2_folder).backend
    with pytest.raises(CheckpointError, match="eos_token='<nothing>' is not in the tokenizer's vocabulary"):
        Tokenizer(backend, special_tokens={"eos_token": "<nothing>"})
    backend.decoder = None
    with pytest.raises(CheckpointError, match="only ByteLevel is supported"):
        Tokenizer(backend)
