PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: speedrun test clean

speedrun: $(READY)
	$(VENV)/bin/mezzotint speedrun $(ARGS)

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The environment is made once, and again when what it is made of changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV)
