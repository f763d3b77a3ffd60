# The two commands a newcomer needs: `make demo` and `make test`. Each installs what it needs into .venv.
PYTHON ?= python3
CUDA ?= cu13
BIN := .venv/bin
SOURCES := hmil_fast kernels io bench tests setup.py

.PHONY: demo test check bench evaluate wheel install clean
.DEFAULT_GOAL := test

demo: install
	$(BIN)/hmil-fast demo --out demo-out

test: check
	$(BIN)/python -m pytest

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
	$(BIN)/python -m build --outdir dist .

install: .venv/.installed

.venv/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hmil-fast needs Python >= 3.11, found `$(PYTHON) --version`."; \
	  echo "Fix: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first: beside cuCIM the resolver may settle on an older or CPU build, which torchvision refuses
	$(BIN)/python -m pip install --quiet "torch>=2.11" "torchvision>=0.26"
	$(BIN)/python -m pip install --quiet --editable ".[$(CUDA),bench,test]"
	touch $@

clean:
	rm -rf .venv build dist demo-out
