# `make demo` and `make test` do all of their own set-up, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SET := engines/sets/default
PICTURE := out/demo.png
CODE := bifrost_rt export benchmarks scenes training tests examples
# Modules are compiled when they are first imported: of torch's, most never are.
INSTALL := $(BIN)/pip install --quiet --no-compile

.PHONY: demo test gpu-checks check clean

demo: $(SET)/manifest.json
	@$(BIN)/bifrost-rt generate "a red circle above a blue square" \
		--engines $(SET) --seed 1 --output $(PICTURE)

# One thread for torch: its networks are tiny here, and lose more to threads than they gain. A file's
# tests stay together, because they share what they build.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" \
		--numprocesses auto --maxprocesses 4 --dist loadfile

# On a machine with an NVIDIA GPU, whose extra is installed: parity, graphs, steps at true widths.
gpu-checks: $(VENV)/installed
	$(BIN)/python -m pytest tests/gpu tests/contract/test_backends.py \
		tests/end_to_end/test_golden_cases.py
	$(BIN)/python -m benchmarks.gpu --json benchmarks/results/gpu.json

check: $(VENV)/installed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(SET) out

$(SET)/manifest.json: engines/default.toml $(VENV)/builds $(shell find export -name '*.py')
	$(BIN)/python -m export.build engines/default.toml

# What builds a set and draws with it; torch first and alone: whatever depends on it then finds the
# pinned version installed.
$(VENV)/builds: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) "torch==2.13.0"
	$(INSTALL) --editable ".[cpu,export]"
	touch $@

# What the tests need beside that.
$(VENV)/installed: $(VENV)/builds
	$(INSTALL) --editable ".[cpu,openvino,export,benchmarks,serve,ray,test]"
	@# compiles for RTX cards; where there is no package for a machine, its tests are skipped
	-$(INSTALL) --editable ".[tensorrt-rtx]"
	touch $@
