# SPDX-License-Identifier: Apache-2.0
#
#   make demo    two real LLM engines on one shared device; out/demo/report.html
#   make test    lint and every test lane (CI runs exactly this)
#
# What is expensive (third-party packages, the engines' environment, the model) lives in the user's
# cache folder under a name made from its inputs, so a second clone on the same machine starts at once.
# build/ holds what belongs to this checkout.

CACHE  ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/valve
PYTHON ?= python3
PY     := build/venv/bin/python
LANES  := unit native integration engines e2e gpu

.DEFAULT_GOAL := help
.PHONY: help deps runtime engines cluster lint test demo clean $(LANES)

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

deps:  ## what the system must have: a C compiler and Python's venv
	@sh tools/system-deps.sh $(PYTHON)

build/venv/ready: pyproject.toml constraints/dev.txt tools/make_venv.py | deps
	$(PYTHON) tools/make_venv.py --cache $(CACHE) --constraints constraints/dev.txt build/venv

runtime: build/venv/ready  ## libvalve and the engine plugins, as a pod gets them
	@$(PY) runtime/build.py --out build/runtime

build/engines build/model: constraints/engines.txt runtime/engines/build_env.py runtime/engines/model.py | build/venv/ready
	@$(PY) runtime/engines/build_env.py --cache $(CACHE) --link build/engines
	@build/engines/bin/python runtime/engines/model.py --cache $(CACHE) --link build/model

cluster: build/venv/ready  ## a real Kubernetes for the tests: built once, about eight minutes, then cached
	@sh tools/cluster-deps.sh
	@$(PY) -m e2e.cluster.build --cache $(CACHE) --link build/cluster

demo: runtime build/engines  ## watch an online and an offline engine share one device
	$(PY) -m valve_cli.main demo --out out/demo $(DEMO_ARGS)

lint: build/venv/ready  ## ruff, mypy --strict, import layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command as c; c()'

# What takes minutes to build is built while the lanes that do not need it run.
test: lint runtime  ## lint and every lane
	@$(MAKE) -j2 build/engines cluster > build/prepared.log 2>&1 & prepared=$$!; \
	$(PY) -m pytest -m 'unit or native'; first=$$?; \
	wait $$prepared || { cat build/prepared.log; exit 1; }; \
	$(PY) -m pytest -m 'not unit and not native' && exit $$first

unit: build/venv/ready  ## tests: pure code
	$(PY) -m pytest -m unit
native: runtime  ## tests: libvalve, sanitizers, fuzzing
	$(PY) -m pytest -m native
integration: runtime cluster  ## tests: a real agent with real runtimes, a real Kubernetes API
	$(PY) -m pytest -m integration
engines: runtime build/engines  ## tests: real vLLM and transformers engines on the cpu device
	$(PY) -m pytest -m engines
e2e: runtime build/engines cluster  ## tests: whole user stories
	$(PY) -m pytest -m e2e
gpu:  ## tests: qualification on a real GPU; PARTS=e1,e4 for some, WITHIN=570 seconds. Needs nvcc, python3
	@if [ -e /dev/nvidiactl ]; then $(PYTHON) e2e/gpu/qualify.py --parts $(or $(PARTS),all) $(if $(SCALE),--scale $(SCALE)) \
		$(if $(WITHIN),--within $(WITHIN)) $(GPU_ARGS); \
	else echo "gpu lane: no /dev/nvidiactl on this machine, nothing to run"; fi

clean:  ## remove what belongs to this checkout
	rm -rf build out
