# The front door: `make help` lists the targets. Each sets up .venv by itself where needed.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PY := .venv/bin/python

# The folders that `make demo` runs: all that have a demo, or the one given as FOLDER=llama_omni.
ALL_DEMOS := $(patsubst tests/demos/%/demo.py,%,$(wildcard tests/demos/*/demo.py))
FOLDER ?= $(ALL_DEMOS)
DEMOS := $(patsubst %/,%,$(FOLDER))

.PHONY: help setup demo check test test-long lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1 /p' Makefile | \
	    awk '{ target = $$1; $$1 = ""; printf "make %-10s%s\n", target, $$0 }'

setup: ## install everything into .venv (PYTHON=python3.12 picks the interpreter)
	@PYTHON="$(PYTHON)" sh .ci/setup.sh

demo: setup ## train small models and use them (FOLDER=llama_omni runs one folder)
	@test -n "$(DEMOS)" || { echo "no folder has a demo.py" >&2; exit 1; }
	@set -e; for folder in $(DEMOS); do \
	    test -f "tests/demos/$$folder/demo.py" || \
	        { echo "FOLDER=$$folder has no demo.py; choose from: $(ALL_DEMOS)" >&2; exit 1; }; \
	    echo "== demo of $$folder"; \
	    $(PY) -m "tests.demos.$$folder.demo"; \
	done

check: setup ## ruff, pyright, codespell, shellcheck
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(PY) -m codespell_lib
	find . -name .venv -prune -o -name '*.sh' -print | xargs .venv/bin/shellcheck .ci/run

test: setup ## the tests, offline, on the CPU
	$(PY) -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-long: setup ## long repeats and fuzzing
	$(PY) -m pytest -m long --timeout 3600

lock: ## compile requirements.lock from pyproject.toml (LOCK_FLAGS=--upgrade moves all versions)
	@PYTHON="$(PYTHON)" sh .ci/setup.sh uv-only
	$(PY) -m uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	    --python-version 3.11 --extra data --extra demo --extra eval --extra dev $(LOCK_FLAGS) \
	    pyproject.toml --output-file requirements.lock

clean: ## remove caches and what `make demo` made; keeps .venv and your own runs
	rm -rf runs/demo build *.egg-info */*.egg-info .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
