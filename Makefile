# Everything a person or a build machine does here. Each target sets up what it needs in .venv, this folder's own
# environment, and touches nothing outside this folder but the package caches.
#
# Paths are relative throughout, so that the folder may have any name, with spaces too.

DEMO  = tests/demo/demo.py
BENCH = tests/bench/bench.py

VENV  = .venv
PY    = $(VENV)/bin/python
CODE  = proxy programs plugins tests helm

# Extra words for pytest (make test ARGS="-k cache"), `asmodel serve`, the demo or the benchmark.
ARGS  =
# Extra words for `make lock`: --upgrade, or --upgrade-package NAME. Without them a pin moves only where it must.
LOCK  =

# Settings for installers may say where packages come from and how to get there; not what is installed, nor into which
# environment. An active virtual environment and PYTHONPATH are of no account either.
FROM := PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST PIP_CERT PIP_CLIENT_CERT PIP_PROXY \
        PIP_DEFAULT_TIMEOUT PIP_TIMEOUT PIP_RETRIES PIP_CACHE_DIR PIP_CONFIG_FILE PIP_KEYRING_PROVIDER \
        UV_INDEX UV_INDEX_URL UV_DEFAULT_INDEX UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_INSECURE_HOST UV_NATIVE_TLS \
        UV_SYSTEM_CERTS UV_HTTP_TIMEOUT UV_HTTP_RETRIES UV_CACHE_DIR UV_CONFIG_FILE UV_KEYRING_PROVIDER UV_LINK_MODE \
        UV_CONCURRENT_DOWNLOADS UV_OFFLINE
unexport $(filter-out $(FROM),$(filter PIP_% UV_%,$(.VARIABLES)))
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONOPTIMIZE PYTHONWARNINGS VIRTUAL_ENV CONDA_PREFIX
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# An editable install points at the folder it was made in; in a copy of the folder it must be made again.
HERE := $(shell pwd -P)
ifneq ($(shell cat $(VENV)/installed-in 2>/dev/null),$(HERE))
MOVED = moved
endif

.DEFAULT_GOAL := help
.PHONY: help demo test e2e soak check serve bench chart lock clean moved

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/installed ## see it work: a program served as a model, on a small model of its own; no key needed
	@test -f $(DEMO) || { echo "make demo: there is no $(DEMO) in this tree"; exit 1; }
	@$(PY) $(DEMO) $(ARGS)

test: check ## check, then every test that needs no long-running server
	$(PY) -m pytest -m "not e2e and not soak" $(ARGS)

e2e: $(VENV)/installed $(VENV)/tools ## real servers, clients and weights; what they buy is kept in .cache/e2e
	ASMODEL_E2E_CACHE="$${ASMODEL_E2E_CACHE:-$$PWD/.cache/e2e}" $(PY) -m pytest -m e2e --timeout=600 $(ARGS)

soak: $(VENV)/installed $(VENV)/tools ## minutes of load; prints what it measures
	$(PY) -m pytest -m soak -s --timeout=2400 $(ARGS)

check: $(VENV)/installed $(VENV)/tools ## format, lint, and types in two checkers
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check $(CODE)
	$(PY) -m mypy
	$(PY) -m basedpyright --pythonpath $(PY)

serve: $(VENV)/installed ## the server, at http://127.0.0.1:8000/v1
	$(VENV)/bin/asmodel serve $(ARGS)

bench: $(VENV)/installed $(VENV)/tools ## what the proxy itself costs, measured
	@test -f $(BENCH) || { echo "make bench: there is no $(BENCH) in this tree: the benchmark is not written yet"; exit 1; }
	$(PY) $(BENCH) $(ARGS)

chart: $(VENV)/installed $(VENV)/tools ## what is said about the chart, made anew from its values
	$(PY) helm/describe.py

# Resolved for every platform and Python at once, with hashes and without addresses: two machines get the same thing,
# each from its own index. The second file is the first and the tools.
RESOLVE = pip compile --no-config pyproject.toml --universal --python-version 3.11 --generate-hashes --quiet $(LOCK) \
          --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
lock: $(VENV)/installed $(VENV)/tools ## pin every dependency anew (make lock LOCK=--upgrade)
	@uv=$$(command -v uv || true); \
	if [ -z "$$uv" ]; then $(PY) -m uv --version >/dev/null 2>&1 || $(PY) -m pip install uv; uv="$(PY) -m uv"; fi; \
	set -ex; \
	$$uv $(RESOLVE) --extra demo --extra redis --group build -o requirements.lock >/dev/null; \
	$$uv $(RESOLVE) --extra demo --extra redis --group dev -c requirements.lock -o requirements-dev.lock >/dev/null

clean: ## remove what tests and tools left; not .venv, nor what e2e bought (.cache)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment ----

# litellm has no release for 3.15 yet. venv, ensurepip and sqlite3 are packages of their own on some systems.
SUITS = import sys, venv, ensurepip, sqlite3, ssl; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))

$(PY):
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python; do \
	  "$$python" -c '$(SUITS)' >/dev/null 2>&1 || continue; \
	  echo "Making $(VENV) with $$("$$python" --version)"; \
	  if command -v uv >/dev/null; then \
	    exec uv venv --quiet --allow-existing --no-project --python "$$("$$python" -c 'import sys; print(sys.executable)')" $(VENV); \
	  else exec "$$python" -m venv $(VENV); fi; \
	done; \
	if [ -z "$(PYTHON)" ] && command -v uv >/dev/null; then \
	  echo "Making $(VENV) with Python 3.12 from uv"; \
	  exec uv venv --allow-existing --no-project --python 3.12 $(VENV); \
	fi; \
	echo "asmodel needs Python 3.11, 3.12, 3.13 or 3.14, with venv, pip and sqlite3 (on Debian and Ubuntu: python3-venv)."; \
	echo "None of python3, python3.14 ... python3.11 is that here. Install one, or name it: make PYTHON=/path/to/python3.12"; \
	exit 1

# $(1) is a lock file. On a terminal both installers show each download with its bytes and the time left.
# Byte code is compiled now (pip does so by itself), not in the first second of the first server.
# A lock file is complete, so nothing is left for the installer to resolve.
define install
	@if command -v uv >/dev/null; then \
	  uv pip install --python $(PY) --compile-bytecode --no-deps --require-hashes -r $(1); \
	else \
	  { $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --default-pip; } && \
	  $(PY) -m pip install --no-deps --require-hashes -r $(1); \
	fi
	@touch $@
endef

$(VENV)/libraries: requirements.lock | $(PY)
	@echo "Installing what asmodel runs on (about 130 MB the first time)"
	$(call install,requirements.lock)

# What the second lock file has and the first has not.
$(VENV)/tools: requirements-dev.lock $(VENV)/libraries
	@echo "Installing the tools for development (about 105 MB the first time)"
	@awk 'NR == FNR { have[$$0]; next } /^[a-z0-9]/ { new = !($$0 in have) } new' \
	  requirements.lock requirements-dev.lock > $(VENV)/tools.lock
	$(call install,$(VENV)/tools.lock)

$(VENV)/installed: pyproject.toml $(VENV)/libraries $(MOVED)
	@if command -v uv >/dev/null; then \
	  uv pip install --python $(PY) --quiet --no-deps --no-build-isolation --editable .; \
	else $(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .; fi
	@pwd -P > $(VENV)/installed-in
	@touch $@
