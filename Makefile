# Everything below sets itself up: Python 3.10 or later, pip and make are all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   export the bundled captioner, caption photos, compare PyTorch and ONNX"
	@echo "make test   run the tests"
	@echo "make lint   ruff, mypy and the import contracts"
	@echo "make bench  print and keep the PyTorch-vs-ONNX report of benchmarks/"

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	@echo "installing PyTorch and the rest; the first time takes some minutes"
	$(BIN)/python -m pip install -q -e '.[cpu,tokenizers,export,blip2,train,eval,dev]'
	touch $@

demo: $(VENV)/ready
	rm -rf artifacts/demo
	$(BIN)/capexport lstm --out artifacts/demo
	$(BIN)/capexport caption --model artifacts/demo \
		$$($(BIN)/python -c "from capexport.bench.cli import sample_photos; print(*sample_photos())")
	$(BIN)/capbench --artifact artifacts/demo --repeats 20

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/ready
	$(BIN)/capbench --threads 2 --json benchmarks/results.json --markdown benchmarks/results.md
	$(BIN)/python -m pytest benchmarks

clean:
	rm -rf $(VENV) artifacts/demo dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache
