"""Scheduled calls become padded arrays: tokens, positions, tables, slots, and each row's sampling parameters."""

from typing import Any, cast

import numpy as np
import pytest

from qwen2_jax.config import EngineConfig, ResolvedConfig
from qwen2_jax.engine.batch_builder import BatchBuilder
from qwen2_jax.engine.program_specs import step_lora
from qwen2_jax.engine.request import Request
from qwen2_jax.engine.schedule import ScheduledRow, SchedulerOutput
from qwen2_jax.engine.step_inputs import (
    NOWHERE,
    Layout,
    allocate,
    decode_layout,
    packed_size,
    prefill_layout,
    sample_layout,
)
from qwen2_jax.lora.entry import AdapterEntry
from qwen2_jax.lora.sizes import LoRASizes
from qwen2_jax.models.adapters import TokenGroup, build_lora_tables
from qwen2_jax.types import SamplingParams
from tests.engine.scheduling import make_entry

CONFIG = ResolvedConfig(
    config=EngineConfig(),
    block_size=4,
    max_model_len=24,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    max_num_mixed_tokens=512,
    max_decode_steps=8,
    max_logprobs=5,
    smallest_batch=2,
    smallest_prefill=8,
    decode_growth=2,
)
LORA = LoRASizes(
    num_pages=4, num_vectors=2, max_pages=2, max_rank=32, max_on_host=9,
    num_vocab_pages=1, num_vocab_vectors=1, num_full_vocab=0,
)  # fmt: skip
SPARE = 4  # the row of state that padding reads
BLOCKS = 6


def make_request(
    row: int, prompt: list[int], blocks: list[int], params: SamplingParams | None = None, outputs: tuple[int, ...] = ()
) -> Request:
    request = Request(
        request_id=str(row),
        prompt_token_ids=prompt,
        sampling_params=params or SamplingParams(temperature=0),
        max_model_len=24,
    )
    request.row_index, request.block_ids = row, list(blocks)
    request.output_token_ids.extend(outputs)
    return request


def scheduled(*rows: tuple[Request, int, int, bool], num_steps: int = 1, is_decode: bool = False) -> SchedulerOutput:
    """Rows of (request, start, num_tokens, samples)."""
    return SchedulerOutput(
        rows=tuple(ScheduledRow(*row, 0, num_steps) for row in rows),
        num_steps=num_steps,
        is_decode=is_decode,
        admitted=(),
    )


def unpacked(packed: np.ndarray, layout: Layout) -> dict[str, Any]:
    buffer, views = allocate(layout, CONFIG.max_num_seqs)
    buffer[:] = packed
    return {name: view.tolist() for name, view in views.items()}


def admit(builder: BatchBuilder, *requests: Request, seed: int = 0) -> None:
    for request in requests:
        builder.admit(request, seed)


def decode(builder: BatchBuilder, output: SchedulerOutput) -> tuple[int, dict[str, Any]]:
    bucket, packed = builder.decode(output)
    return bucket, unpacked(packed, decode_layout(bucket, BLOCKS))


def prefill(builder: BatchBuilder, output: SchedulerOutput) -> tuple[int, dict[str, Any]]:
    bucket, packed = builder.prefill(output)
    return bucket, unpacked(packed, prefill_layout(bucket, CONFIG.prefill_rows(bucket), BLOCKS))


def sample(builder: BatchBuilder, output: SchedulerOutput) -> tuple[int, dict[str, Any]]:
    bucket, packed = builder.sample(output)
    return bucket, unpacked(packed, sample_layout(bucket))


def test_a_decode_call() -> None:
    known = make_request(2, [1, 2, 3], [9, 5], outputs=(7, 8))  # the next input is token 4, which the host has read
    unread = make_request(0, [1, 2, 3, 4], [3, 4], outputs=())  # the input at 5 was sampled by a call under way
    third = make_request(1, [6], [2])
    builder = BatchBuilder(CONFIG)
    admit(builder, known, unread, third)
    rows = ((known, 4, 1, True), (unread, 5, 1, True), (third, 0, 1, True))
    bucket, found = decode(builder, scheduled(*rows, num_steps=3, is_decode=True))
    assert bucket == 4
    assert found["input_ids"][:3] == [8, -1, 6]
    assert found["num_steps"] == [3]
    assert found["position_ids"][:3] == [4, 5, 0]
    assert found["row_indices"] == [2, 0, 1, SPARE]
    assert found["sample_positions"] == [5, 6, 1, NOWHERE]
    assert found["last_positions"] == [7, 8, 3, -1]
    assert found["output_indices"][:3] == [2, 2, 0]
    assert found["block_tables"][:3] == [[9, 5, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("count, expected", [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_decode_buckets(count: int, expected: int) -> None:
    requests = [make_request(row, [5], [row + 1]) for row in range(count)]
    builder = BatchBuilder(CONFIG)
    admit(builder, *requests)
    bucket, _ = decode(builder, scheduled(*((request, 0, 1, True) for request in requests), is_decode=True))
    assert bucket == expected


@pytest.mark.parametrize(
    "params, expected",
    [
        ({}, True),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 4}, True),
        ({"temperature": 0.5}, False),
        ({"logprobs": 0}, False),
        ({"presence_penalty": 1.0}, False),
        ({"frequency_penalty": -1.0}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_whether_every_row_is_plainly_greedy(params: dict[str, Any], expected: bool) -> None:
    requests = [
        make_request(0, [5], [1], SamplingParams(temperature=0)),
        make_request(1, [5], [2], SamplingParams(**cast(dict[str, Any], {"temperature": 0} | params))),
    ]
    builder = BatchBuilder(CONFIG)
    admit(builder, *requests)
    output = scheduled(*((request, 0, 1, True) for request in requests), is_decode=True)
    assert builder.is_greedy(output) is expected
    builder.set_logit_bias(0, True)
    assert builder.is_greedy(output) is False


def test_a_prefill_step() -> None:
    running = make_request(3, [1, 2, 3, 4, 5], [8, 2], outputs=(6,))  # decodes at 5
    ahead = make_request(1, [7, 7], [6], outputs=())  # decodes a token at 2 that has not been read
    whole = make_request(0, [11, 12, 13], [4])
    chunk = make_request(2, list(range(20, 40)), [1, 5, 7])  # tokens 6 to 10 of 20
    builder = BatchBuilder(CONFIG)
    admit(builder, running, ahead, whole, chunk)
    rows = ((running, 5, 1, True), (ahead, 2, 1, True), (whole, 0, 3, True), (chunk, 6, 5, False))
    bucket, found = prefill(builder, scheduled(*rows))
    assert bucket == 32
    assert found["input_ids"][:10] == [6, -1, 11, 12, 13, 26, 27, 28, 29, 30]
    assert found["position_ids"][:10] == [5, 2, 0, 1, 2, 6, 7, 8, 9, 10]
    assert found["token_rows"] == [3, 1, 0, 0, 0, 2, 2, 2, 2, 2] + [SPARE] * 22
    expected_slots = [2 * 4 + 1, 6 * 4 + 2, 16, 17, 18, 5 * 4 + 2, 5 * 4 + 3, 7 * 4, 7 * 4 + 1, 7 * 4 + 2]
    assert found["slot_mapping"] == expected_slots + [-1] * 22
    assert found["query_start_loc"] == [0, 1, 2, 5, 10]
    assert found["context_lens"] == [6, 3, 3, 11]
    assert found["row_indices"] == [3, 1, 0, 2]
    bucket, found = sample(builder, scheduled(*rows))
    assert bucket == 4
    assert found["row_indices"] == [3, 1, 0, 2]
    assert found["lm_head_indices"] == [0, 1, 4, 9]
    assert found["sample_positions"] == [6, 3, 3, NOWHERE]
    assert found["last_positions"] == [6, 3, 3, -1]
    assert found["output_indices"][:3] == [1, 1, 0]


def test_padding_rows_of_a_prefill_step_are_empty() -> None:
    request = make_request(1, [5, 6], [3])
    builder = BatchBuilder(CONFIG)
    admit(builder, request)
    rows = (request, 0, 2, True)
    _, found = prefill(builder, scheduled(rows))
    assert found["query_start_loc"] == [0, 2, 2, 2, 2]
    assert found["context_lens"] == [2, 0, 0, 0]
    assert found["row_indices"] == [1, SPARE, SPARE, SPARE]
    assert all(token >= 0 for token in found["input_ids"] + found["position_ids"])


def test_padding_rows_sample_nothing() -> None:
    requests = [make_request(row, [5, 6], [row + 1]) for row in range(3)]
    builder = BatchBuilder(CONFIG)
    admit(builder, *requests)
    bucket, found = sample(builder, scheduled(*((request, 0, 2, True) for request in requests)))
    assert bucket == 4
    assert found["sample_positions"] == [2, 2, 2, NOWHERE]
    assert found["last_positions"] == [2, 2, 2, -1]
    assert found["row_indices"] == [0, 1, 2, SPARE]


def test_a_recomputed_request_brings_its_read_outputs_as_tokens() -> None:
    request = make_request(0, [1, 2, 3], [3, 4], outputs=(7, 8, 9))
    builder = BatchBuilder(CONFIG)
    admit(builder, request)
    output = scheduled((request, 0, 6, True))
    _, found = prefill(builder, output)
    assert found["input_ids"][:6] == [1, 2, 3, 7, 8, 9]
    _, found = sample(builder, output)
    assert found["output_indices"][0] == 3


def test_tables_grow_and_start_anew_with_another_request() -> None:
    request = make_request(1, [5] * 4, [3])
    builder = BatchBuilder(CONFIG)
    admit(builder, request)
    prefill(builder, scheduled((request, 0, 4, True)))
    request.block_ids += [8, 2]
    _, found = decode(builder, scheduled((request, 4, 1, True), is_decode=True))
    assert found["block_tables"][0][:3] == [3, 8, 2]
    other = make_request(1, [6], [5])
    admit(builder, other)
    _, found = decode(builder, scheduled((other, 0, 1, True), is_decode=True))
    assert found["block_tables"][0][0] == 5


def test_sampling_parameters_reach_their_row() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.75, top_k=9, min_p=0.25, presence_penalty=1, frequency_penalty=-0.5,
        repetition_penalty=1.5, logprobs=2,
    )  # fmt: skip
    request, greedy = make_request(2, [5, 6], [3], params), make_request(0, [5], [4])
    builder = BatchBuilder(CONFIG)
    admit(builder, greedy, request, seed=0xFEDCBA9876543210)
    builder.set_logit_bias(2, True)
    _, found = decode(builder, scheduled((request, 1, 1, True), (greedy, 0, 1, True), is_decode=True))
    expected = {
        "temperature": (0.5, 0), "top_p": (0.75, 1), "top_k": (9, 0), "min_p": (0.25, 0), "presence_penalty": (1, 0),
        "frequency_penalty": (-0.5, 0), "repetition_penalty": (1.5, 1), "num_logprobs": (1, -1),
        "has_logit_bias": (1, 0), "prompt_lens": (2, 1),
    }  # fmt: skip
    assert {name: tuple(found[name][:2]) for name in expected} == expected
    assert found["seeds_low"][0] % 2**32 == 0x76543210
    assert found["seeds_high"][0] % 2**32 == 0xFEDCBA98


def test_nothing_of_a_former_request_stays_in_its_row() -> None:
    builder = BatchBuilder(CONFIG)
    first = make_request(1, [5], [3], SamplingParams(top_k=3, min_p=0.5, presence_penalty=2, logprobs=1))
    admit(builder, first)
    builder.set_logit_bias(1, True)
    second = make_request(1, [5], [3], SamplingParams(temperature=0))
    admit(builder, second)
    _, found = decode(builder, scheduled((second, 0, 1, True), is_decode=True))
    plain = {"top_k": 0, "min_p": 0, "presence_penalty": 0, "num_logprobs": -1, "has_logit_bias": 0, "temperature": 0}
    assert {name: found[name][0] for name in plain} == plain


def test_padding_asks_for_nothing() -> None:
    builder = BatchBuilder(CONFIG)
    rows = [make_request(row, [5], [row + 1], SamplingParams(temperature=1, top_k=3)) for row in range(3)]
    admit(builder, *rows)
    _, found = decode(builder, scheduled(*((request, 0, 1, True) for request in rows), is_decode=True))
    plain = {"temperature": 0, "top_p": 1, "repetition_penalty": 1, "num_logprobs": -1, "has_logit_bias": 0, "top_k": 0}
    assert {name: found[name][3] for name in plain} == plain


def check_adapters(packed: np.ndarray, layout: Layout, token_groups: list[int], *groups: AdapterEntry) -> None:
    """Compare a call's tables with those of these groups, whose index each token has."""
    found, size = unpacked(packed, layout), layout["token_order"].shape[0]
    padded = np.array(token_groups + [-1] * (size - len(token_groups)))
    expected = build_lora_tables(padded, [entry.group or TokenGroup() for entry in groups], LORA.tables(size, 4))
    assert {name: found[name] for name in expected} == {name: table.tolist() for name, table in expected.items()}
    vectors = [*(entry.group.vector for entry in groups if entry.group is not None), -1]
    assert found["scale_rows"] == [vectors[group] for group in padded]


def test_tokens_are_grouped_by_their_adapters() -> None:
    first, second, bias = make_entry("a", 2, 0), make_entry("b", 3, vector=1), make_entry("c", vector=0)
    requests = [make_request(row, [5] * 9, [row + 1, 5, 6]) for row in range(4)]
    for request, entry in zip(requests, (first, None, second, first), strict=True):
        request.adapter = entry
    builder = BatchBuilder(CONFIG, LORA)
    admit(builder, *requests)
    _, packed = builder.decode(scheduled(*((request, 8, 1, True) for request in requests), is_decode=True))
    check_adapters(packed, decode_layout(4, BLOCKS, step_lora(LORA, 4, 4)), [0, -1, 1, 0], first, second)
    requests[3].adapter = bias
    rows = [(request, 0, count, True) for request, count in zip(requests[::-1], (1, 2, 9, 6), strict=True)]
    _, packed = builder.prefill(scheduled(*rows))
    layout = prefill_layout(32, 4, BLOCKS, step_lora(LORA, 32, 4))
    check_adapters(packed, layout, [0] + [1] * 2 + [-1] * 9 + [2] * 6, bias, second, first)


def test_a_call_without_adapters_carries_none() -> None:
    requests = [make_request(row, [5], [row + 1]) for row in range(2)]
    builder = BatchBuilder(CONFIG, LORA)
    admit(builder, *requests)
    output = scheduled(*((request, 0, 1, True) for request in requests), is_decode=True)
    assert len(builder.decode(output)[1]) == packed_size(decode_layout(2, BLOCKS))
    assert len(builder.prefill(output)[1]) == packed_size(prefill_layout(8, 4, BLOCKS))
