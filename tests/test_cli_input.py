"""What the command line reads: lines of standard input, paths, files, and numbers that contradict no default."""

import io
import sys
from pathlib import Path

import pytest

from qwen2_jax import cli


def test_only_line_feeds_end_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "first\x0cpage\u2028of it\r\nsecond\x85\n\nlast"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text, newline=""))
    assert cli._read_lines("text") == ["first\x0cpage\u2028of it", "second\x85", "", "last"]
    for given, lines in (("", []), ("\n", [""]), ("a\n", ["a"]), ("a\n\n", ["a", ""])):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given, newline=""))
        assert cli._read_lines("text") == lines


def test_what_the_system_says_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for destination in (tmp_path / "file" / "x", tmp_path / "file"):
        assert cli.main(["convert", "smollm2", str(destination)]) == 2
    assert cli.main(["embed", "smollm2", "--min-tokens", "20"]) == 2
    assert all(line.startswith("qwen2-jax: error: ") for line in capsys.readouterr().err.splitlines())


def test_an_undecodable_input_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert cli.main(["embed", "smollm2"]) == 2
    assert "can't decode byte" in capsys.readouterr().err


def test_more_tokens_than_the_librarys_default_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked before the model is loaded: 16 is no limit of the commands."""
    monkeypatch.setattr("qwen2_jax.llm.LLM.__init__", lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError))
    for command in (["generate", "smollm2", "Hi"], ["chat", "smollm2", "--message", "Hi"]):
        with pytest.raises(ZeroDivisionError):
            cli.main([*command, "--min-tokens", "20"])
    assert cli.main(["generate", "smollm2", "Hi", "--min-tokens", "20", "--max-tokens", "19"]) == 2


def test_the_adapter_of_the_current_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pirate").mkdir()
    monkeypatch.chdir(tmp_path / "pirate")
    request = cli._lora(cli.parse("generate", ["model", "Hi", "--lora", "."]))
    assert request is not None and (request.lora_name, getattr(request, "lora_path", None)) == ("pirate", ".")
