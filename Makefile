# Two commands do everything on a fresh machine that has Python 3.11+ and pip:
#   make quickstart   set up, run the example job, show its answers
#   make test         set up, lint, type-check, test

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Tests run in a process for each core, a file of them in one, for its tests share what is slow to make. Files come in
# the order of their names: those of few, long tests are not left for the end.
SPREAD := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
STAMP  := $(VENV)/.installed

.PHONY: quickstart test check clean

quickstart: $(STAMP)
	$(BIN)/batchllm run examples/quickstart/job.yaml
	$(BIN)/python examples/quickstart/show_answers.py

test: $(STAMP) check
	$(BIN)/python -m pytest $(SPREAD)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info examples/quickstart/answers
