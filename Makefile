# Two commands on a fresh machine do everything: `make demo` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A virtual environment with the lowest versions that pyproject.toml allows, and the tests that meet most of what the
# libraries are asked for: readers, engines, checkpoints, training, export, the command lines.
LOWEST := .venv-lowest
LOWEST_INSTALLED := $(LOWEST)/.installed
LOWEST_TESTS := tests/test_lowest.py \
	$(addprefix tests/train/test_,checkpoint.py torch_file.py hostile_checkpoints.py backbone.py backbone_args.py \
		config.py config_check.py official.py golden.py fit.py perceptual.py) \
	$(addprefix tests/export/test_,graph.py precision.py) \
	$(addprefix tests/runtime/test_,engines.py openvino_engine.py dicom_reader.py nifti_reader.py image_reader.py \
		pixel_metrics.py preprocess.py)

DEMO_DATA := build/demo/data
RESULTS := build/demo/results

# glibc gives large blocks back to the system after every use; training on a CPU then spends a fifth of its time
# on page faults. These settings keep them.
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=500000000

.PHONY: help demo demo-train demo-spread reproduce bench bench-gpu test test-lowest lint format clean

help:
	@echo "make demo         find lesions in brain slices with a certified engine (no GPU, no download of weights)"
	@echo "make test         prove that the checkout is sound: format, lint, types, tests"
	@echo "make test-lowest  the demo and a selection of tests on the lowest versions that pyproject.toml allows"
	@echo "make demo-train   make the demo's weights again, from scratch (hours)"
	@echo "make demo-spread  measure the demo on three data seeds, and in every format"
	@echo "make reproduce DATA=DIR  the published tables with our column, on the BMAD data sets in DIR (days, on a GPU)"
	@echo "make bench        the full BraTS model on this processor, as in the rows that are committed (an hour)"
	@echo "make bench-gpu    what is fast on a CUDA device; ARGS=\"--device cpu --preset demo ...\" tries it without one"
	@echo "make clean        remove build/"

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) not found; name a Python 3.11 or newer: make PYTHON=python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m demo.run

demo-train: $(INSTALLED)
	$(BIN)/python -m demo.dataset --out $(DEMO_DATA)
	$(KEEP_MEMORY) $(BIN)/python -m demo.pretrain encoder --data $(DEMO_DATA) --out qfae_train/presets/demo_encoder.safetensors
	$(KEEP_MEMORY) $(BIN)/python -m demo.pretrain perceptual --data $(DEMO_DATA) --out qfae_train/presets/demo_perceptual.safetensors
	$(KEEP_MEMORY) $(BIN)/qfae-train --preset demo --epochs 32 --validate-every 1 --data $(DEMO_DATA) \
		--out build/demo/train/demo.pt --overwrite
	cp build/demo/train/demo.pt demo/weights/demo.pt
	$(MAKE) demo-spread

demo-spread: $(INSTALLED)
	$(BIN)/python -m demo.spread

# CKPTS="BraTS2021=brain/last_ckpt.pth ..." takes checkpoints in place of training; ARGS go to benchmarks.reproduce.
reproduce: $(INSTALLED)
	@test -n "$(DATA)" || { echo "make: name the data: make reproduce DATA=DIR" >&2; exit 2; }
	$(BIN)/python -m benchmarks.reproduce --data "$(DATA)" $(foreach one,$(CKPTS),--ckpt $(one)) $(ARGS)

# Rows and page go to build/bench; the rows worth keeping are committed by hand, under benchmarks/results.
bench: $(INSTALLED)
	$(BIN)/qfae-bench --preset brats --random-weights 0 --batches 1,4 --rounds 3 --longest 60 --files 8 \
		--against torch-plain,torch,torch-bf16,onnxruntime,onnxruntime-int8,openvino,openvino-bf16,openvino-int8 \
		--out build/bench $(ARGS)

# A machine with a GPU often comes with a Python of its own that has torch; then no virtual environment is made.
bench-gpu:
	$(if $(wildcard $(INSTALLED)),$(BIN)/python,$(PYTHON)) -m benchmarks.speed.gpu $(ARGS)

# Two processes, each with half of the files; the first to be done takes over from the other.
test: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

$(LOWEST_INSTALLED): pyproject.toml tests/lowest.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(PYTHON) tests/lowest.py export openvino medical demo test > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install --quiet --requirement $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install --quiet --no-deps --editable .
	@touch $@

test-lowest: $(LOWEST_INSTALLED)
	$(LOWEST)/bin/python -m demo.run --build build/lowest
	$(LOWEST)/bin/pytest $(LOWEST_TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build
