# Every verb sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
GPU_TESTS = $(sort $(shell grep -l 'mark\.gpu' tests/test_*.py) $(patsubst %,tests/test_%.py,exact partial resume stream_order))

.PHONY: install demo test faults test-gpu lint types bench docs clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

faults: $(READY)
	$(BIN)/python -m pytest -q tests/faults

# All that is marked gpu, and what drives the engine from end to end where no device is named; says what it skips.
test-gpu:
	$(PYTHON) -m pytest -q -rs -m "not slow" $(GPU_TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/streaming_cpu.py
	$(BIN)/python benchmarks/memory_cpu.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/promise.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/traffic.py --plot docs/traffic.svg

docs: $(READY)
	$(BIN)/python docs/check_links.py
	$(BIN)/python docs/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv build dist demo site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
