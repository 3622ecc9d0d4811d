# Everything below sets itself up: Python 3.10 or later, pip and make are all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLICKR8K ?= flickr8k

.PHONY: help demo test lint bench clean

help:
	@echo "make demo   export the bundled captioner, caption photos, compare PyTorch and ONNX"
	@echo "make test   run the tests"
	@echo "make lint   ruff, mypy and the import contracts"
	@echo "make bench FLICKR8K=DIR"
	@echo "            measure anew what benchmarks/README.md shows, but for BLIP-2 at full size,"
	@echo "            BLIP-2 trained, and GPUs: about an hour"

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	@echo "installing PyTorch and the rest; the first time takes some minutes"
	$(BIN)/python -m pip install -q -e '.[cpu,tokenizers,export,blip2,train,eval,ray,serve,dev]'
	touch $@

demo: $(VENV)/ready
	rm -rf artifacts/demo
	$(BIN)/capexport lstm --out artifacts/demo
	$(BIN)/capexport caption --model artifacts/demo \
		$$($(BIN)/python -c "from capexport.bench.cli import sample_photos; print(*sample_photos())")
	$(BIN)/capbench --artifact artifacts/demo capexport/default --repeats 20
	@echo "to see it in a browser: $(BIN)/capexport serve; the page that needs no server:"
	@echo "$(BIN)/capexport web --out site, then $(BIN)/capexport serve --site site"

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/ready
	$(BIN)/python -m pip install -q -e '.[peers]'
	$(BIN)/python -m train.data --data $(FLICKR8K) --split test | $(BIN)/capbench --peers \
		--photos - --references $(FLICKR8K)/captions.txt --threads 2 --batch-sizes 1 32 --repeats 20 \
		--json benchmarks/results.json --markdown benchmarks/results.md \
		--picture benchmarks/ratios.png
	$(BIN)/python benchmarks/bulk.py --photos $(FLICKR8K)/Images --threads 2 \
		--markdown benchmarks/bulk.md --json benchmarks/bulk.json
	$(BIN)/python benchmarks/bulk.py --photos $(FLICKR8K)/Images --threads 2 --megapixels 12 \
		--count 64 --batch-size 8 --rounds 3 --files 0 \
		--markdown benchmarks/bulk_12mp.md --json benchmarks/bulk_12mp.json
	$(BIN)/python benchmarks/growth.py --photos $(FLICKR8K)/Images \
		--files 10 100 1000 10000 100000 \
		--markdown benchmarks/growth.md --picture benchmarks/growth.png
	$(BIN)/python benchmarks/serve.py --photos $(FLICKR8K)/Images --markdown benchmarks/serve.md
	$(BIN)/python benchmarks/cluster.py --photos $(FLICKR8K)/Images --markdown benchmarks/cluster.md
	$(BIN)/python benchmarks/operators.py --markdown benchmarks/operators.md
	$(BIN)/python benchmarks/blip2_peers.py --markdown benchmarks/blip2_peers.md
	$(BIN)/python benchmarks/blip2_peers.py --dims small --layers 12 --parts beams --repeats 10 \
		--markdown benchmarks/blip2_beams.md
	$(BIN)/python benchmarks/products.py --markdown benchmarks/products.md
	$(BIN)/python benchmarks/backbones.py --markdown benchmarks/backbones.md
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python -m pytest benchmarks

clean:
	rm -rf $(VENV) artifacts/demo dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache
