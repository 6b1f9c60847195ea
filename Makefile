# Every target makes the environment that it needs (.ci/venv says how); a second run starts at once.
#   PYTHON=/path/to/python  the interpreter to build it with      DEVICE=cpu  go on without a GPU that torch cannot use
#   ARGS="-k attention"     more arguments for the target's tool
VENV := .venv
COMPAT := .venv-compat
BIN := $(VENV)/bin
DEVICE_OPTION := $(if $(DEVICE),--device $(DEVICE))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench gpu-day compat aot clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## train a small model on this machine, check the kernels, show how to use both (about 10 minutes)
	@$(BIN)/tileformer info $(DEVICE_OPTION)
	$(BIN)/tileformer train g2p --output runs/demo --overwrite $(DEVICE_OPTION) $(ARGS)
	$(BIN)/tileformer check --quick $(DEVICE_OPTION)
	@echo && echo "The trained model is in runs/demo. Use it:"
	@echo "  $(BIN)/tileformer generate --checkpoint runs/demo hello tileformer"

test: $(VENV)/.installed ## run the tests (about 10 minutes on 2 cores)
	$(BIN)/pytest -q $(ARGS)

lint: $(VENV)/.installed ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## time the ops and the layers
	$(BIN)/pytest bench --benchmark-only $(ARGS)

gpu-day: $(VENV)/.installed ## all that a new GPU should answer, into runs/gpu-day, at most 25 minutes; DRY=1 tries it without a GPU
	$(BIN)/tileformer bench gpu-day $(if $(DRY),--dry) $(ARGS)

compat: $(COMPAT)/.installed ## run the tests marked `compat` with the oldest supported Triton
	$(COMPAT)/bin/pytest -q -m compat $(ARGS)

aot: $(VENV)/.installed ## compile every kernel for every supported GPU, with none present
	$(BIN)/pytest -q tests -m "aot or aot_full" $(ARGS)

clean: ## remove the environments and everything that was built; runs/ stays
	rm -rf $(VENV) $(COMPAT) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt .ci/venv
	.ci/venv $(VENV)

# Borrows everything from the other environment, and puts an older Triton and numpy in front of it.
$(COMPAT)/.installed: $(VENV)/.installed constraints-compat.txt
	PYTHON=$(BIN)/python .ci/venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -qq --no-deps --ignore-installed -r constraints-compat.txt
