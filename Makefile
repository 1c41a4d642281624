# Each target makes .venv itself when it is missing and installs only what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
SPEC := pyproject.toml constraints.txt
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet
WORKERS ?= 2
DEMO_ARGS ?=
ZOO_ARGS ?=
PEERS_ARGS ?=
SCALE_ARGS ?=

STEP_ARGS ?=
JOINT_ARGS ?=
METHODS_ARGS ?=
LOW_BITS_ARGS ?=
SALIENCY_ARGS ?=
KERNELS_ARGS ?=
LATENCY_ARGS ?=
PARITY_ARGS ?=
LANGUAGE_ARGS ?=

.PHONY: help demo test check format zoo fuzz clean
.PHONY: bench-step bench-joint bench-methods bench-low-bits bench-saliency bench-kernels bench-peers bench-scale bench-latency bench-parity bench-language bench-predictions bench-criteria

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "geta needs Python 3.11 or newer: set PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/.stamp-core: .venv/bin/python $(SPEC)
	$(PIP) -e . -c constraints.txt
	@touch $@

.venv/.stamp-demo: .venv/bin/python $(SPEC)
	$(PIP) -e '.[demo]' -c constraints.txt
	@touch $@

.venv/.stamp-docs: .venv/bin/python $(SPEC)
	$(PIP) -e '.[docs]' -c constraints.txt
	@touch $@

.venv/.stamp-dev: .venv/bin/python $(SPEC)
	$(PIP) -e '.[dev]' -c constraints.txt
	@touch $@ .venv/.stamp-demo .venv/.stamp-docs .venv/.stamp-core

# The zoo has an environment of its own: torchvision changes what `transformers` imports.
.venv-zoo/.stamp: $(SPEC) zoo-constraints.txt
	test -x .venv-zoo/bin/python || $(PYTHON) -m venv .venv-zoo
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-zoo/bin/python -m pip install --quiet -e '.[zoo]' -c constraints.txt -c zoo-constraints.txt
	@touch $@

# So have the tools that training steps are compared with: they pin other versions than ours.
.venv-peers/.stamp: $(SPEC) peers-constraints.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-peers/bin/python -m pip install --quiet -e '.[peers]' -c peers-constraints.txt
	@touch $@

demo: .venv/.stamp-demo  ## train a dense and a self-compressing network on real digits, compare them (DEMO_ARGS="--epochs 20")
	$(BIN)/geta demo $(DEMO_ARGS)

docs: .venv/.stamp-docs  ## the documentation site, into site/; look at it with `python -m http.server -d site`
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: export OMP_NUM_THREADS = 1
test: .venv/.stamp-dev  ## run all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

check: .venv/.stamp-dev  ## formatting, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

format: .venv/.stamp-dev  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-step: .venv-peers/.stamp  ## time training steps: plain, geta in each stage, other tools, side by side (STEP_ARGS="--only 'vgg*'")
	.venv-peers/bin/python -m bench.step_overhead $(STEP_ARGS)

bench-joint: .venv/.stamp-dev  ## accuracy through the joint stage on digits, four ways of forgetting, three seeds; resumable
	$(BIN)/python -m bench.joint_stage --jobs $(WORKERS) $(JOINT_ARGS)

bench-methods: .venv/.stamp-dev  ## one run against pruning and quantizing one after the other, at equal BOPs; resumable
	$(BIN)/python -m bench.methods --jobs $(WORKERS) $(METHODS_ARGS)

bench-low-bits: .venv/.stamp-dev  ## gradients of the rounding at 2, 3 and 4 bits; resumable
	$(BIN)/python -m bench.low_bits --jobs $(WORKERS) $(LOW_BITS_ARGS)

bench-saliency: .venv/.stamp-dev  ## which sign of the cosine marks unimportant groups
	$(BIN)/python -m bench.saliency_cosine $(SALIENCY_ARGS)

bench-criteria: .venv/.stamp-dev  ## which groups should go: criteria at equal MACs; resumable
	$(BIN)/python -m bench.criteria --jobs $(WORKERS) $(CRITERIA_ARGS)
bench-kernels: .venv/.stamp-dev  ## the compiled quantizers against PyTorch's operators
	$(BIN)/python -m bench.quantizer_kernels $(KERNELS_ARGS)

bench-peers: .venv-zoo/.stamp  ## geta and torch-pruning on torchvision's classifiers, an hour; resumable (PEERS_ARGS="--only '*resnet*'")
	.venv-zoo/bin/python -m bench.versus_torch_pruning $(PEERS_ARGS)

bench-latency: .venv/.stamp-dev  ## dense, pruned, quantized and compact networks in PyTorch and ONNX Runtime; resumable
	$(BIN)/python -m bench.latency $(LATENCY_ARGS)

bench-predictions: .venv/.stamp-dev  ## what latency tables predict beside what is measured, on an idle machine; resumable
	$(BIN)/python -m bench.predictions $(PREDICTIONS_ARGS)
bench-language: .venv/.stamp-dev  ## a Llama on Python's own text, pruned and quantized, hours; resumable
	$(BIN)/python -m bench.language --jobs $(WORKERS) $(LANGUAGE_ARGS)

bench-parity: .venv-zoo/.stamp  ## exported files of 90 networks against PyTorch's fake quantization, an hour; resumable
	.venv-zoo/bin/python -m bench.export_parity --jobs $(WORKERS) $(PARITY_ARGS)

bench-scale: .venv-zoo/.stamp  ## analyse language models of 7 to 70 billion parameters without weights (SCALE_ARGS="--only 'llama-7b*'")
	.venv-zoo/bin/python -m bench.scale $(SCALE_ARGS)

zoo: .venv-zoo/.stamp  ## check every architecture of the zoo, hours; resumable (ZOO_ARGS="--only 'timm/*' --failed")
	.venv-zoo/bin/python -m bench.zoo.run --jobs $(WORKERS) $(ZOO_ARGS)

fuzz: export OMP_NUM_THREADS = 1
fuzz: export GETA_FUZZ_EXAMPLES ?= 5000
fuzz: .venv/.stamp-dev  ## run the property tests with thousands of examples
	$(BIN)/python -m pytest -n $(WORKERS) -q -m fuzz

clean:  ## remove caches and build leftovers, not .venv and not runs/
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info
