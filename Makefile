# `make demo` and `make test` work as the first command after cloning: they make .venv and install into it.
# Another interpreter: `make install PYTHON=python3.12`. The xFormers extra: `.venv/bin/uv pip install -e '.[xformers]'`.

PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed
DEMO_DIR := outputs/demo

.DEFAULT_GOAL := help
.PHONY: help install demo test test-integration lint format config-reference clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 22

install: $(INSTALLED) ## make .venv and install the project with its tests and TensorBoard

$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: $(PYTHON) is older than Python 3.11; run make again with PYTHON=python3.11 or newer' >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	$(PY) -m uv pip install --compile-bytecode --python $(PY) -e '.[test,tensorboard]' -c constraints.txt
	@touch $@

demo: $(INSTALLED) ## train a tiny network on real images on the CPU, k-NN before and after (minutes)
	rm -rf $(DEMO_DIR)
	$(PY) dinov2/train/train.py --config-file configs/train/demo_digits.yaml --output-dir $(DEMO_DIR)

# Two tests at a time, on one thread each: most of a test is Python, and the second core would wait.
test: $(INSTALLED) ## unit tests, and those that start several processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadscope --durations 10

# Those on a real Slurm need root and what tests/slurm/install.sh installs; they skip, with the reason, without.
test-integration: $(INSTALLED) ## tests with real components, or of minutes
	$(PY) -m pytest -m integration

lint: $(INSTALLED) ## rules and format of the code
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED) ## bring the code into format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

config-reference: $(INSTALLED) ## write configs/ssl_default_config.yaml from the dataclasses
	$(PY) -m dinov2.configs --output configs/ssl_default_config.yaml

clean: ## remove caches and build files; .venv and outputs stay
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
