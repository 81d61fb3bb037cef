"""What `LLM` makes of its arguments before the engine sees them, and of its outputs after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from qwen2_jax.engine.input_processor import Prompt
from qwen2_jax.errors import ConfigError, RequestError, nearest
from qwen2_jax.models.checkpoint import read_json
from qwen2_jax.request_checks import check_instance, check_list
from qwen2_jax.sampling_params import GENERATION_CONFIG_FIELDS
from qwen2_jax.text.tokenizer import Tokenizer
from qwen2_jax.types import EmbeddingOutput, EmbeddingRequestOutput, SamplingParams

_EOS = "eos_token_id"
"""What ends an answer, of a generation config."""
_CHAT_ARGUMENTS = ("messages", "tools", "tokenize", "chat_template", "add_generation_prompt", "continue_final_message")


def read_tokenizer(source: Path | dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a folder, or of a GGUF file's metadata."""
    if isinstance(source, dict):
        return Tokenizer.from_gguf(source)
    return Tokenizer.from_dir(source)


def generation_defaults(choice: str, of_model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's defaults, none ("vllm"), or those of another folder; `ConfigError` where it has none."""
    if choice == "auto":
        return dict(of_model)
    if choice == "vllm":
        return {}
    path = Path(choice) / "generation_config.json"
    if not path.is_file():
        raise ConfigError(
            f"generation_config={choice!r} is not 'auto', 'vllm', or a folder with generation_config.json"
        )
    return read_json(path)


def checked_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is laid over a model's defaults; `ConfigError` for a name or a value that is none of theirs."""
    known = [*GENERATION_CONFIG_FIELDS, _EOS]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"override_generation_config has {name!r}{nearest(name, known)}; use {', '.join(known)}, and "
                "SamplingParams for what belongs to a request"
            )
    ends = given.get(_EOS)
    for token_id in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ConfigError(f"override_generation_config: {_EOS}={ends!r} is not a token id or a list of token ids")
    try:
        SamplingParams.from_defaults(given)
    except RequestError as error:
        raise ConfigError(f"override_generation_config: {error}") from error
    return dict(given)


def params_per_prompt(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """Return each prompt's parameters; one for all is for each. Raises `RequestError` for what are none."""
    if isinstance(params, SamplingParams):
        return [params] * count
    listed = list(check_list("sampling_params", params))
    check_length("sampling_params", len(listed), count)
    for each in listed:
        check_instance("sampling_params", each, SamplingParams, "a SamplingParams, or a list of one per prompt")
    return listed


def check_template_variables(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a chat template's variables; `RequestError` for one that `chat` has an argument of its own for."""
    for name in given:
        if name in _CHAT_ARGUMENTS:
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which is no variable of a template; pass chat({name}=...) instead"
                if name != "tokenize"
                else "chat_template_kwargs has 'tokenize', which chat does itself; leave it out"
            )
    return given


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts as a list; a text, a dict or a list of token ids is one prompt."""
    if isinstance(prompts, str | dict):
        return [prompts]
    items = list(prompts)
    return cast(list[Prompt], [items] if items and isinstance(items[0], int) else items)


def check_length(name: str, found: int, expected: int) -> None:
    """Raise `RequestError` unless there is one entry per prompt."""
    if found != expected:
        raise RequestError(f"{name} has {found} entries for {expected} prompts; pass one per prompt")


def normalized(output: EmbeddingRequestOutput) -> EmbeddingRequestOutput:
    """Return the output with a vector of length 1."""
    vector = np.asarray(output.outputs.embedding)
    unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput(embedding=unit.tolist()),
        prompt_token_ids=output.prompt_token_ids,
        finished=output.finished,
    )
