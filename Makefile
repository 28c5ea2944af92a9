# Everything runs in .venv, made here: `make demo` and `make test` need no more
# than Python 3.11 and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
WORKDIR ?= runs/digits
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Tools of the launchers, which disagree with our packages: one environment each.
TOOLS := xmanager xpk sky

.PHONY: help install demo test test-slow kills fuzz soak lint format constraints clean

help:
	@echo "make install    make .venv and install into it"
	@echo "make demo       train handwritten digits into WORKDIR=$(WORKDIR)"
	@echo "make test       lint and test; what takes minutes: make test-slow"
	@echo "make kills      kill training 500 times, and see it come to its end"
	@echo "make fuzz       give 100,000 damaged or odd inputs to what reads"
	@echo "make soak       train for two hours, and see what memory that takes"
	@echo "make format     let ruff lay the code out"
	@echo "make clean      remove .venv and caches; runs/ stays"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "error: Python 3.11 or newer is needed; give it as make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: setup.py constraints.txt | .venv/bin/python
	@echo "Installing into .venv"
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) install --constraint constraints.txt --editable '.[test]'
	@# Without what they ask for: torchvision would bring a CUDA build of torch,
	@# jax2onnx an older Orbax.
	$(PIP) install --constraint constraints.txt --no-deps torch-fidelity \
	  pytorch-fid torchvision efficientnet-lite-pytorch prdc jax2onnx
	@touch $@

.venv/tools/%/installed: launch/requirements-%.txt | .venv/bin/python
	@echo "Installing into .venv/tools/$*"
	$(PYTHON) -m venv .venv/tools/$*
	.venv/tools/$*/bin/python -m pip --disable-pip-version-check --quiet \
	  install --requirement launch/requirements-$*.txt
	@touch $@

install: .venv/installed

# Huge pages take 9% off a large step on a CPU; the C library of Linux reads this
# when a process starts.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: .venv/installed
	$(BIN)/python -m vitgan_jax.main --config=configs/digits.py:fast \
	  --workdir="$(WORKDIR)"
	$(BIN)/python -m vitgan_jax.visualize --workdir="$(WORKDIR)"
	$(BIN)/python -m vitgan_jax.judge_digits --workdir="$(WORKDIR)"
	$(BIN)/python -m vitgan_jax.main --mode=evaluate --workdir="$(WORKDIR)"

test: lint
	@# In the order of names: the files of few tests, which go last else, take long.
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile \
	  --no-loadscope-reorder

test-slow: lint $(TOOLS:%=.venv/tools/%/installed)
	$(BIN)/python -m pytest -o faulthandler_timeout=1800

# The first two go on from what is in runs/.
kills fuzz soak: .venv/installed-test
	$(BIN)/python -m tests.$@

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: .venv/installed-test
	( head -n 1 constraints.txt; $(PIP) freeze --exclude-editable \
	  | sed 's/+cpu$$//' ) > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
