"""A step's inputs to the model, as one pytree of device arrays."""

from dataclasses import dataclass

import jax
from jax import Array
from jaxtyping import Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What a forward pass needs to know of its tokens and rows. Lengths are data: only the paddings are shapes.

    Rows lie one behind another on T. A row is a sequence, or the part of one that this step computes.
    """

    input_ids: Int[Array, " T"]
    position_ids: Int[Array, " T"]
    """Each token's position in its sequence, from 0."""
    block_tables: Int[Array, "R M"]
    """The cache blocks of each row, in order."""
    slot_mapping: Int[Array, " T"]
    """The cache slot that each token's key and value go to; -1 writes nothing."""
    context_lens: Int[Array, " R"]
    """Tokens of each row in the cache once this step's are written; 0 for a row that is padding."""
    query_start_loc: Int[Array, " R+1"] | None = None
    """Where each row's tokens start on T, and the end. None in decode, where T = R."""
    prefill_cache_indices: Int[Array, " W"] | None = None
    """Which tokens' keys and values are written; None means all. `slot_mapping` stays indexed by T."""

    @property
    def num_tokens(self) -> Int[Array, ""] | None:
        """How many tokens the rows have, without T's padding; None in decode, where all count."""
        return None if self.query_start_loc is None else self.query_start_loc[-1]
