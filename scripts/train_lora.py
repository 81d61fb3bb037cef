"""Fine-tune a LoRA adapter with this package's own modules and optax, and save it in PEFT's format.

    python scripts/train_lora.py --model smollm2 --data scripts/data/pirate.json --out demo/adapters/pirate

`--data` is a JSON file: `{"examples": [{"question": ..., "answer": ...}, ...], "held_out": ["a question", ...]}`. The
model learns to give the answers; the questions that are held out show what it says to others, before and after. The
model is any Qwen2 language model that `LLM` loads. Training is in float32 on the CPU: the GPU's kernels, and attention
over contexts whose lengths are data, have no derivative.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from safetensors.numpy import save_file
from tqdm import tqdm

from qwen2_jax import LLM, LoRARequest, SamplingParams
from qwen2_jax.config import EngineConfig, LoadConfig, ModelConfig
from qwen2_jax.engine.model_loader import load_model, model_config
from qwen2_jax.lora.targets import targets
from qwen2_jax.models.batch import StepBatch
from qwen2_jax.models.hub import resolve
from qwen2_jax.models.ops import HEADS, POOL, KVPair, PendingNorm, write_kv_cache
from qwen2_jax.models.qwen2 import FlashQwen2Attention, FlashQwen2ForCausalLM, Qwen2MLP
from qwen2_jax.models.weights import open_checkpoint
from qwen2_jax.parallel import replicated
from qwen2_jax.text.tokenizer import Tokenizer

# The part of a layer's kernels that each of PEFT's modules is; see `qwen2_jax.models.weight_table` for their axes.
PLACES: dict[str, tuple[str, str, Any]] = {
    "q_proj": ("self_attn", "qkv_proj", np.s_[:, :-2]),
    "k_proj": ("self_attn", "qkv_proj", np.s_[:, -2]),
    "v_proj": ("self_attn", "qkv_proj", np.s_[:, -1]),
    "o_proj": ("self_attn", "o_proj", np.s_[:]),
    "gate_proj": ("mlp", "gate_up_proj", np.s_[0]),
    "up_proj": ("mlp", "gate_up_proj", np.s_[1]),
    "down_proj": ("mlp", "down_proj", np.s_[:]),
}

Params = dict[str, Any]
LoRA = dict[str, dict[str, Array]]
"""By module, `layers.{i}.self_attn.q_proj`: A `[r, in]` and B `[out, r]`, as PEFT has them."""


class TrainableAttention(FlashQwen2Attention):
    """The model's attention for whole sequences of one length, each in a cache block of its own.

    The serving kernels loop over as much context as there is, which JAX cannot differentiate backwards.
    """

    def __call__(
        self, norm: PendingNorm, mlp: Qwen2MLP, rope: tuple[Array, Array], batch: StepBatch, kv_cache: KVPair
    ) -> tuple[Array, Array, KVPair]:
        """Attend as `FlashQwen2Attention` does."""
        qkv, residual = self.qkv_proj(norm, self.o_proj)
        q, kv_cache = write_kv_cache(qkv, self.qkv_proj.bias[...], rope, kv_cache, batch)

        def attend(q: Array, k: Array, v: Array) -> Array:
            rows, length, _, head_dim = k.shape
            window = None if self.window is None else (self.window - 1, 0)
            queries = q.reshape(rows, length, -1, head_dim)
            out = jax.nn.dot_product_attention(queries, k, v, is_causal=self.causal, local_window_size=window)
            return out.reshape(q.shape)

        attended = jax.shard_map(attend, in_specs=(HEADS, POOL, POOL), out_specs=HEADS)(q, *kv_cache)
        return self.o_proj(attended, batch.num_tokens, mlp.gate_up_proj), residual, kv_cache


class Batch(NamedTuple):
    """R sequences of L tokens, padded on the right, and which tokens are to be learnt."""

    input_ids: Array
    """[R, L]"""
    is_answer: Array
    """[R, L]: 1 for the tokens of an answer and its end, 0 for a prompt's and padding."""


def trainable(config: ModelConfig) -> FlashQwen2ForCausalLM:
    """Return the language model with `TrainableAttention` in its layers; under `nnx.eval_shape`, its structure."""
    model = FlashQwen2ForCausalLM(config)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = TrainableAttention(config, index, rngs=nnx.Rngs(0))
    return model


def draw_lora(config: ModelConfig, modules: Sequence[str], rank: int, seed: int) -> LoRA:
    """Return new matrices for `modules` of every layer: A uniform, as PEFT draws it, and B zero."""
    sizes, lora, key = targets(config), {}, jax.random.key(seed)
    for layer, name in itertools.product(range(config.num_hidden_layers), modules):
        key, of_a = jax.random.split(key)
        limit = sizes[name].in_features ** -0.5
        lora[f"layers.{layer}.{PLACES[name][0]}.{name}"] = {
            "lora_A": jax.random.uniform(of_a, (rank, sizes[name].in_features), minval=-limit, maxval=limit),
            "lora_B": jnp.zeros((sizes[name].out_features, rank)),
        }
    return lora


def add_lora(params: Params, lora: LoRA, scaling: float) -> Params:
    """Return `params` with `scaling * B @ A` added to each adapted part of a kernel."""
    params = jax.tree.map(lambda leaf: leaf, params)  # new dicts around the same arrays
    for module, update in lora.items():
        _, layer, block, name = module.split(".")
        _, fused, place = PLACES[name]
        weights = params["model"]["layers"][int(layer)][block][fused]
        part = weights["kernel"][place]
        delta = scaling * (update["lora_B"] @ update["lora_A"]).reshape(part.shape)
        weights["kernel"] = weights["kernel"].at[place].add(jax.sharding.reshard(delta, jax.typeof(part).sharding))
    return params


def make_loss(config: ModelConfig, scaling: float) -> Callable[[LoRA, Params, Batch], Array]:
    """Return the function to minimise: the mean cross-entropy of the answers' tokens."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: trainable(config)))

    def loss(lora: LoRA, params: Params, batch: Batch) -> Array:
        model = nnx.merge(graphdef, add_lora(params, lora, scaling))
        rows, length = batch.input_ids.shape
        tokens = jnp.arange(rows * length)
        step = StepBatch(
            input_ids=batch.input_ids.reshape(-1),
            position_ids=tokens % length,
            block_tables=jnp.arange(rows)[:, None],
            slot_mapping=tokens,
            context_lens=jnp.full((rows,), length),
            query_start_loc=jnp.arange(rows + 1) * length,
        )
        pool = jnp.zeros((rows, length, config.num_key_value_heads, config.head_dim), out_sharding=POOL)
        (logits, _), _ = model(step, ((pool, pool),) * config.num_hidden_layers)
        logits = logits.reshape(rows, length, -1)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.input_ids[:, 1:])
        return jnp.sum(losses * batch.is_answer[:, 1:]) / jnp.sum(batch.is_answer[:, 1:])

    return loss


def train(
    loss: Callable[[LoRA, Params, Batch], Array],
    lora: LoRA,
    params: Params,
    batches: Sequence[Batch],
    optimizer: optax.GradientTransformation,
) -> tuple[LoRA, list[float]]:
    """Return the adapter after a step for each batch, and each step's loss; `params` stay as they are."""

    @jax.jit
    def step(lora: LoRA, state: optax.OptState, params: Params, batch: Batch) -> tuple[LoRA, optax.OptState, Array]:
        value, gradient = jax.value_and_grad(loss)(lora, params, batch)
        updates, state = optimizer.update(gradient, state, lora)
        return cast(LoRA, optax.apply_updates(lora, updates)), state, value

    state, losses = jax.jit(optimizer.init)(lora), []
    progress = tqdm(batches, desc="Training", unit="step")
    for batch in progress:
        lora, state, value = step(lora, state, params, batch)
        losses.append(float(value))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return lora, losses


def encode(tokenizer: Tokenizer, examples: Sequence[Mapping[str, str]]) -> Batch:
    """Return every example as a chat in the model's own template, all padded to the longest."""
    ids, answers = [], []
    for example in examples:
        messages = [{"role": "user", "content": example["question"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=True)
        answer = [*tokenizer.encode(example["answer"], add_special_tokens=False), tokenizer.eos_token_ids[0]]
        ids.append(prompt + answer)
        answers.append([0.0] * len(prompt) + [1.0] * len(answer))
    length = max(map(len, ids))
    pad = [[0] * (length - len(row)) for row in ids]
    return Batch(
        jnp.array([row + rest for row, rest in zip(ids, pad, strict=True)]),
        jnp.array([row + rest for row, rest in zip(answers, pad, strict=True)]),
    )


def draw_batches(examples: Batch, size: int, steps: int, seed: int) -> list[Batch]:
    """Return `steps` batches of `size` examples; each example comes once before any comes again."""
    rng, count = np.random.default_rng(seed), len(examples.input_ids)
    rounds = [rng.permutation(count) for _ in range(-(-size * steps // count))]
    order = np.concatenate(rounds)[: size * steps].reshape(steps, size)
    return [Batch(*(array[chosen] for array in examples)) for chosen in order]


def save_adapter(folder: Path, lora: LoRA, *, base: str, rank: int, alpha: float) -> None:
    """Write adapter_config.json and adapter_model.safetensors, in float16, as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.model.{module}.{name}.weight": np.asarray(matrix, np.float16)
        for module, update in lora.items()
        for name, matrix in update.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in lora}),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def show_answers(model: str, adapter: Path, rank: int, questions: Sequence[str]) -> None:
    """Print what the base and the adapter answer to each question, all of it one batch."""
    llm = LLM(model, dtype="float32", enable_lora=True, max_lora_rank=rank, max_model_len=256, max_num_seqs=8)
    chats = [[{"role": "user", "content": question}] for question in questions for _ in range(2)]
    requests = [None, LoRARequest(adapter.name, 1, str(adapter))] * len(questions)
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=48), lora_request=requests, use_tqdm=False)
    texts = [output.outputs[0].text.strip() for output in outputs]
    for question, before, after in zip(questions, texts[::2], texts[1::2], strict=True):
        print(f"{question}\n  before: {before}\n  after:  {after}")
    llm.shutdown()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, GGUF file, hub id or smollm2")
    parser.add_argument("--data", type=Path, required=True, help="JSON file of examples")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--modules", nargs="+", choices=PLACES, default=["q_proj", "k_proj", "v_proj", "o_proj"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0, help="B @ A is multiplied by alpha / rank")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and show what has changed."""
    options = parse_arguments(arguments)
    jax.config.update("jax_platforms", "cpu")
    if options.steps < 2:
        raise SystemExit(f"--steps {options.steps}: use at least 2, for the learning rate rises and falls")
    data = json.loads(options.data.read_text("utf-8"))
    if not data.get("examples") or not data.get("held_out"):
        raise SystemExit(f"{options.data} needs both examples and held_out, neither of them empty")
    checkpoint, load = open_checkpoint(resolve(options.model)), LoadConfig(dtype="float32", runner="generate")
    config = model_config(checkpoint, load)
    loaded = load_model(checkpoint, config, load, EngineConfig())
    source = checkpoint.tokenizer_source
    tokenizer = Tokenizer.from_gguf(source) if isinstance(source, dict) else Tokenizer.from_dir(source)
    examples = encode(tokenizer, data["examples"])
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, max(1, options.steps // 10), options.steps, options.learning_rate / 10
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    lora = draw_lora(config, options.modules, options.rank, options.seed)
    lora = jax.device_put(lora, replicated(loaded.mesh))
    batches = draw_batches(examples, options.batch_size, options.steps, options.seed)
    with jax.set_mesh(loaded.mesh):
        loss = make_loss(config, options.alpha / options.rank)
        lora, _ = train(loss, lora, loaded.params, batches, optimizer)
    save_adapter(options.out, lora, base=options.model, rank=options.rank, alpha=options.alpha)
    show_answers(options.model, options.out, options.rank, data["held_out"])


if __name__ == "__main__":
    main()
