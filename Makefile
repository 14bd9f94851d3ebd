# Everything needed is installed into .venv; only git, make and Python 3.11+ are assumed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
comma := ,
EXTRAS := dev$(if $(filter Linux,$(shell uname -s)),$(comma)cpu)$(if $(GGML),$(comma)ggml)

# llama.cpp is built from source: without what reads images, and on Intel and AMD without AMX,
# which GCC 12 compiles so that it crashes.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
BUILD := $(if $(GGML),CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" $(if $(filter Linux_x86_64,$(shell uname -sm | tr ' ' _)),CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)"))

.PHONY: install demo test test-fleet lint proto proto-check bench soak clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unicluster needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing into $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(BUILD) $(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/unicluster demo $(if $(PROMPT),"$(PROMPT)")

test: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/pytest -q tests --ignore tests/fleet

# Whole hosts, booted on this one: on Linux, as root, with debootstrap and systemd-nspawn.
test-fleet: $(STAMP)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/pytest -q -s -x -rs tests/fleet

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd ansible && PATH=$(abspath $(BIN)):$$PATH ANSIBLE_HOME=$(abspath $(VENV))/ansible ansible-lint --offline -q

# The generated stubs are committed; proto-check proves them fresh.
proto: $(STAMP)
	$(BIN)/python proto/generate.py .

proto-check: $(STAMP)
	$(BIN)/python proto/generate.py --check

# The small set: hops, lanes, and a deployment through its clients beside mlx-lm and its pipeline.
bench: $(STAMP)
	$(BIN)/python -m bench.hop
	$(BIN)/python -m bench.lanes --size 10M --rounds 1
	$(BIN)/python -m bench.models build/bench/qwen2-10m --kind qwen2
	$(BIN)/unicluster bench --local 2 build/bench/qwen2-10m

# Hundreds of requests of all kinds, in some minutes: does each end rightly, and is nothing left?
soak: $(STAMP)
	$(BIN)/python -m bench.soak

clean:
	rm -rf $(VENV) build *.egg-info
