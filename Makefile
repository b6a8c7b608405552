# The few verbs a person types. `make train` and `make test` are each enough on their own.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PLAY   := playground
SANITIZERS ?= address,undefined thread

.PHONY: setup train test test-slow test-arm test-cuda test-vulkan test-metal sanitize bench bench-gpu gate lint format clean

setup: $(VENV)/.setup ## .venv with the `toy` command in it

$(VENV)/.setup: pyproject.toml CMakeLists.txt $(wildcard native/*/*.cpp native/*/*.h vendor-patches/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: $(VENV)/.setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	@touch $@

train: setup ## make a project in playground/ and train its model there
	test -e $(PLAY)/toy.yml || $(BIN)/toy new $(PLAY)
	cd $(PLAY) && ../$(BIN)/toy train

test: $(VENV)/.test ## everything but the long runs
	$(BIN)/toy install --portable
	for v in native portable; do \
	    $(BIN)/cmake -B build/$$v -DTOY_TESTS=ON && $(BIN)/cmake --build build/$$v && \
	    $(BIN)/ctest --test-dir build/$$v --output-on-failure || exit 1; \
	done
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test ## the long runs: published losses
	$(BIN)/python -m pytest -m slow tests/slow

test-arm: $(VENV)/.test ## the native tests and the gates on ARM: cross-compiled, run by qemu
	$(BIN)/python -m pytest -m slow tests/cpu/test_aarch64.py

test-cuda test-vulkan test-metal: test-%: $(VENV)/.test ## every recipe on a device, against the cpu: what to run on a machine that has one
	$(BIN)/toy install --device $*
	$(BIN)/python -m pytest tests/gpu -k $*

# each in a source of its own that links to this one (TOY_HOME), with its own build/ and libexec/
sanitize: $(VENV)/.test ## the native tests, and each recipe's runner, under the address, undefined-behaviour and thread sanitizers
	for s in $(SANITIZERS); do \
	    export TOY_SANITIZE=$$s TOY_HOME=$(CURDIR)/build/sanitize/$${s%%,*}; \
	    mkdir -p $$TOY_HOME && ln -sfn $(CURDIR)/CMakeLists.txt $(CURDIR)/native $(CURDIR)/vendor-patches $$TOY_HOME && \
	    $(BIN)/toy install && \
	    $(BIN)/cmake -B $$TOY_HOME/build/native -DTOY_TESTS=ON && $(BIN)/cmake --build $$TOY_HOME/build/native && \
	    $(BIN)/ctest --test-dir $$TOY_HOME/build/native --output-on-failure && \
	    $(BIN)/python -m pytest tests/cpu/test_resume_kill.py -k sigterm || exit 1; \
	done

bench: $(VENV)/.test ## toy against PyTorch and llama.cpp, and the GEMM roof, in one run
	$(BIN)/python tests/bench/bench.py

bench-gpu: $(VENV)/.test ## toy on a GPU against PyTorch on the same one, and against itself on the cpu; DEVICE=vulkan: another than cuda
	$(BIN)/python tests/bench/bench_gpu.py --device $(or $(DEVICE),cuda)

gate: setup ## train each recipe and compare its losses with data/gates, byte for byte
	$(BIN)/python -m pytest tests/cpu/test_bytes.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'native/*.cpp' 'native/*.h')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'native/*.cpp' 'native/*.h')

clean: ## forget what was built; runs and data stay
	rm -rf build libexec $(VENV) .pytest_cache .mypy_cache .ruff_cache
