"""The device mesh, its one axis `"tp"`, and how heads, MLP columns and vocabulary rows are laid out over it.

Weights carry their sharding from birth (`out_sharding` in `models/layers.py`); this module says what the names mean.
"""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.errors import ConfigError

TP = "tp"


def make_mesh(tensor_parallel_size: int = 1) -> Mesh:
    """Return a mesh of the first `tensor_parallel_size` devices with the explicit axis `"tp"`.

    Raises `ConfigError` when there are fewer devices than that.
    """
    devices = jax.devices()
    if not 1 <= tensor_parallel_size <= len(devices):
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size} needs that many devices; "
            f"there are {len(devices)} ({devices[0].platform}): use 1 to {len(devices)}"
        )
    return jax.make_mesh(
        (tensor_parallel_size,), (TP,), axis_types=(AxisType.Explicit,), devices=devices[:tensor_parallel_size]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def out_sharding(*spec: str | None) -> P | None:
    """Return `P(*spec)` for an operation under a mesh, or None where no mesh is set (a module used on its own)."""
    return None if jax.sharding.get_abstract_mesh().empty else P(*spec)


def pad_to_multiple(size: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `size`."""
    return math.ceil(size / multiple) * multiple


@dataclass(frozen=True)
class HeadLayout:
    """How a model's attention heads are laid out over `tp` devices.

    Query heads are stored grouped by the KV head that they read, [K, G]; the devices split the K axis. When `tp` does
    not divide the KV heads, each is copied, and its query heads are dealt out over the copies; a query slot that gets
    none has zero weights, so that its output adds nothing in `o_proj`. Qwen2.5-0.5B (14 query, 2 KV heads) at tp 4:
    4 KV heads, copies of 0, 0, 1, 1, with 4, 3, 4, 3 of the query heads and one zero slot at each odd one.
    """

    num_attention_heads: int
    num_key_value_heads: int
    tp: int = 1

    @property
    def copies(self) -> int:
        """How many copies of each KV head there are."""
        return math.lcm(self.num_key_value_heads, self.tp) // self.num_key_value_heads

    @property
    def padded_kv_heads(self) -> int:
        """K: KV heads in all, copies counted."""
        return self.num_key_value_heads * self.copies

    @property
    def padded_group(self) -> int:
        """G: query slots per KV head."""
        return math.ceil(self.num_attention_heads // self.num_key_value_heads / self.copies)

    @property
    def kv_source(self) -> tuple[int, ...]:
        """For each of the K heads, the checkpoint's KV head that it copies."""
        return tuple(head // self.copies for head in range(self.padded_kv_heads))

    @property
    def q_source(self) -> tuple[tuple[int | None, ...], ...]:
        """For each of the K heads, the checkpoint's query head in each of its G slots (None: zero weights)."""
        group = self.num_attention_heads // self.num_key_value_heads
        rows = []
        for head in range(self.padded_kv_heads):
            source, copy = divmod(head, self.copies)
            share = range(group)[copy :: self.copies]
            slots = [source * group + g for g in share]
            rows.append(tuple(slots) + (None,) * (self.padded_group - len(slots)))
        return tuple(rows)
