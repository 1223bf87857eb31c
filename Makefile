# make smoke / make test: each installs what it needs into VENV the first time, then does its job.

# A Python 3.10 to 3.14 with venv: TorchRec's wheels exist for these. Ours to choose unless given: make PYTHON=... test
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV ?= .venv
# An image is for the machines of a cluster, not for this one: cuda unless DEVICE is given.
IMAGE_DEVICE := $(or $(DEVICE),cuda)
# cuda where an NVIDIA driver is found, else cpu; fbgemm's CUDA build does not import without that library.
DEVICE ?= $(shell $(or $(PYTHON),false) -c 'import ctypes; ctypes.CDLL("libnvidia-ml.so.1")' 2>/dev/null \
	&& echo cuda || echo cpu)
# Address of another package index to take torch from. The default index has, for x86-64 Linux, a CUDA build of several
# GB, which runs on a CPU too; PyTorch's own CPU index has a CPU build of 0.2 GB: make TORCH_INDEX=<its address> smoke
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Test files that run at a time, each with the CPU time of about one core.
TEST_JOBS ?= 2
# make image: its name and tag, what builds it (docker, podman or buildah, the first that works), further options for
# that, further packages in the image (boto3), and another image to start from than the Dockerfile's.
IMAGE ?= fuxi-torchrec:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' fuxi_torchrec/__init__.py)
ENGINE ?=
ENGINE_ARGS ?=
EXTRAS ?=
BASE ?=
# The documentation's tools have an environment of their own: none of them belongs into the product's.
DOCS_VENV := .venv-docs
PEERS_VENV := .venv-peers

PYTHON := $(PYTHON)
DEVICE := $(DEVICE)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(DEVICE)
OTHER_FBGEMM := $(if $(filter cuda,$(DEVICE)),fbgemm-gpu-cpu,fbgemm-gpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install smoke test quick sanitize narrow arm slurm kubernetes image peers lint types docs clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) DEVICE=$(DEVICE) TORCH_INDEX=$(TORCH_INDEX) PYTEST_ARGS=$(PYTEST_ARGS) TEST_JOBS=$(TEST_JOBS)"
	@echo "Of make image: IMAGE=$(IMAGE) DEVICE=$(IMAGE_DEVICE) ENGINE=$(ENGINE) ENGINE_ARGS=$(ENGINE_ARGS) EXTRAS=$(EXTRAS) BASE=$(BASE)"

install: $(INSTALLED)  ## the virtual environment alone

smoke: $(INSTALLED)  ## train, evaluate and recommend on generated MovieLens-like data (minutes, no download of data)
	$(BIN)/python -m benchmarks.smoke

# In the order of the folders: by default the files with the fewest tests, which take the longest, would come last.
test: $(INSTALLED)  ## the tests
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --durations=10 $(PYTEST_ARGS)

quick: lint types  ## between edits: lint, contracts, types and the fast tests
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile -m "not thorough and not slow and not slurm and not kubernetes and not arm" $(PYTEST_ARGS)

# The sanitizers' libraries come before everything that the process loads; what Python never gives back is no leak of ours.
SANITIZED = LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 PYTHONPATH=. \
	FUXI_TORCHREC_NATIVE_FLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"

sanitize: $(INSTALLED)  ## the C kernels under AddressSanitizer and UBSan: their tests and random cases (minutes)
	$(SANITIZED) $(BIN)/python -m pytest -q -s tests/ops/test_native.py tests/ops/test_native_edges.py \
		tests/ops/test_linear_mixing.py tests/ops/test_sampled_softmax.py $(PYTEST_ARGS)
	$(SANITIZED) $(BIN)/python -m tests.helpers.native_cases 100

narrow: $(INSTALLED)  ## the numeric tests with the vectors of processors without AVX-512, and without AVX
	for flag in -mno-avx512f -mno-avx; do MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
		FUXI_TORCHREC_NATIVE_FLAGS=$$flag $(BIN)/python -m pytest -q tests/ops tests/encoders/test_golden.py \
		$(PYTEST_ARGS) || exit 1; done

# Debian's compiler and emulator are installed where that is possible and they are missing.
arm: $(INSTALLED)  ## the C kernels compiled for aarch64 and run by an emulator (needs Debian's packages, else skipped)
	@command -v aarch64-linux-gnu-gcc >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& timeout 240 sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc-aarch64-linux-gnu \
		libc6-dev-arm64-cross qemu-user' >/dev/null 2>&1; } || echo "no compiler and emulator for aarch64 could be installed"
	timeout 120 $(BIN)/python -m pytest -q -rs -m arm tests/ops $(PYTEST_ARGS)

slurm: $(INSTALLED)  ## tests on a real Slurm of two nodes, brought up here (needs root and apt, else skipped)
	timeout --signal=INT --kill-after=60 1200 \
		$(BIN)/python -m pytest -q -rs -m slurm --durations=10 tests/launch $(PYTEST_ARGS)

# An interrupted run still deletes what it has made there.
kubernetes: $(INSTALLED)  ## tests on the cluster with Volcano that KUBECONFIG names, else skipped (docs/kubernetes.md)
	timeout --signal=INT --kill-after=120 5400 \
		$(BIN)/python -m pytest -q -rs -m kubernetes --durations=10 tests/launch/test_kubernetes_cluster.py $(PYTEST_ARGS)

# `version`: docker's fails where its daemon does not answer.
image:  ## the container image (docs/kubernetes.md), by docker, podman or buildah, whichever is there
	@case "$(IMAGE_DEVICE)" in cpu|cuda) ;; *) echo "error: DEVICE=$(IMAGE_DEVICE): must be cpu or cuda" >&2; exit 1;; esac
	@for engine in $(or $(ENGINE),docker podman buildah); do $$engine version >/dev/null 2>&1 || continue; \
		echo "Building $(IMAGE) for $(IMAGE_DEVICE) with $$engine ..."; \
		exec $$engine build --tag "$(IMAGE)" --build-arg DEVICE=$(IMAGE_DEVICE) \
			$(if $(TORCH_INDEX),--build-arg TORCH_INDEX="$(TORCH_INDEX)") $(if $(EXTRAS),--build-arg EXTRAS="$(EXTRAS)") \
			$(if $(BASE),--build-arg BASE="$(BASE)") $(ENGINE_ARGS) .; done; \
		echo "error: $(or $(ENGINE),docker podman buildah): nothing here that can build an image (docker needs its daemon);" \
			"install one: apt install buildah" >&2; exit 1

lint: $(INSTALLED)  ## ruff, and the contract of who may import whom (pyproject.toml)
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports --no-logo

types: $(INSTALLED)  ## mypy over the library, the data pipelines and the launcher
	$(BIN)/mypy

docs: $(DOCS_VENV)/.installed  ## the documentation as a site with search, into site/ (in an environment of its own)
	@$(DOCS_VENV)/bin/python docs/assemble.py build/docs
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "The site is in site/; read it with: python3 -m http.server --directory site"

# What RecTools needs is no part of the product's environment.
peers: $(INSTALLED) $(PEERS_VENV)/.installed  ## FuXi-β beside RecTools' SASRec and HSTU on data/ml-1m, ten minutes each (an idle machine)
	$(BIN)/python -m benchmarks.peers data/ml-1m --python $(PEERS_VENV)/bin/python

clean:  ## remove the virtual environment and caches (also what to do before another PYTHON is used)
	rm -rf $(if $(wildcard $(VENV)/pyvenv.cfg),$(VENV)) $(DOCS_VENV) $(PEERS_VENV) build site *.egg-info .pytest_cache .ruff_cache \
		.mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again. A new top-level package needs its place in
# the editable installation, hence the __init__ files. Both builds of fbgemm fill the same folder,
# and torch differs too: after a change of DEVICE the environment starts empty.
$(INSTALLED): setup.py pyproject.toml $(wildcard */__init__.py) $(filter-out %/docs.txt %/peers.txt,$(wildcard requirements/*.txt))
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.14 with the venv module found; name one: make PYTHON=/path/to/python3.11" \
		"(Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@case "$(DEVICE)" in cpu|cuda) ;; *) echo "error: DEVICE=$(DEVICE): must be cpu or cuda" >&2; exit 1;; esac
	@echo "Installing the $(DEVICE) build of TorchRec and its pinned dependencies into $(VENV) with $(PYTHON) ..."
	@rm -f $(VENV)/.installed-*
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null || $(PIP) show $(OTHER_FBGEMM) 2>/dev/null; then \
		$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV); fi
	@$(PIP) install pip==26.3
	@$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/base.txt \
		-r requirements/launch.txt -r requirements/dev.txt
	@$(PIP) install --no-deps -r requirements/$(DEVICE).txt
	@PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(PEERS_VENV)/.installed: requirements/peers.txt
	@test -n "$(PYTHON)" || { echo "error: no Python found; name one: make PYTHON=/path/to/python3.11 peers" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(PEERS_VENV)
	@$(PEERS_VENV)/bin/python -m pip --disable-pip-version-check --quiet install \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/peers.txt
	@touch $@

$(DOCS_VENV)/.installed: requirements/docs.txt
	@test -n "$(PYTHON)" || { echo "error: no Python found; name one: make PYTHON=/path/to/python3.11 docs" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements/docs.txt
	@touch $@
