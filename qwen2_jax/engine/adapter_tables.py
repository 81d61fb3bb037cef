"""A call's adapters as tables: which tokens use which pages, vectors and matrices on the devices."""

from collections.abc import Sequence

import numpy as np

from qwen2_jax.engine.schedule import SchedulerOutput
from qwen2_jax.engine.step_inputs import VOCAB, StepLoRA
from qwen2_jax.lora.entry import AdapterEntry
from qwen2_jax.models.adapters import TableSizes, TokenGroup, build_lora_tables

Views = dict[str, np.ndarray]


def uses_adapters(output: SchedulerOutput) -> bool:
    """Return whether any row of a call has an adapter."""
    return any(row.request.adapter is not None for row in output.rows)


def has_vectors(output: SchedulerOutput) -> bool:
    """Return whether the adapter of any row of a call has biases or magnitudes in the layers."""
    adapters = [row.request.adapter for row in output.rows]
    return any(adapter is not None and _resident(adapter).vector >= 0 for adapter in adapters)


def changes_vocab(output: SchedulerOutput) -> bool:
    """Return whether the adapter of any row of a call changes embeddings or head."""
    adapters = [row.request.adapter for row in output.rows]
    return any(adapter is not None and adapter.vocab_group is not None for adapter in adapters)


def fill_step(views: Views, output: SchedulerOutput, lora: StepLoRA) -> None:
    """Fill the tables of a step, whose tokens are its rows' one behind another; see `step_inputs.lora_layout`."""
    counts = [row.num_tokens for row in output.rows]
    adapters = [row.request.adapter for row in output.rows]
    entries, token_groups = _group(adapters, counts, len(views["token_order"]))
    groups = [_resident(entry) for entry in entries]
    _fill_tables(views, "", token_groups, groups, lora.tables)
    views["scale_rows"][:] = np.array([*(group.vector for group in groups), -1])[token_groups]
    fill_vocab(views, adapters, counts, lora)


def fill_vocab(views: Views, adapters: Sequence[AdapterEntry | None], counts: Sequence[int], lora: StepLoRA) -> None:
    """Fill the tables of what the adapters of rows of `counts` tokens change in the embeddings and the head."""
    if lora.vocab is None:
        return
    entries, token_groups = _group(adapters, counts, len(views["full_head_rows"]))
    groups = [entry.vocab_group or TokenGroup() for entry in entries]
    _fill_tables(views, VOCAB, token_groups, groups, lora.vocab)
    pages = np.zeros((len(entries) + 1, lora.vocab.max_pages), np.int32)
    for index, group in enumerate(groups):
        pages[index, : len(group.pages)] = [use.page for use in group.pages]
    views["token_pages"][:] = pages[token_groups]
    rows = {"full_embed_rows": "full_embed", "full_head_rows": "full_head", "vector_rows": "vocab_vectors"}
    for name, kind in rows.items():
        views[name][:] = np.array([*(entry.place(kind) for entry in entries), -1])[token_groups]


def _fill_tables(
    views: Views, prefix: str, token_groups: np.ndarray, groups: list[TokenGroup], sizes: TableSizes
) -> None:
    """Fill the tables of tokens' groups; one that adds nothing is none, as the sizes have it."""
    adding = [index for index, group in enumerate(groups) if group.pages or group.vector >= 0]
    renumbered = np.full(len(groups) + 1, -1)
    renumbered[adding] = np.arange(len(adding))
    tables = build_lora_tables(renumbered[token_groups], [groups[index] for index in adding], sizes)
    for name, table in tables.items():
        views[prefix + name][:] = table


def _group(
    adapters: Sequence[AdapterEntry | None], counts: Sequence[int], num_tokens: int
) -> tuple[list[AdapterEntry], np.ndarray]:
    """Return the distinct adapters, and for each token the index of its own; -1 for none, and for padding."""
    index: dict[AdapterEntry, int] = {}
    rows = [-1 if entry is None else index.setdefault(entry, len(index)) for entry in adapters]
    token_groups = np.full(num_tokens, -1)
    repeated = np.repeat(rows, counts)
    token_groups[: len(repeated)] = repeated
    return list(index), token_groups


def _resident(entry: AdapterEntry) -> TokenGroup:
    assert entry.group is not None, "a running request's adapter is on the device"
    return entry.group
