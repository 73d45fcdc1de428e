# `make demo` and `make test` also work on a fresh machine: they first install everything into .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# number of test processes, with one thread each: threads of several processes slow each other down
JOBS ?= 2

.PHONY: demo test test-all soak

demo: $(VENV)/ready
	$(PY) tools/demo.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile tests

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile tests --slow

# the same tests with more repetitions, seeds and pairs of networks, and a stand-in for CUDA: hours
soak: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile tests --slow --soak

$(VENV)/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	@touch $@
