# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
# Both create .venv and install what they need; nothing outside this folder is touched.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test slow lint types format clean

demo: .venv/installed
	$(BIN)/subspan sweep --net mlp --data digits --methods hash --dims 10,30,100,200,400,1000 \
		--seeds 3 --epochs 20 --batch-size 64 --baseline-lrs 0.003 --out $(DEMO)

# Two at a time, of one thread each: more threads than cores wait for each other.
test: .venv/installed .venv/triton
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: with it in place nothing else asks the registry for another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# What only the tests want: the kernels for GPUs run in Triton's interpreter where there is no GPU.
.venv/triton: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gpu]'
	touch $@

clean:
	rm -rf .venv $(DEMO) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
