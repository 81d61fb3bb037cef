"""What the engine does for prompts that a head classifies: which hidden states it takes, and what is made of them."""

import numpy as np
import pytest

from qwen2_jax.engine.batch_builder import BatchBuilder
from qwen2_jax.engine.output_processor import GroupOutput
from qwen2_jax.engine.request import RequestStatus
from qwen2_jax.types import ClassificationRequestOutput, SamplingParams
from tests.engine.processing import ids, make_processor
from tests.engine.scheduling import make_entry
from tests.engine.test_batch_builder import CONFIG, admit, make_request, scheduled


def finished(score: np.ndarray, hidden: np.ndarray | None) -> ClassificationRequestOutput:
    """Return the output of the prompt "hi" whose last hidden state is `hidden` [D]."""
    source = make_processor().classification("c", "hi", adapter=make_entry("topics", score=score))
    group = GroupOutput.start(source, None)
    assert not group.is_finished
    group.pooled = hidden
    source.sequences[0].status = RequestStatus.FINISHED
    output = group.render()
    assert isinstance(output, ClassificationRequestOutput) and output.finished
    return output


def test_logits_and_probabilities() -> None:
    score = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    output = finished(score, np.array([0.5, 1.5], np.float32))
    assert (output.request_id, list(output.prompt_token_ids)) == ("c", ids("hi"))
    assert output.lora_request is not None and output.lora_request.lora_name == "topics"
    assert (output.outputs.logits, output.outputs.num_labels) == ([0.5, 1.5, 2.0], 3)
    weights = np.exp([0.5, 1.5, 2.0])
    assert output.outputs.probs == pytest.approx(weights / weights.sum())


def test_large_logits_do_not_overflow() -> None:
    output = finished(np.array([[1e4], [-1e4]], np.float32), np.array([2], np.float32))
    assert output.outputs.probs == [1.0, 0.0]


def test_a_classification_that_was_aborted_has_no_labels() -> None:
    output = finished(np.zeros((2, 3), np.float32), None)
    assert output.outputs.logits == output.outputs.probs == [] and output.outputs.num_labels == 0


def test_each_rows_last_token_is_taken() -> None:
    requests = [make_request(row, [5, 6, 7], [row + 1]) for row in range(3)]
    builder = BatchBuilder(CONFIG)
    admit(builder, *requests)
    rows = zip(requests, (0, 2, 0), (3, 1, 2), strict=True)
    assert builder.last_hidden(scheduled(*((*row, False) for row in rows))).tolist() == [2, 3, 5, 0]


def test_rows_that_do_not_sample_do_not_choose_the_sampler() -> None:
    greedy, other = make_request(0, [5], [1]), make_request(1, [5], [2], SamplingParams(temperature=1))
    builder = BatchBuilder(CONFIG)
    admit(builder, greedy, other)
    assert builder.is_greedy(scheduled((greedy, 0, 1, True), (other, 0, 1, False)))
    assert not builder.is_greedy(scheduled((greedy, 0, 1, True), (other, 0, 1, True)))
