# The two commands a newcomer needs: `make demo` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
PYTHON312 ?= python3.12
CUDA ?= cu13
BIN := .venv/bin
# the processes that run the tests; one that has none left takes some of another's
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist worksteal
SOURCES := hmil_fast kernels io bench tests setup.py

.PHONY: demo test test-oldest test-newest check bench evaluate wheel install clean
.DEFAULT_GOAL := test

demo: install
	$(BIN)/hmil-fast demo --out demo-out

test: check
	$(BIN)/python -m pytest $(PARALLEL)

# the lowest releases that pyproject.toml allows
test-oldest:
	$(PYTHON312) -m venv .venv-oldest
	$(PYTHON312) tests/floors.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt torch torchvision
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[$(CUDA),bench,test]"
	.venv-oldest/bin/python -m pytest $(PARALLEL)

# the newest releases that resolve today; a cap in pip's own configuration holds them back
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade torch torchvision
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[$(CUDA),bench,test]"
	.venv-newest/bin/python -m pytest $(PARALLEL)

check: install
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python tests/package_tree.py
	$(BIN)/mypy
	cd build/tree && ../../$(BIN)/lint-imports --config ../../pyproject.toml

bench: install
	$(BIN)/hmil-fast bench

evaluate: install
	$(BIN)/python -m bench.accuracy

wheel: install
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist .

install: .venv/.installed

# constraints.txt: the releases that the tests were last run with
.venv/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hmil-fast needs Python >= 3.11, found `$(PYTHON) --version`."; \
	  echo "Fix: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
	  --editable ".[$(CUDA),bench,test]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist demo-out
