"""An adapter in host memory, as read: low-rank updates, replaced biases, matrices, token rows, classification head."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One module's update of its weight W `[out, in]`; arrays have the file's dtype.

    Without `magnitude` the module computes `(W + scaling * b @ a) x + bias_of_W + scaling * bias`. With it (DoRA)
    `m / ||W + scaling * b @ a|| * (W + scaling * b @ a) x + bias_of_W`, the norm taken of each row, over the inputs.
    An embedding is a module whose inputs are the vocabulary: its W is the transposed table `[D, V]`.
    """

    a: np.ndarray
    """`[r, in]`"""
    b: np.ndarray
    """`[out, r]`"""
    scaling: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA, from the module's own rank and alpha."""
    bias: np.ndarray | None
    """`[out]`, not scaled yet; None without `lora_bias`."""
    magnitude: np.ndarray | None
    """`[out]`; None without DoRA."""

    @property
    def rank(self) -> int:
        """r: the number of rows of `a`."""
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows that replace those of the embedding table or of the head: PEFT's "delta" is the new row, not a difference.

    `token_ids` `[n]` int32 are distinct; `rows` `[n, D]` has the file's dtype.
    """

    token_ids: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter changes; a module that is not named computes as the base does.

    A field named `lm_head...` is about the output matrix alone, even where the base ties it to the embedding: tied
    adapters have both fields. Each of the two matrices has at most one of low-rank update, full copy and token rows.
    """

    linear: Mapping[tuple[int, str], LowRank]
    """By layer and name of the projection, from `q_proj` to `down_proj`."""
    embed_tokens: LowRank | None
    """`a` is `[r, V]`, `b` is `[D, r]`."""
    lm_head: LowRank | None
    """`a` is `[r, D]`, `b` is `[V, r]`."""
    biases: Mapping[tuple[int, str], np.ndarray]
    """`[out]`, replacing the base's bias; by layer and name of the projection."""
    full_embed_tokens: np.ndarray | None
    """`[V, D]`, replacing the base's table."""
    full_lm_head: np.ndarray | None
    """`[V, D]`, replacing the base's output matrix."""
    embed_token_rows: TokenRows | None
    lm_head_token_rows: TokenRows | None
    score: np.ndarray | None = None
    """`[num_labels, D]`, the classification head of a sequence classifier, which the base has none of."""
    digest: str
    """Hexadecimal SHA-256 of the weights and of what the config says about them: the adapter's identity."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; one that two fields share counts once."""
        return sum({id(array): array.nbytes for array in self._arrays()}.values())

    @property
    def max_rank(self) -> int:
        """The largest rank of a low-rank update; 0 without any."""
        return max((update.rank for update in self._updates()), default=0)

    @property
    def num_modules(self) -> int:
        """The number of modules with a low-rank update."""
        return sum(1 for _ in self._updates())

    def _updates(self) -> Iterator[LowRank]:
        yield from self.linear.values()
        yield from (update for update in (self.embed_tokens, self.lm_head) if update is not None)

    def _arrays(self) -> Iterator[np.ndarray]:
        for update in self._updates():
            yield from (update.a, update.b)
            yield from (vector for vector in (update.bias, update.magnitude) if vector is not None)
        for rows in (self.embed_token_rows, self.lm_head_token_rows):
            yield from () if rows is None else (rows.token_ids, rows.rows)
        yield from self.biases.values()
        yield from (full for full in (self.full_embed_tokens, self.full_lm_head, self.score) if full is not None)
