"""Where a model comes from and how it is read: options as users give them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwen2_jax.config.checks import check_choice, check_int, check_type

LoadFormat = Literal["auto", "safetensors", "gguf", "orbax", "dummy"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Runner = Literal["auto", "generate", "pooling"]


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Where a model comes from, how it is read, and how its programs are compiled."""

    load_format: LoadFormat = "auto"
    """`"auto"` looks at the files; `"dummy"` reads only the config and draws random weights."""
    dtype: DType = "auto"
    """`"auto"`: the checkpoint's on a GPU, float32 on a CPU, whose half-precision matmuls are slow."""
    revision: str | None = None
    hf_token: str | bool | None = None
    hf_overrides: Mapping[str, Any] | None = None
    """Laid over config.json: objects merge, None removes."""
    runner: Runner = "auto"
    """`"pooling"` makes an embeddings model of a language model; `"auto"` goes by the architecture."""
    use_tqdm_on_load: bool = True
    lowering_workers: int | None = None
    """Processes that trace and lower programs, which this one compiles; 0: this one lowers them, too. None: as many as
    the host's cores and memory allow where there is a GPU, which they do not touch; none on a CPU."""

    def __post_init__(self) -> None:
        check_choice("load_format", self.load_format, get_args(LoadFormat))
        check_choice("dtype", self.dtype, get_args(DType))
        check_choice("runner", self.runner, get_args(Runner))
        check_type("revision", self.revision, str | None, "a string or None")
        check_type("hf_token", self.hf_token, str | bool | None, "a string, True, False or None")
        check_type("hf_overrides", self.hf_overrides, Mapping | None, "a dict or None")
        check_type("use_tqdm_on_load", self.use_tqdm_on_load, bool, "True or False")
        check_int("lowering_workers", self.lowering_workers, 0, 64, optional=True)

    def resolve_dtype(self, checkpoint_dtype: str, platform: str) -> str:
        """Return the dtype that weights and activations have on `platform`."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if platform == "cpu" else checkpoint_dtype
