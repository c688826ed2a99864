# `make demo` and `make test` do all of their own set-up, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SET := engines/sets/default
IMAGE := out/demo.png
SHIPPED := engines/sets/default-bf16
CODE := bifrost_rt export benchmarks scenes training tools tests examples
# Modules are compiled when they are first imported: of torch's, most never are.
INSTALL := $(BIN)/pip install --quiet --no-compile
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_INSTALL := $(GPU_BIN)/pip install --quiet --no-compile
GOLDEN := engines/sets/golden
RECORD := benchmarks/results/gpu.json

.PHONY: demo test wheel gpu-checks check clean

demo: $(SET)/manifest.json
	@$(BIN)/bifrost-rt generate "a red circle above a blue square" \
		--engines $(SET) --seed 1 --output $(IMAGE)

# bifrost_rt and export with the demo model's set inside, as it was trained: in bfloat16.
wheel: $(SHIPPED)/manifest.json
	$(BIN)/python tools/wheel.py --demo $(SHIPPED) --output dist

# One thread for torch: its networks are tiny here, and lose more to threads than they gain. One
# process more than cores, up to five: some wait for a server or a lock. A file's tests stay
# together, because they share what they build.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n < 4 ? n + 1 : 5 )))

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" \
		--numprocesses $(WORKERS) --dist loadfile

# On a machine with an NVIDIA GPU: parity, graphs, everything that only a card shows as one record,
# steps at true widths. Without internet: docs/guides/gpu.md.
gpu-checks: $(GPU_VENV)/installed $(GOLDEN)/manifest.json
	$(GPU_BIN)/python -m pytest tests/gpu tests/contract/test_backends.py \
		tests/contract/test_onnxruntime_cuda.py tests/end_to_end/test_golden_cases.py
	test -f $(SET)/manifest.json || $(GPU_BIN)/python -m export.build
	$(GPU_BIN)/python -m benchmarks.gpu_check --engines $(GOLDEN) --engines $(SET) \
		--recordings tests/golden/alpha --json $(RECORD)
	$(GPU_BIN)/python -m benchmarks.gpu --json $(RECORD:.json=-widths.json)

check: $(VENV)/installed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(GPU_VENV) $(SET) $(SHIPPED) $(GOLDEN) out dist

BUILDS := $(VENV)/builds export/recipes/default.toml $(shell find export -name '*.py')

$(SET)/manifest.json: $(BUILDS)
	$(BIN)/python -m export.build --output $(SET)

$(SHIPPED)/manifest.json: $(BUILDS)
	$(BIN)/python -m export.build --precision bf16 --output $(SHIPPED)

$(GOLDEN)/manifest.json: $(GPU_VENV)/installed
	$(GPU_BIN)/python -m export.build --mllm tests/golden/alpha/mllm \
		--bifrost tests/golden/alpha/bifrost --flux tests/golden/alpha/flux \
		--mllm-max-length 48 --t5-max-length 32 --output $(GOLDEN)

# Apart from $(VENV): onnxruntime and onnxruntime-gpu are one module, so the first, which exporting
# asks for, goes again. TensorRT comes from NVIDIA's index where a package is there for the machine.
$(GPU_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_INSTALL) --upgrade pip
	$(GPU_INSTALL) "torch==2.13.0"
	$(GPU_INSTALL) --editable ".[cuda,export,benchmarks,test]"
	-$(GPU_INSTALL) --editable ".[tensorrt-rtx]"
	-$(GPU_INSTALL) --editable ".[tensorrt]"
	$(GPU_BIN)/pip uninstall --quiet --yes onnxruntime
	$(GPU_INSTALL) --force-reinstall --no-deps "onnxruntime-gpu>=1.26"
	touch $@

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
