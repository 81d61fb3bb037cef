"""Make the golden data of tests/golden: tiny random Qwen2 checkpoints and what transformers computes on them.

Needs a Python with torch, transformers, gguf, accelerate and numpy; nothing here is needed to run the tests.
    python scripts/make_golden.py                                             # tiny checkpoints, function tables
    python scripts/make_golden.py --only yarn_rope_scaling                    # one case
    python scripts/make_golden.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf   # the real model's ids
tests/golden/README.md describes the files. A case takes the first seed whose data make a fair test (`check_fair`), so a
second run finds the same seeds and writes the same bytes.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from golden_cases import CAUSAL_CASES, EMBEDDING_CASES, ROPE_CONFIGS, SMOLLM2_CONVERSATIONS, CausalCase, EmbeddingCase
from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Model  # pyright: ignore[reportMissingImports]
from transformers.activations import ACT2FN  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding  # pyright: ignore[reportMissingImports]

PROMPT_LENGTHS = (5, 23, 64, 150)
TOP = 8
NEW_TOKENS = 48
SMOLLM2_NEW_TOKENS = 200
MIN_GAP = 1e-3
MAX_ROUNDING = 3e-5
MIN_EFFECT = 1e-3
MIN_DISTINCT = 6
Arrays = dict[str, np.ndarray]


class UnfairCaseError(Exception):
    """The data of this seed would not make a fair test; the next seed is tried."""


def random_weights(shapes: dict[str, torch.Size], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of `dtype`: normal, with a standard deviation of gain / sqrt(inputs); biases 0.5.

    Logits spread by about 0.75 * 4 = 3. Embeddings are small beside the layers' outputs, and the final norm makes up
    for it, because a tied head would otherwise favour repeating the last token.
    """
    generator = torch.Generator().manual_seed(seed)
    gains = {"embed_tokens": 0.75, "lm_head": 0.75, "o_proj": 3.0, "down_proj": 2.0, "q_proj": 1.3, "k_proj": 1.3}
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = (4.0 if name.endswith("model.norm.weight") else 1.0) * (1 + 0.25 * values)
        elif name.endswith("bias"):
            values = 0.5 * values
        else:
            values = values * gains.get(name.split(".")[-2], 1.2) / shape[-1] ** 0.5
        weights[name] = values.to(dtype).contiguous()
    return weights


def write_checkpoint(folder: Path, config: dict[str, Any], model_class: type, prefix: str, seed: int) -> None:
    """Write config.json and model.safetensors with random weights; `prefix` is put before every tensor's name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.device("meta"):
        model = model_class(transformers.Qwen2Config.from_pretrained(folder))
    tied = config["tie_word_embeddings"]
    shapes = {k: v.shape for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    weights = random_weights(shapes, getattr(torch, config.get("torch_dtype") or config["dtype"]), seed)
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, model_class: Any = Qwen2ForCausalLM, **options: Any) -> Any:
    """The checkpoint in float32 with the plain ("eager") attention."""
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()


def random_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """One prompt for each of PROMPT_LENGTHS; the last two ids (bos, eos) are left out."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size - 2, size=n).tolist() for n in PROMPT_LENGTHS]


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """log_softmax of the logits at every position of one uncached pass, [len(ids), V]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The argmax continuation through transformers' own cache; the end-of-sequence token is a token like any other."""
    output, cache, step = [], None, prompt
    for _ in range(new_tokens):
        result = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        step = [int(result.logits[0, -1].argmax())]
        output += step
    return output


def continuation(model: Any, prompt: list[int], new_tokens: int, index: int) -> Arrays:
    """The golden arrays of one prompt, their names ending in `_{index}`; see tests/golden/README.md."""
    tokens = greedy(model, prompt, new_tokens)
    logprobs = log_probabilities(model, prompt + tokens[:-1])
    of_prompt, of_output = logprobs[: len(prompt)], logprobs[len(prompt) - 1 :]
    best = of_output.topk(2)
    if best.indices[:, 0].tolist() != tokens:
        raise UnfairCaseError("the cached and the uncached greedy continuation differ")
    top = of_prompt.topk(TOP)
    following = torch.tensor(prompt[1:])[:, None]
    arrays = {
        "prompt_token_ids": np.array(prompt, np.int32),
        "prompt_logprobs": of_prompt[:-1].gather(1, following)[:, 0].numpy(),
        "top_token_ids": top.indices.numpy().astype(np.int32),
        "top_logprobs": top.values.numpy(),
        "last_logprobs": of_prompt[-1].numpy(),
        "output_token_ids": np.array(tokens, np.int32),
        "output_logprobs": best.values[:, 0].numpy(),
        "output_gaps": (best.values[:, 0] - best.values[:, 1]).numpy(),
    }
    return {f"{name}_{index}": array for name, array in arrays.items()}


def rounding(model: Any, prompts: list[list[int]]) -> float:
    """The largest difference of a log-probability between float32 and float64 matrix products."""
    single = [log_probabilities(model, p) for p in prompts]
    double = [log_probabilities(model.double(), p) for p in prompts]
    model.float()
    return max(float((a - b).abs().max()) for a, b in zip(single, double, strict=True))


def check_fair(facts: dict[str, float]) -> None:
    """Raise UnfairCaseError when right code could fail on the case or wrong code could pass it.

    Greedy choices are MIN_GAP apart and varied, float32 rounding stays far below the tests' 1e-4, and the feature the
    case is about changes the longest prompt's log-probabilities by MIN_EFFECT.
    """
    distinct_enough = facts.get("distinct_output_tokens", MIN_DISTINCT) >= MIN_DISTINCT
    exact_enough = facts.get("float32_rounding", 0.0) < MAX_ROUNDING
    effective = facts.get("effect", MIN_EFFECT) >= MIN_EFFECT
    if not (facts["smallest_gap"] > MIN_GAP and distinct_enough and exact_enough and effective):
        raise UnfairCaseError(str(facts))


def make_causal(folder: Path, case: CausalCase, seed: int) -> dict[str, float]:
    """One FlashQwen2ForCausalLM checkpoint and its golden.npz."""
    write_checkpoint(folder, case.config, Qwen2ForCausalLM, "", seed)
    model = load(folder)
    prompts = random_prompts(case.config["vocab_size"], seed)
    golden: Arrays = {}
    facts: dict[str, float] = {"smallest_gap": float("inf"), "distinct_output_tokens": NEW_TOKENS}
    for index, prompt in enumerate(prompts):
        golden |= continuation(model, prompt, NEW_TOKENS, index)
        facts["smallest_gap"] = min(facts["smallest_gap"], float(golden[f"output_gaps_{index}"].min()))
        distinct = len(set(golden[f"output_token_ids_{index}"].tolist()))
        facts["distinct_output_tokens"] = min(facts["distinct_output_tokens"], distinct)
        check_fair(facts)
    if case.control:
        control = load(folder, config=transformers.Qwen2Config(**case.control))
        difference = log_probabilities(model, prompts[-1]) - log_probabilities(control, prompts[-1])
        facts["effect"] = float(difference.abs().max())
    facts["float32_rounding"] = rounding(model, prompts)
    check_fair(facts)
    np.savez_compressed(folder / "golden.npz", **golden)  # pyright: ignore[reportArgumentType]
    return facts


def hidden_states(model: Any, ids: list[int], is_causal: bool) -> torch.Tensor:
    """Final hidden states of one unpadded input, [len(ids), D].

    The mask is an additive one in four dimensions, which transformers hands to every layer as it is: zeros for
    bidirectional attention, minus infinity above the diagonal for causal.
    """
    mask = torch.full((1, 1, len(ids), len(ids)), -torch.inf if is_causal else 0.0).triu(1).to(model.dtype)
    return model(torch.tensor([ids]), attention_mask=mask, use_cache=False).last_hidden_state[0]


def write_sentence_transformers(folder: Path, case: EmbeddingCase, seed: int) -> torch.nn.Linear | None:
    """Write modules.json and the modules' folders as sentence-transformers lays them out; returns the dense layer."""
    for name, content in case.module_files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if case.embedding_dim is None:
        return None
    dense = torch.nn.Linear(case.config["hidden_size"], case.embedding_dim)
    shapes = {f"linear.{name}": tensor.shape for name, tensor in dense.state_dict().items()}
    weights = random_weights(shapes, torch.float32, seed)
    save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    dense.load_state_dict({name.removeprefix("linear."): tensor for name, tensor in weights.items()})
    return dense


def make_embedding(folder: Path, case: EmbeddingCase, seed: int) -> dict[str, float]:
    """One FlashQwen2ForEmbeddings checkpoint and its golden.npz."""
    write_checkpoint(folder, case.config, Qwen2Model, case.prefix, seed)
    dense = write_sentence_transformers(folder, case, seed)
    model = load(folder, Qwen2Model)
    is_causal = case.config.get("is_causal", True)
    prompts = random_prompts(case.config["vocab_size"], seed)
    golden: Arrays = {}
    effects = []
    for index, ids in enumerate(prompts):
        states = hidden_states(model, ids, is_causal)
        by_config = model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states, by_config, rtol=0, atol=1e-5)
        effects.append(float((states - hidden_states(model, ids, not is_causal)).mean(0).abs().max()))
        pooled = states.mean(0)
        embedding = pooled if dense is None else dense(pooled)
        golden[f"prompt_token_ids_{index}"] = np.array(ids, np.int32)
        golden[f"pooled_{index}"] = pooled.numpy()
        golden[f"embedding_{index}"] = embedding.numpy()
        golden[f"normalized_{index}"] = torch.nn.functional.normalize(embedding, dim=0).numpy()
    np.savez_compressed(folder / "golden.npz", **golden)  # pyright: ignore[reportArgumentType]
    double = [hidden_states(model.double(), ids, is_causal).mean(0).numpy() for ids in prompts]
    error = max(float(np.abs(golden[f"pooled_{index}"] - exact).max()) for index, exact in enumerate(double))
    return {"effect_of_is_causal": min(effects), "float32_rounding": error}


def first_fair_seed(make: Any, folder: Path, case: Any, seeds: range) -> dict[str, Any]:
    """Run `make` with each seed until one is fair; returns the seed and the case's figures."""
    for seed in seeds:
        try:
            return {"seed": seed, **make(folder, case, seed)}
        except UnfairCaseError as error:
            print(f"{folder.name}: seed {seed}: {error}")
    raise SystemExit(f"{folder.name}: none of the seeds {seeds} makes a fair test; change the case's configuration")


def make_functions(file: Path) -> dict[str, int]:
    """Tables of transformers' activations and rotary frequencies, as JSON."""
    x = torch.linspace(-6, 6, 49)
    skipped = {"prelu", "xielu"}  # these have parameters of their own
    activations = {name: ACT2FN[name](x).tolist() for name in sorted(ACT2FN) if name not in skipped}
    ropes = []
    for config in ROPE_CONFIGS:
        rope = Qwen2RotaryEmbedding(transformers.Qwen2Config(**json.loads(json.dumps(config))))
        ropes.append({"config": config, "inv_freq": rope.inv_freq.tolist(), "attention_factor": rope.attention_scaling})
    file.write_text(json.dumps({"x": x.tolist(), "activations": activations, "ropes": ropes}, indent=1) + "\n")
    return {"activations": len(activations), "ropes": len(ropes)}


def make_smollm2(folder: Path, gguf: Path) -> dict[str, float]:
    """SmolLM2-135M-Instruct, de-quantised to float32: golden.npz and texts.json (no weights)."""
    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = load(gguf.parent, AutoModelForCausalLM, gguf_file=gguf.name)
    golden: Arrays = {}
    texts = []
    for index, messages in enumerate(SMOLLM2_CONVERSATIONS):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt)["input_ids"]
        golden |= continuation(model, ids, SMOLLM2_NEW_TOKENS, index)
        del golden[f"last_logprobs_{index}"]
        output = golden[f"output_token_ids_{index}"].tolist()
        answer = output[: output.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in output else None
        texts.append(
            {"messages": messages, "prompt": prompt, "text": tokenizer.decode(output, skip_special_tokens=True)}
            | {"text_with_special_tokens": tokenizer.decode(output), "answer": answer and tokenizer.decode(answer)}
        )
    (folder / "texts.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    np.savez_compressed(folder / "golden.npz", **golden)  # pyright: ignore[reportArgumentType]
    gap = min(float(a.min()) for name, a in golden.items() if name.startswith("output_gaps"))
    check_fair({"smallest_gap": gap})
    if texts[0]["answer"] != "The capital of France is Paris.":
        raise SystemExit(f"smollm2: the answer about France is {texts[0]['answer']!r}")
    return {"smallest_gap": gap}


def main() -> None:
    """Make what the command line names and record it in manifest.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in (*CAUSAL_CASES, *EMBEDDING_CASES)]
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "golden")
    parser.add_argument("--only", action="append", choices=[*names, "functions"], help="this case (may be repeated)")
    parser.add_argument("--smollm2", type=Path, metavar="GGUF", help="make only the smollm2 case, from this file")
    args = parser.parse_args()
    torch.set_num_threads(2 if args.smollm2 else 1)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    manifest = args.out / "manifest.json"
    cases = json.loads(manifest.read_text())["cases"] if manifest.exists() else {}
    wanted = [] if args.smollm2 else (args.only or [*names, "functions"])
    for case in (*CAUSAL_CASES, *EMBEDDING_CASES):
        if case.name in wanted:
            make = make_causal if isinstance(case, CausalCase) else make_embedding
            cases[case.name] = first_fair_seed(make, args.out / case.name, case, range(100))
            print(case.name, cases[case.name])
    if "functions" in wanted:
        cases["functions"] = make_functions(args.out / "functions.json")
    if args.smollm2:
        cases["smollm2"] = make_smollm2(args.out / "smollm2", args.smollm2)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    content = {"date": datetime.date.today().isoformat(), "versions": versions, "cases": dict(sorted(cases.items()))}
    manifest.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
