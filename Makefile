# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up in .venv first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# tests side by side, of one thread each: threads of several processes stall each other
JOBS ?= 2

.PHONY: demo test test-all soak

demo: $(VENV)/ready
	$(PY) tools/demo.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile tests

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile tests --slow

# the same tests with more repetitions, seeds, pairs of networks, and CUDA's stand-in: hours
soak: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile tests --slow --soak

$(VENV)/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	@touch $@
