# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 2

.PHONY: demo test install install-dev format help

demo: install ## distil the embedded digits and build results/report/index.html
	$(BIN)/snakemake --cores $(CORES)
	@cat results/report/tables/main.md
	@echo "The page: results/report/index.html"

# One more process than cores, since one mostly waits for Slurm.
test: install-dev ## lint, formats and tests, on a Slurm of their own too where there can be one
	tests/slurm/install.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $$(($(CORES) + 1)) --dist loadfile -m "not large"

format: install-dev ## bring Python and Snakemake files into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: test-slurm status

test-slurm: install-dev ## the tests on a Slurm alone, with those that `make test` leaves out
	tests/slurm/install.sh
	$(BIN)/pytest tests/slurm

status: install ## per rule: done, running, failed, to do, hours left; ARGS="--configfile presets/cifar10.yaml"
	$(BIN)/python -m workflow_scripts.status $(ARGS)

.PHONY: plan
PRESET ?= paper

plan: install ## what is still to do for a preset: jobs, GPU hours, disk; PRESET=paper (own-images: set its root first)
	$(BIN)/snakemake -n --quiet --configfile presets/$(PRESET).yaml

.PHONY: bench

bench: install ## every stage against a plain reference, start-up, limits, scaling; twenty minutes on two cores
	$(BIN)/python -m benchmarks features barycenter recover relabel evaluate startup limits scaling $(ARGS)
