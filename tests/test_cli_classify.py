"""The command that classifies, against an `LLM` that answers from a list."""

import json
import sys
from collections.abc import Sequence
from types import ModuleType

import pytest

from qwen2_jax.cli import main
from qwen2_jax.types import AdapterRequest, ClassificationOutput, ClassificationRequestOutput, LoRARequest
from tests.test_cli import FakeLLM


class Classifier(FakeLLM):
    """Gives each text its length and one half as logits."""

    def classify(
        self, texts: Sequence[str], lora_request: AdapterRequest | None = None
    ) -> list[ClassificationRequestOutput]:
        self.loras.append(lora_request)
        return [
            ClassificationRequestOutput(
                request_id=str(i),
                outputs=ClassificationOutput(logits=[float(len(text)), 0.5], probs=[0.25, 0.75]),
                prompt_token_ids=[1],
                finished=True,
            )
            for i, text in enumerate(texts)
        ]


def test_classify_prints_a_json_line_a_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = ModuleType("qwen2_jax.llm")
    module.LLM = Classifier  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "qwen2_jax.llm", module)
    monkeypatch.setattr(FakeLLM, "made", [])
    assert main(["classify", "model", "ab", "abc", "--lora", "adapters/topics"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    probs = [0.25, 0.75]
    assert lines == [{"text": text, "logits": [float(len(text)), 0.5], "probs": probs} for text in ("ab", "abc")]
    (llm,) = FakeLLM.made
    assert llm.options == {"enable_lora": True} and llm.loras == [LoRARequest("topics", 1, "adapters/topics")]
