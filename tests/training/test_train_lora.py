"""Training on a tiny model: the loss is that of the model that serves, it falls, and the file holds what was learnt."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qwen2_jax.config import EngineConfig, LoadConfig, ModelConfig
from qwen2_jax.engine.model_loader import LoadedModel, load_model
from qwen2_jax.lora.reader import read_adapter
from qwen2_jax.models.batch import StepBatch
from qwen2_jax.models.ops import POOL
from qwen2_jax.models.weights import open_checkpoint
from qwen2_jax.text.tokenizer import Tokenizer
from scripts import train_lora
from scripts.make_tiny_model import tiny_config, tiny_tensors, write_checkpoint
from scripts.train_lora import PLACES, Batch, LoRA
from tests.engine.processing import tokenizer

RANK, ALPHA = 2, 3.0
LENGTHS, ANSWER = (9, 6), 4
CONFIG = tiny_config(use_sliding_window=True, sliding_window=4, max_window_layers=1)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}:"


def load(folder: Path, tensors: dict[str, np.ndarray]) -> LoadedModel:
    checkpoint = open_checkpoint(write_checkpoint(folder, CONFIG, tensors))
    options = LoadConfig(dtype="float32", use_tqdm_on_load=False)
    return load_model(checkpoint, ModelConfig.from_hf(CONFIG), options, EngineConfig())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model whose second layer has a window."""
    return load(tmp_path_factory.mktemp("tiny"), tiny_tensors(CONFIG))


def draw_lora(config: ModelConfig) -> LoRA:
    """An adapter of every module, with a B that changes something."""
    rng = np.random.default_rng(1)
    return {
        module: update | {"lora_B": jnp.array(rng.normal(0, 0.1, update["lora_B"].shape), jnp.float32)}
        for module, update in train_lora.draw_lora(config, list(PLACES), RANK, seed=0).items()
    }


def draw_batch(vocab_size: int) -> Batch:
    """Two sequences of different lengths whose last tokens are the answer."""
    rng = np.random.default_rng(2)
    ids, is_answer = np.zeros((2, max(LENGTHS)), np.int32), np.zeros((2, max(LENGTHS)), np.float32)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(1, vocab_size, length)
        is_answer[row, length - ANSWER : length] = 1
    return Batch(jnp.array(ids), jnp.array(is_answer))


def serving_loss(loaded: LoadedModel, batch: Batch) -> float:
    """The loss by hand, from the serving model's logits for the sequences without their padding."""
    config, starts = loaded.config, np.array([0, *np.cumsum(LENGTHS)])
    ids = np.concatenate([row[:length] for row, length in zip(np.asarray(batch.input_ids), LENGTHS, strict=True)])
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    rows = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    step = StepBatch(
        input_ids=jnp.array(ids),
        position_ids=jnp.array(positions),
        block_tables=jnp.arange(len(LENGTHS))[:, None],
        slot_mapping=jnp.array(rows * max(LENGTHS) + positions),
        context_lens=jnp.array(LENGTHS),
        query_start_loc=jnp.array(starts),
    )
    shape = (len(LENGTHS), max(LENGTHS), config.num_key_value_heads, config.head_dim)
    pool = jnp.zeros(shape, out_sharding=POOL)
    run = jax.jit(lambda params, *inputs: nnx.merge(loaded.graphdef, params)(*inputs))
    (logits, _), _ = run(loaded.params, step, ((pool, pool),) * config.num_hidden_layers)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    learnt = [at for end in starts[1:] for at in range(end - ANSWER, end)]
    return float(np.mean([-logprobs[at - 1, ids[at]] for at in learnt]))


@pytest.mark.slow
def test_the_loss_is_that_of_the_serving_model_with_the_merged_adapter(loaded: LoadedModel, tmp_path: Path) -> None:
    lora, batch, tensors = draw_lora(loaded.config), draw_batch(loaded.config.vocab_size), tiny_tensors(CONFIG)
    for module, update in lora.items():
        a, b = (np.asarray(update[name]) for name in ("lora_A", "lora_B"))
        tensors[f"model.{module}.weight"] += np.float32(ALPHA / RANK) * b @ a
    merged = load(tmp_path, tensors)
    with jax.set_mesh(loaded.mesh):
        found = jax.jit(train_lora.make_loss(loaded.config, ALPHA / RANK))(lora, loaded.params, batch)
        expected, base = serving_loss(merged, batch), serving_loss(loaded, batch)
    assert abs(expected - base) > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_training_learns_the_answers_and_leaves_the_model_alone(loaded: LoadedModel) -> None:
    before = jax.tree.map(np.asarray, loaded.params)
    lora = train_lora.draw_lora(loaded.config, ["q_proj", "down_proj"], RANK, seed=0)
    batches = [draw_batch(loaded.config.vocab_size)] * 30
    with jax.set_mesh(loaded.mesh):
        loss = train_lora.make_loss(loaded.config, ALPHA / RANK)
        trained, losses = train_lora.train(loss, lora, loaded.params, batches, optax.adamw(0.03))
    assert losses[-1] < losses[0] / 2
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, lora)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, before)


def test_a_saved_adapter_is_read_as_it_was_trained(loaded: LoadedModel, tmp_path: Path) -> None:
    lora = draw_lora(loaded.config)
    train_lora.save_adapter(tmp_path / "new", lora, base="tiny", rank=RANK, alpha=ALPHA)
    adapter = read_adapter(tmp_path / "new", loaded.config)
    assert adapter.num_modules == len(lora) == len(PLACES) * loaded.config.num_hidden_layers
    for (layer, name), update in adapter.linear.items():
        trained = lora[f"layers.{layer}.{PLACES[name][0]}.{name}"]
        assert update.scaling == ALPHA / RANK
        np.testing.assert_array_equal(update.a, np.asarray(trained["lora_A"], np.float16))
        np.testing.assert_array_equal(update.b, np.asarray(trained["lora_B"], np.float16))


def test_only_answers_and_their_ends_are_learnt() -> None:
    chat = Tokenizer(tokenizer().backend, special_tokens=tokenizer().special_tokens, chat_template=TEMPLATE)
    pairs = [("why", "so"), ("who is it", "I")]
    batch = train_lora.encode(chat, [{"question": question, "answer": answer} for question, answer in pairs])
    for (question, answer), ids, learnt in zip(pairs, *(np.asarray(array) for array in batch), strict=True):
        assert chat.decode(ids[learnt == 1]) == f"{answer}<|im_end|>"
        assert chat.decode(ids[: int(learnt.argmax())]) == f"{question}:"


@pytest.mark.parametrize(("size", "steps"), [(2, 6), (5, 3), (8, 1)])
def test_every_example_comes_before_any_comes_again(size: int, steps: int) -> None:
    examples = Batch(jnp.arange(5)[:, None], jnp.ones((5, 1)))
    batches = train_lora.draw_batches(examples, size, steps, seed=0)
    drawn = np.concatenate([np.asarray(batch.input_ids)[:, 0] for batch in batches])
    assert len(batches) == steps and len(drawn) == size * steps
    counts = np.bincount(drawn, minlength=5)
    assert counts.max() - counts.min() <= 1
