# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up in .venv first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-all

demo: $(VENV)/ready
	$(PY) tools/demo.py

test: $(VENV)/ready
	$(PY) -m pytest -q tests

test-all: $(VENV)/ready
	$(PY) -m pytest -q tests --slow

$(VENV)/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	@touch $@
