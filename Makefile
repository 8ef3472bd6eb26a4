# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
# Both create .venv and install what they need; nothing outside this folder is touched.
#
#   PYTHON       the interpreter that .venv is made with: make test PYTHON=python3.12
#   TORCH_INDEX  the package index that PyTorch comes from. On Linux the usual one has the build for
#                CUDA: 2.7 GB to download, and .venv takes 5.6 GB (with what the tests want 6.4).
#                Without a GPU the build for CPUs does, 0.2 GB and 1.8 (3.5):
#                make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# Both count where .venv is made; `make clean` removes it.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
DEMO := demo

# Where this is set, every worker and process of a test would compile all files anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-core slow docs package lint types format clean

demo: .venv/installed
	$(BIN)/subspan sweep --net mlp --data digits --methods hash --dims 10,30,100,200,400,1000 \
		--seeds 3 --epochs 20 --batch-size 64 --baseline-lrs 0.003 --out $(DEMO)

# Two at a time, of one thread each: more threads than cores wait for each other.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Everything below `training`, for the inner loop: other people's trainers stand above, as ours does.
# What loads Transformers or PEFT, compiles or exports, interprets kernels for GPUs or starts processes
# is left to `make test`.
test-core: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
		-m "not heavy and not slow and not gpu" \
		$(addprefix --ignore=tests/,trainers training sweeps report bench experiments commands \
		test_examples.py test_readme.py test_makefile.py test_docs.py test_package.py)

slow: .venv/dev
	$(BIN)/python -m pytest -m slow

# The site, into build/site: tutorials are executed, reports made of the records.
docs: .venv/docs
	$(BIN)/sphinx-build -c docs -d build/doctrees --fail-on-warning --keep-going . build/site

# A wheel and an archive of the sources, into dist.
package: .venv/installed
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: with it in place nothing else asks the registry for another build of it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and \
		"subspan needs Python 3.11 or later, and $(PYTHON) is %d.%d: name another, " \
		"as in make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab]'
	touch $@

# What the demo does not want: the tools, the trackers, Ray, Triton (whose interpreter runs the
# kernels for GPUs where there is no GPU), and the libraries that the tests use subspan with.
.venv/dev: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv $(DEMO) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
