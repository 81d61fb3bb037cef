"""What adapters may take: options as users give them."""

from dataclasses import dataclass

from qwen2_jax.config.checks import check_int, check_type
from qwen2_jax.errors import ConfigError

RANKS_PER_PAGE = 16
"""Ranks are counted in pages of so many: an adapter takes what its rank needs, not what the largest would."""

_MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """How many adapters are served, and how large they may be."""

    enable_lora: bool = False
    """Whether requests may name adapters. It takes programs and memory of its own."""
    max_loras: int | None = None
    """Adapters of the highest rank that the device has room for; lower ranks fit more. None: 8 on a CPU, and on a GPU
    what a tenth of the memory holds, from 1 to 64."""
    max_lora_rank: int = 64
    """The highest rank that an adapter may have."""
    max_vocab_loras: int = 0
    """Adapters of the highest rank with low-rank updates of the embeddings or the head, or with replaced tokens (each
    a rank), that the device has room for. With any, every step with adapters looks at the vocabulary's, too."""
    max_full_vocab: int = 0
    """Adapters with whole embeddings or heads of their own (`modules_to_save`) that the device has room for."""
    max_cpu_loras: int | None = None
    """Adapters that are kept in host memory, at least `max_loras`. None: four times those that the device holds,
    as far as half of the host's free memory reaches."""

    def __post_init__(self) -> None:
        check_type("enable_lora", self.enable_lora, bool, "True or False")
        check_int("max_loras", self.max_loras, 1, _MOST, optional=True)
        check_int("max_lora_rank", self.max_lora_rank, 1, _MOST)
        check_int("max_cpu_loras", self.max_cpu_loras, 1, _MOST, optional=True)
        check_int("max_vocab_loras", self.max_vocab_loras, 0, _MOST)
        check_int("max_full_vocab", self.max_full_vocab, 0, _MOST)
        if self.max_loras is not None and self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(f"max_cpu_loras={self.max_cpu_loras} is less than max_loras={self.max_loras}")

    @property
    def max_pages(self) -> int:
        """The pages of an adapter of the highest rank."""
        return -(-self.max_lora_rank // RANKS_PER_PAGE)
