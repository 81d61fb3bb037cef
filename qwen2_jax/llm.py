"""The offline API: `LLM`, with vLLM's names and shapes."""

import queue
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm

from qwen2_jax.config import split_options
from qwen2_jax.engine.async_engine import AsyncEngine
from qwen2_jax.engine.build import build_engine, read_checkpoint
from qwen2_jax.engine.engine import Output
from qwen2_jax.engine.input_processor import ProcessedInput, Prompt
from qwen2_jax.errors import ConfigError
from qwen2_jax.llm_adapters import Adapters, LoadedLoRA, LoRARequests
from qwen2_jax.llm_inputs import (
    as_list,
    check_length,
    check_template_variables,
    checked_overrides,
    generation_defaults,
    normalized,
    params_per_prompt,
    read_tokenizer,
)
from qwen2_jax.lora.entry import AdapterStats
from qwen2_jax.models.hub import resolve
from qwen2_jax.sampling_params import GENERATION_CONFIG_FIELDS
from qwen2_jax.text.tokenizer import Tokenizer
from qwen2_jax.types import (
    AdapterRequest,
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

Message = Mapping[str, Any]


class LLM:
    """A model, loaded and compiled, that generates, chats, streams, embeds and classifies.

    Args:
        model: a local folder (safetensors or Orbax), a GGUF file, a hub id, or `"smollm2"`, the embedded demo model.
        tokenizer: a folder or hub id to take the tokenizer from instead of the model's.
        skip_tokenizer_init: do without a tokenizer; prompts are token ids and `detokenize` is False.
        generation_config: `"auto"` takes default sampling parameters from the model's generation_config.json, `"vllm"`
            takes none, a folder's path takes them from there.
        override_generation_config: laid over those defaults.
        options: the fields of `config.LoadConfig`, `config.CacheConfig` and `config.EngineConfig`.

    Raises:
        ConfigError, CheckpointError, CapacityError: what was asked cannot be served; the message says why.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        generation_config: str = "auto",
        override_generation_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        load, engine_config = split_options(options)
        token, has_weights = load.hf_token, load.load_format != "dummy"
        path = resolve(model, revision=load.revision, token=token, weights=has_weights)
        checkpoint = read_checkpoint(path, load)
        self._tokenizer = None
        if not skip_tokenizer_init:
            source = (
                checkpoint.tokenizer_source if tokenizer is None else resolve(tokenizer, token=token, weights=False)
            )
            self._tokenizer = read_tokenizer(source)
        self._generation_config = generation_defaults(generation_config, checkpoint.generation_config)
        self._generation_config |= checked_overrides(override_generation_config or {})
        engine, self.model_config, self.config = build_engine(
            path,
            load,
            engine_config,
            tokenizer=self._tokenizer,
            generation_config=self._generation_config,
            checkpoint=checkpoint,
        )
        self._normalize = checkpoint.embedding_modules is not None and checkpoint.embedding_modules.normalize
        self._engine = AsyncEngine(engine)
        self._adapters = Adapters(self._engine)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; results come in the prompts' order.

        Args:
            prompts: one or many texts, token-id lists, or `{"prompt_token_ids": [...]}`.
            sampling_params: one for all, or one per prompt; None takes the model's defaults.
            use_tqdm: show a progress bar.
            lora_request: the adapter of all prompts, or one or None per prompt, each a `LoRARequest` or several merged
                as a `MergedLoRARequest`; needs `enable_lora=True`.
            priority: one per prompt; lower runs first under `scheduling_policy="priority"`.

        Raises:
            RequestError: a prompt or its parameters cannot be served. Nothing is run then.
            AdapterError: an adapter cannot be served. Nothing is run then, unless its files go while it waits.
        """
        prompts = as_list(prompts)
        adapters = self._adapters.find(lora_request, len(prompts))
        given = self.get_default_sampling_params() if sampling_params is None else sampling_params
        params = params_per_prompt(given, len(prompts))
        priorities = [0] * len(prompts) if priority is None else list(priority)
        check_length("priority", len(priorities), len(prompts))
        sources = [
            self._engine.engine.inputs.generation(
                self._engine.new_request_id(),
                prompt,
                each.replace(output_kind=RequestOutputKind.FINAL_ONLY),
                priority=rank,
                adapter=adapter,
            )
            for prompt, each, rank, adapter in zip(prompts, params, priorities, adapters, strict=True)
        ]
        return [output for output in self._run(sources, use_tqdm) if isinstance(output, RequestOutput)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of `{"role": ..., "content": ...}`; see `generate`."""
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if is_one else messages)
        prompts: list[Prompt] = [
            self._chat_prompt(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **check_template_variables(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    async def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: AdapterRequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield one request's outputs as they grow (`sampling_params.output_kind` says how); a conversation is a chat.

        Leaving the loop early aborts the request.
        """
        adapter = await self._adapters.find_one(lora_request)
        if not isinstance(prompt, str | dict) and prompt and isinstance(prompt[0], Mapping):
            prompt = self._chat_prompt(cast(Sequence[Message], prompt))
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        inputs = self._engine.engine.inputs
        request_id = self._engine.new_request_id()
        source = inputs.generation(request_id, cast(Prompt, prompt), params, priority=priority, adapter=adapter)
        async with aclosing(self._engine.stream(source)) as outputs:
            async for output in outputs:
                assert isinstance(output, RequestOutput)
                yield output

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        normalize: bool | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Return one vector per prompt; `normalize` makes its length 1 (None: as the checkpoint's modules say)."""
        prompts = as_list(prompts)
        inputs, adapters = self._engine.engine.inputs, self._adapters.find(lora_request, len(prompts))
        sources = [
            inputs.embedding(self._engine.new_request_id(), prompt, adapter=adapter)
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        outputs = [output for output in self._run(sources, use_tqdm) if isinstance(output, EmbeddingRequestOutput)]
        return (
            [normalized(output) for output in outputs]
            if (normalize or (normalize is None and self._normalize))
            else outputs
        )

    def classify(
        self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True, lora_request: LoRARequests = None
    ) -> list[ClassificationRequestOutput]:
        """Return the logits of each prompt's last token by the classification head of its adapter (`lora_request`).

        Raises `RequestError` and `AdapterError` as `generate` does, also for a prompt without an adapter and for an
        adapter without a head: a language model has none of its own.
        """
        prompts = as_list(prompts)
        inputs, adapters = self._engine.engine.inputs, self._adapters.find(lora_request, len(prompts))
        sources = [
            inputs.classification(self._engine.new_request_id(), prompt, adapter=adapter)
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        return [output for output in self._run(sources, use_tqdm) if isinstance(output, ClassificationRequestOutput)]

    def load_lora(self, lora_request: AdapterRequest, *, pin: bool = False) -> LoadedLoRA:
        """Bring an adapter to the device ahead of its first request; with `pin` it stays there until it is unloaded.

        Raises `AdapterError` for one that cannot be served, and `CapacityError` where those in use leave no room.
        """
        return self._adapters.load(lora_request, pin=pin)

    def unload_lora(self, name: str) -> None:
        """Forget the adapters called `name`; running requests keep theirs. `AdapterError` if there are none."""
        self._adapters.unload(name)

    def list_loras(self) -> list[LoadedLoRA]:
        """Return the adapters that are known, with where they are and what they change."""
        return self._adapters.list()

    def lora_stats(self) -> AdapterStats:
        """Return how many adapters are where, and counts of loads, evictions, failures and waiting time."""
        return self._adapters.stats()

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises `ConfigError` when there is none."""
        if self._tokenizer is None:
            raise ConfigError("there is no tokenizer: the LLM was made with skip_tokenizer_init=True")
        return self._tokenizer

    def get_default_sampling_params(self, **defaults: Any) -> SamplingParams:
        """Return sampling parameters with the model's defaults, and `defaults` where it has none."""
        of_model = {field: self._generation_config.get(key) for key, field in GENERATION_CONFIG_FIELDS.items()}
        missing = {name: value for name, value in defaults.items() if of_model.get(name) is None}
        return SamplingParams.from_defaults(self._generation_config, **missing)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing happens, while requests run."""
        return self._engine.call(lambda engine: engine.scheduler.reset_prefix_cache())

    @property
    def num_compilations(self) -> int:
        """Programs compiled after start-up; anything but 0 is a mistake of this package."""
        return self._engine.engine.runner.num_compilations

    def shutdown(self) -> None:
        """Stop the engine and free the device's memory; the object cannot be used after that."""
        self._engine.shutdown()

    def _chat_prompt(self, messages: Sequence[Message], **options: Any) -> Prompt:
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        # The template writes its own special tokens; the tokenizer must not add them once more.
        return {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def _run(self, sources: list[ProcessedInput], use_tqdm: bool) -> list[Output]:
        """Submit requests, wait for all, and return their last outputs in order. An interrupt aborts them."""
        done: queue.SimpleQueue[Output | BaseException] = queue.SimpleQueue()
        self._engine.submit([(source, done.put) for source in sources])
        finished: dict[str, Output] = {}
        tokens = 0
        try:
            with tqdm(total=len(sources), desc="Processed prompts", disable=not use_tqdm) as progress:
                while len(finished) < len(sources):
                    output = done.get()
                    if isinstance(output, BaseException):
                        raise output
                    if not output.finished:
                        continue
                    finished[output.request_id] = output
                    if isinstance(output, RequestOutput):
                        tokens += sum(len(completion.token_ids) for completion in output.outputs)
                        elapsed = progress.format_dict["elapsed"]
                        progress.set_postfix_str(f"output: {tokens / max(elapsed, 1e-9):.1f} tokens/s", refresh=False)
                    progress.update()
        except BaseException:
            self._engine.abort([source.request_id for source in sources if source.request_id not in finished])
            raise
        return [finished[source.request_id] for source in sources]
