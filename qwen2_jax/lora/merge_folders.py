"""From the names of a model and of adapters to a merged adapter or checkpoint in a new folder."""

from collections.abc import Sequence
from pathlib import Path

from qwen2_jax.config import ModelConfig
from qwen2_jax.lora.files import resolve_adapter
from qwen2_jax.lora.merge import MergedAdapter, merge_adapters
from qwen2_jax.lora.merge_checkpoint import check_base, merge_into_checkpoint
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.lora.writer import check_new, write_adapter
from qwen2_jax.lora_requests import MergeOptions
from qwen2_jax.models.hub import resolve
from qwen2_jax.models.weights import open_checkpoint


def merge_folders(
    model: str | Path,
    adapters: Sequence[tuple[str, float]],
    destination: str | Path,
    options: MergeOptions,
    *,
    checkpoint: bool = False,
    revision: str | None = None,
    hf_token: str | None = None,
    use_tqdm: bool = False,
) -> MergedAdapter:
    """Merge `adapters` (folders or hub ids, with their weights) for `model`, and write them to the new `destination`.

    What is written is a PEFT folder, for which the model's config is enough, or with `checkpoint` the model with the
    merge in its weights. One adapter alone with weight 1 and no options goes into a checkpoint as it is, and so exactly
    whatever it holds. Raises `AdapterError`, `CheckpointError` or `ConfigError`; nothing is written then.
    """
    check_new(destination)
    path = resolve(model, revision=revision, token=hf_token, weights=checkpoint)
    opened = open_checkpoint(path, "dummy" if _lacks_weights(path) else "auto")
    if checkpoint:
        check_base(opened)
    base = ModelConfig.from_hf(opened.config)
    read = [read_adapter(resolve_adapter(name, token=hf_token), base) for name, _ in adapters]
    weights = [weight for _, weight in adapters]
    if checkpoint and weights == [1] and options == MergeOptions():
        merged = MergedAdapter(adapter=read[0], errors={})
    else:
        merged = merge_adapters(read, weights, options, use_tqdm=use_tqdm)
    if checkpoint:
        merge_into_checkpoint(path, merged.adapter, destination, use_tqdm=use_tqdm)
    else:
        write_adapter(merged.adapter, destination, base_model_name_or_path=str(model))
    return merged


def _lacks_weights(path: Path) -> bool:
    """Whether `path` is a folder of which the config alone was downloaded."""
    return (path / "config.json").is_file() and not any(path.glob("*.safetensors"))
