"""Make the golden data of tests/golden/adapters: LoRA adapters saved by PEFT, and what PEFT computes with them.

Needs a Python with torch, transformers, peft, accelerate, scipy and numpy, and the checkpoints of make_golden.py;
nothing here is needed to run the tests. Hashes of strings must be fixed, because PEFT writes sets into its configs.
    PYTHONHASHSEED=0 python scripts/make_adapter_golden.py
    PYTHONHASHSEED=0 python scripts/make_adapter_golden.py --only dora
tests/golden/README.md describes the files. A case takes the first seed whose data make a fair test, so a second run
finds the same seeds and writes the same bytes.
"""

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from adapter_cases import BASES, CASES, HARMLESS, MERGES, REFUSED, TRAINED_TOKENS, AdapterCase, MergeCase
from make_golden import MAX_ROUNDING, MIN_GAP, Arrays, UnfairCaseError, continuation, load, log_probabilities, rounding
from peft import LoraConfig, PeftModel, get_peft_model  # pyright: ignore[reportMissingImports]
from peft.tuners.lora import LoraLayer  # pyright: ignore[reportMissingImports]
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper  # pyright: ignore[reportMissingImports]

PROMPT_LENGTHS = (9, 40)
NEW_TOKENS = 24
MIN_EFFECT = 0.05
KEPT = ("prompt_token_ids", "prompt_logprobs", "output_token_ids", "output_logprobs", "output_gaps")
# Standard deviations of what training would have changed, by the end of the parameter's name.
NOISE = {"lora_A": 0.08, "lora_B": 0.08, "lora_embedding_A": 0.08, "lora_embedding_B": 0.08, "bias": 0.3, "score": 0.3}


def make_prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """One prompt for each of PROMPT_LENGTHS; TRAINED_TOKENS are among each one's first tokens."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab_size - 2, size=length).tolist() for length in PROMPT_LENGTHS]
    for prompt in prompts:
        prompt[1 : 2 * len(TRAINED_TOKENS) : 2] = TRAINED_TOKENS
    return prompts


def perturb(model: Any, seed: int, dtype: torch.dtype) -> None:
    """Change every trainable parameter by noise, so that each has an effect, and store it in `dtype`.

    DoRA's magnitudes, full matrices and token rows are scaled or shifted by a share of their own size.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        noise = torch.randn(parameter.shape, generator=generator)
        kind = next((kind for kind in NOISE if kind in name.split(".")), None)
        if kind is not None:
            parameter += NOISE[kind] * noise
        elif "lora_magnitude_vector" in name:
            parameter *= 1 + 0.2 * noise
        else:
            parameter += 0.4 * parameter.std() * noise
        # Only what PEFT saves; a tied parameter keeps sharing its storage.
        parameter.copy_(parameter.to(dtype))


def save(model: Any, folder: Path, dtype: torch.dtype, **options: Any) -> None:
    """Save with PEFT, its tensors in `dtype`, without the model card."""
    if dtype != torch.float32:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, **options)
    (folder / "README.md").unlink(missing_ok=True)


def load_base(base: str, case: AdapterCase) -> Any:
    """The model that the case's adapter is for; a classifier's head is random."""
    if case.num_labels is None:
        return load(Path(base))
    return load(Path(base), transformers.Qwen2ForSequenceClassification, num_labels=case.num_labels)


def train(base: str, case: AdapterCase, folder: Path, seed: int) -> Any:
    """Write the adapter's folder as after a training; returns the model that was saved."""
    torch.manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    model = get_peft_model(load_base(base, case), LoraConfig(**case.options))
    if not case.converted:
        perturb(model, seed, dtype)
        save(model, folder, dtype, save_embedding_layers="auto" if case.copies else False)
        return model
    with tempfile.TemporaryDirectory() as initial:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(Path(initial) / "start")
        model.peft_config["default"].init_lora_weights = case.options["init_lora_weights"]
        perturb(model, seed, dtype)
        expected = log_probabilities(model, list(range(20)))
        save(model, folder, dtype, path_initial_model_for_weight_conversion=str(Path(initial) / "start"))
    converted = log_probabilities(PeftModel.from_pretrained(load(Path(base)), folder).eval(), list(range(20)))
    torch.testing.assert_close(converted, expected, rtol=0, atol=1e-4)
    return model


def probe(size: int) -> torch.Tensor:
    """The vector that every effective weight is multiplied with, [size], float64."""
    return torch.from_numpy(np.sin(np.arange(1, size + 1)))


def effective_weights(model: Any) -> Arrays:
    """What each adapted module computes with, by `{name} {what}`; `weight` is multiplied with the probe, [out].

    Everything is PEFT's: its delta, its merge of a DoRA module, its copies, its token rows.
    """
    arrays: Arrays = {}
    for name, module in model.get_base_model().named_modules():
        name = name.removeprefix("model.")
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            weight = base.weight.data.clone()
            variant = module.lora_variant.get("default")
            weight = variant.merge_safe(module, "default", weight) if variant else weight
            weight = weight if variant else weight + module.get_delta_weight("default")
            bias = getattr(base, "bias", None)
            if module.lora_bias.get("default"):
                bias = (0 if bias is None else bias) + module.scaling["default"] * module.lora_B["default"].bias
        elif isinstance(module, ModulesToSaveWrapper):
            weight, bias = module.modules_to_save["default"].weight, None
        elif isinstance(module, TrainableTokensWrapper):
            weight, bias = module.token_adapter.get_merged_weights(["default"]), None
        elif model.peft_config["default"].bias == "all" and name.endswith("_proj"):
            weight, bias = None, module.bias
        else:
            continue
        if weight is not None:
            arrays[f"{name} weight"] = (weight.double() @ probe(weight.shape[1])).float().numpy()
        if bias is not None:
            arrays[f"{name} bias"] = bias.numpy().copy()
    return arrays


def expected(model: Any, base_model: Any, seed: int) -> tuple[Arrays, dict[str, float]]:
    """The golden arrays and the case's figures; raises UnfairCaseError as make_golden.check_fair does."""
    prompts = make_prompts(base_model.config.vocab_size, seed)
    arrays: Arrays = {}
    for index, prompt in enumerate(prompts):
        found = continuation(model, prompt, NEW_TOKENS, index)
        arrays |= {name: array for name, array in found.items() if name.rpartition("_")[0] in KEPT}
    gap = min(float(arrays[f"output_gaps_{index}"].min()) for index in range(len(prompts)))
    change = [(log_probabilities(model, p) - log_probabilities(base_model, p)).abs().max() for p in prompts]
    facts = {"smallest_gap": gap, "effect": float(min(change))}
    if gap <= MIN_GAP or facts["effect"] < MIN_EFFECT:
        raise UnfairCaseError(str(facts))
    before = effective_weights(model)
    facts["float32_rounding"] = rounding(model, prompts)
    if facts["float32_rounding"] >= MAX_ROUNDING:
        raise UnfairCaseError(str(facts))
    return arrays | before, facts


def expected_logits(model: Any, base_model: Any, seed: int) -> tuple[Arrays, dict[str, float]]:
    """What `expected` gives, of a classifier; `effect` is what the adapter changes beside its head."""
    arrays: Arrays = {}
    facts = {"effect": float("inf"), "float32_rounding": 0.0}
    prompts = make_prompts(base_model.config.vocab_size, seed)
    head = model.get_base_model().score.modules_to_save["default"].weight
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        logits = model.float()(ids).logits[0]
        arrays |= {f"prompt_token_ids_{index}": np.array(prompt), f"logits_{index}": logits.numpy()}
        of_base = head @ base_model.model(ids).last_hidden_state[0, -1]
        facts["effect"] = min(facts["effect"], float((logits - of_base).abs().max()))
        difference = float((model.double()(ids).logits[0] - logits).abs().max())
        facts["float32_rounding"] = max(facts["float32_rounding"], difference)
        model.float()
    if facts["effect"] < MIN_EFFECT or facts["float32_rounding"] >= MAX_ROUNDING:
        raise UnfairCaseError(str(facts))
    return arrays, facts


def make_case(base: str, case: AdapterCase, folder: Path, seed: int) -> dict[str, float]:
    """One adapter's folder, read back by PEFT on a fresh base, and its golden.npz, or logits.npz of a classifier."""
    shutil.rmtree(folder, ignore_errors=True)
    trained = train(base, case, folder, seed)
    base_model = load(Path(base))
    model = PeftModel.from_pretrained(load_base(base, case), folder).eval()
    arrays, facts = (expected if case.num_labels is None else expected_logits)(model, base_model, seed)
    if not case.converted:
        prompt = make_prompts(base_model.config.vocab_size, seed)[1]
        torch.testing.assert_close(log_probabilities(trained.float().eval(), prompt), log_probabilities(model, prompt))
    file = "golden.npz" if case.num_labels is None else "logits.npz"
    np.savez_compressed(folder / file, **arrays)  # pyright: ignore[reportArgumentType]
    return facts


def make_merge(base: str, merge: MergeCase, folder: Path, seed: int) -> dict[str, float]:
    """One merged adapter, saved by PEFT, and its golden.npz."""
    shutil.rmtree(folder, ignore_errors=True)
    first, *others = merge.adapters
    model = PeftModel.from_pretrained(load(Path(base)), folder.parent / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder.parent / name, adapter_name=name)
    model.add_weighted_adapter(list(merge.adapters), merge.weights, "merged", merge.combination_type)
    model.save_pretrained(folder, selected_adapters=["merged"])
    for path in (folder / "merged").iterdir():
        path.rename(folder / path.name)
    (folder / "merged").rmdir()
    (folder / "README.md").unlink(missing_ok=True)
    loaded = PeftModel.from_pretrained(load(Path(base)), folder).eval()
    arrays, facts = expected(loaded, load(Path(base)), seed)
    np.savez_compressed(folder / "golden.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return facts


def write_config(folder: Path, options: dict[str, Any]) -> None:
    """Write an adapter_config.json alone; a pair stands for an instance of one of PEFT's own config classes."""
    shutil.rmtree(folder, ignore_errors=True)
    built = {
        name: getattr(peft.tuners.lora.config, value[0])(**value[1]) if isinstance(value, tuple) else value
        for name, value in options.items()
    }
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    LoraConfig(**(defaults | built), inference_mode=True).save_pretrained(folder)


def first_fair_seed(make: Any, base: str, case: Any, folder: Path) -> dict[str, Any]:
    """Run `make` with each seed until one is fair; returns the seed and the case's figures."""
    for seed in range(case.first_seed, case.first_seed + 100):
        try:
            return {"seed": seed, **make(base, case, folder, seed)}
        except UnfairCaseError as error:
            print(f"{base}/{case.name}: seed {seed}: {error}")
    raise SystemExit(f"{base}/{case.name}: none of 100 seeds makes a fair test; change the case")


def main() -> None:
    """Make what the command line names and record it in adapters/manifest.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in (*CASES, *MERGES)]
    parser.add_argument("--golden", type=Path, default=Path(__file__).parent.parent / "tests" / "golden")
    parser.add_argument("--only", action="append", choices=[*names, "configs"], help="this case (may be repeated)")
    args = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        raise SystemExit("set PYTHONHASHSEED=0: PEFT writes sets into its configs in the order of their hashes")
    # The base's name in each config is what it was loaded by, so that is relative.
    os.chdir(args.golden)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    manifest = Path("adapters", "manifest.json")
    cases = json.loads(manifest.read_text())["cases"] if manifest.exists() else {}
    wanted = args.only or [*names, "configs"]
    for case in (*CASES, *MERGES):
        for base in BASES if case.name in wanted else ():
            if isinstance(case, AdapterCase) and base not in case.bases:
                continue
            make = make_case if isinstance(case, AdapterCase) else make_merge
            name = f"{base}/{case.name}"
            cases[name] = first_fair_seed(make, base, case, Path("adapters", name))
            print(name, cases[name])
    for folder, configs in (("refused", REFUSED), ("harmless", HARMLESS)) if "configs" in wanted else ():
        for name, options in configs.items():
            write_config(Path("adapters", folder, name), options)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    versions["peft"] = peft.__version__
    content = {"date": datetime.date.today().isoformat(), "versions": versions, "cases": dict(sorted(cases.items()))}
    manifest.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
