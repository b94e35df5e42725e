# The project's commands. Each prepares .venv by itself (dev.py), then does its job.
#
#   make test ARGS="-k patterns -x"     more arguments for the command (test, demo, bench)
#   PYTHON=python3.13 make test         another interpreter; .venv is made anew for it
#   make test VENV=build/py313          another environment, beside the usual one

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup setup-bench setup-faults setup-cluster demo \
  chat chat-load test check coverage faults cluster package bench docs clean

bin := $(VENV)/bin/python
# Most tests wait for a server most of the time: four processes keep two cores busy.
parallel := -n 4 --dist loadfile
# A PYTHON that somebody named replaces an environment of another version; the default never does.
remake := $(if $(filter file,$(origin PYTHON)),,--remake)
ready = @command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install\
 Python 3.11 or newer with its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }; \
 $(PYTHON) dev.py --venv "$(VENV)" $(remake)

help:
	@echo "make demo      three processes, one embedded server, one outage, and the sums"
	@echo "make chat      a chat in the browser, on three nodes; ctrl-c ends it"
	@echo "make test      the test suite"
	@echo "make check     lint, format, types, documentation"
	@echo "make coverage  the test suite again, measured, and its gates"
	@echo "make faults    the long fault tests, the fuzzer and the soak; and the tables of docs/reliability.md"
	@echo "make cluster   the chat in a browser, Socket.IO clients of Node.js, and Prometheus"
	@echo "make chat-load 2,000 clients of the chat, with an outage in the middle"
	@echo "make package   wheel and sdist, built, and tried in empty environments"
	@echo "make bench     our speed beside other clients; ARGS=--quick for a short run"
	@echo "make docs      the documentation, into site/"
	@echo "make clean     remove the environments and everything that was made"

setup:
	$(ready) dev

setup-bench:
	$(ready) dev bench

setup-faults:
	$(ready) dev bench fuzz

setup-cluster:
	$(ready) dev cluster

demo: setup
	@$(bin) -m eventbus.demo $(ARGS)

chat: setup
	@$(bin) -m examples.chat $(ARGS)

chat-load: setup
	@$(bin) -m examples.chat.load $(ARGS)

test: setup
	@$(bin) -m pytest $(parallel) $(ARGS)

check: setup
	$(bin) -m ruff check --quiet
	$(bin) -m ruff format --check --quiet
	$(bin) -m mypy --no-error-summary
	$(bin) -m basedpyright --pythonpath $(bin)
	NO_MKDOCS_2_WARNING=1 $(bin) -m mkdocs build --strict --quiet

coverage: setup
	@mkdir -p build
	@$(bin) -m coverage erase
	@$(bin) -m coverage run -m pytest $(parallel) $(ARGS)
	@$(bin) -m coverage combine --quiet
	@$(bin) -m coverage report
	@$(bin) -m coverage json --quiet -o build/coverage.json
	@$(bin) .ci/gates.py coverage build/coverage.json

faults: setup-faults
	@$(bin) -m pytest -m long --timeout 900 -n 2 --dist loadfile $(ARGS)
	@$(bin) -m tests.faults.campaign

cluster: setup-cluster
	@$(bin) -m pytest -m cluster --timeout 300 $(ARGS)

bench: setup-bench
	@$(bin) -m benchmarks $(ARGS)

package: setup
	@$(bin) .ci/package.py

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(bin) -m mkdocs build --strict --quiet
	@echo "site/index.html"

clean:
	@rm -rf .venv build dist site .coverage .coverage.* \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
