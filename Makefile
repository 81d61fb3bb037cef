# `make demo` and `make test` work from a fresh clone: they find a Python, make .venv from the locked versions, and run.
# PYTHON=/path/to/python chooses the interpreter that .venv is made with (`make clean` first to change it).
PYTHON :=
RUN := .venv/bin/python
TRAIN := $(RUN) scripts/train_lora.py --model smollm2

.NOTPARALLEL:
.PHONY: help demo train-demo test lint types format lock clean

help:
	@echo 'make demo        ask the embedded model (SmolLM2) and three adapters of it the same questions in the terminal'
	@echo 'make train-demo  train these adapters again (minutes each, on the CPU)'
	@echo 'make test        lint, formatting, types and tests'
	@echo 'make lint        lint and formatting alone'
	@echo 'make format      apply the formatter and the fixes that ruff knows'
	@echo 'make lock        resolve the locked versions in requirements/ again'
	@echo 'make .venv/gpu-compiler.stamp  install what scripts/gpu_programs.py compiles with for a GPU that is not here'
	@echo 'make clean       remove .venv and every cache'

demo: .venv/demo.stamp
	@$(RUN) scripts/demo.py

train-demo: .venv/dev.stamp
	@$(TRAIN) --data scripts/data/pirate.json --out demo/adapters/pirate --steps 120
	@$(TRAIN) --data scripts/data/json.json --out demo/adapters/json --steps 75
	@$(TRAIN) --data scripts/data/one-word.json --out demo/adapters/one-word --steps 75

test: lint types .venv/gpu-compiler.stamp
	@$(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

lint: .venv/dev.stamp
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: .venv/dev.stamp
	@$(RUN) -m pyright

format: .venv/dev.stamp
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

lock: .venv/dev.stamp
	@$(RUN) scripts/lock.py

clean:
	rm -rf .venv .cache .hypothesis .pytest_cache .ruff_cache build dist

.venv/dev.stamp: requirements/demo.txt
.venv/%.stamp: requirements/%.txt pyproject.toml scripts/setup_env.sh
	@bash scripts/setup_env.sh $* $(PYTHON)
