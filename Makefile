# emo-serve: every target sets up what it needs; `make help` lists them.

VENV := .venv
BIN := $(VENV)/bin

# serve
MODEL =
POOLS =
HOST = 127.0.0.1
PORT = 8000
# cluster: a number, or MIN..MAX
REPLICAS = 2
# serve, cluster, test and bench: further arguments
ARGS =

# install. PYTHON= and TORCH_INDEX= may also come from the environment.
LOCK := $(if $(shell nvidia-smi >/dev/null 2>&1 && echo yes),requirements/cuda.lock,requirements/cpu.lock)
STAMP := $(VENV)/installed-$(notdir $(LOCK))
CLUSTER_STAMP := $(VENV)/installed-cluster.lock
DOCS_STAMP := $(VENV)/installed-docs.lock
export PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help install serve cluster test lint bench docs clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		awk -F'|' '{ printf "%-16s%s\n", $$1, $$2 }'

install: $(STAMP) ## Make .venv with the pinned versions and emo-serve (PYTHON= TORCH_INDEX= LOCK=)

$(STAMP): $(LOCK) pyproject.toml requirements/install.sh
	@requirements/install.sh $(VENV) $(LOCK)
	@rm -f $(VENV)/installed-*
	@touch $@

serve: install ## Serve the shipped model on 127.0.0.1:8000 (MODEL= POOLS= HOST= PORT= ARGS=)
	$(BIN)/emo-serve serve $(MODEL) --host $(HOST) --port $(PORT) $(if $(POOLS),--pools $(POOLS)) $(ARGS)

cluster: $(CLUSTER_STAMP) ## Serve with two replicas behind one address (REPLICAS= and those of serve)
	$(BIN)/emo-serve cluster serve $(MODEL) --replicas $(REPLICAS) --host $(HOST) --port $(PORT) \
		$(if $(POOLS),--pools $(POOLS)) $(ARGS)

$(CLUSTER_STAMP): requirements/cluster.lock $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements/cluster.lock
	@touch $@

test: $(CLUSTER_STAMP) ## Run all tests, in two processes (ARGS="-k pools" and the like go to pytest)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: install ## Check style and types: ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## Run the benchmarks (BENCH=serving.start for one, ARGS= for its flags)
	@set -e; for bench in $(BENCH); do \
		echo "$(BIN)/python -m benchmarks.$$bench $(ARGS)"; \
		$(BIN)/python -m benchmarks.$$bench $(ARGS); done

BENCH = accuracy.auto accuracy.auto_classifier accuracy.auto_margins accuracy.calibration \
	cluster.autoscaling cluster.simulation gpu reliability.abort reliability.drain \
	reliability.kill reliability.overload residency.elastic residency.loading residency.policies \
	residency.switching serving.build serving.console serving.coverage serving.recording \
	serving.scraping serving.start serving.throughput

docs: $(DOCS_STAMP) ## Write the generated pages and build the site into site/
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS_STAMP): requirements/docs.lock $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements/docs.lock
	@touch $@

clean: ## Remove .venv, the site and every cache
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
