# Two commands: `make demo` trains a small model and says what to look at; `make test` runs every test.
# Both set up what they need in .venv, once. `make test-latest` has an environment of its own, .venv-latest.

PYTHON ?= python3
BIN := .venv/bin
LATEST := .venv-latest/bin

.PHONY: browser slurm demo suite experiment experiment-induction experiment-memorization experiment-architectures test test-latest siege check format docs clean help

help:
	@echo "make demo   set up, and train a small language model on real text (offline, some minutes)"
	@echo "make suite  train four sizes with three seeds each, compare them (offline, under an hour on two cores)"
	@echo "make test   run every test"
	@echo "make test-latest  test what stands on other packages with their newest versions (in .venv-latest)"
	@echo "make siege  attack every command with forged runs, rows, models and answers of the Hub (hours; make test has a sample)"
	@echo "make check  format, lint, types and the fast tests (about a minute on two cores)"
	@echo "make docs   build the documentation into site/, with its figures; a warning is an error"

demo: .venv/.demo
	$(BIN)/pico train configs/demo.yaml
	$(BIN)/pico analyze configs/analyses/demo.yaml --run runs/demo --report

suite: .venv/.demo
	$(BIN)/pico suite configs/suites/nano.yaml --jobs 2

# The figures of docs/experiment-nano.md are drawn again from the suite, and its tables printed.
experiment: suite .venv/.docs
	$(BIN)/python docs/figures/nano.py

# The same for docs/experiment-induction.md (an hour), docs/experiment-memorization.md (half of one) and
# docs/experiment-architectures.md.
experiment-induction: .venv/.demo .venv/.docs
	$(BIN)/pico suite examples/induction/suite.yaml --jobs 2
	$(BIN)/python docs/figures/induction_experiment.py

experiment-memorization: .venv/.demo .venv/.docs
	$(BIN)/pico suite examples/memorization/suite.yaml --jobs 2
	$(BIN)/python docs/figures/memorization_experiment.py

experiment-architectures: .venv/.demo .venv/.docs
	$(BIN)/pico suite configs/suites/architectures.yaml --jobs 2
	$(BIN)/python docs/figures/architectures_experiment.py

test: .venv/.dev browser slurm
	$(BIN)/pytest -n 2 --dist worksteal

# Which tests use an optional package, the client of the Hub, or what draws figures.
OUTSIDE := tests/models/test_hf.py tests/models/test_hf_diffusion.py tests/formats tests/train/test_loggers.py tests/train/test_harness.py \
	tests/train/test_afterwards.py tests/data/test_tokenizer.py tests/data/test_datatrove.py tests/data/test_corpora.py \
	tests/data/test_embedded.py tests/data/test_hub.py tests/suite/test_cluster.py tests/analyze/test_remote.py \
	tests/analyze/test_cluster.py tests/exchange tests/readers tests/recorder tests/store/test_hub_run.py tests/report/test_plot.py \
	tests/report/test_page.py tests/test_network.py tests/test_terminal.py tests/view/test_server.py

# The newest versions that pyproject.toml allows, without constraints.txt: a break of theirs is found here, not by users.
test-latest: $(LATEST)/pip
	$(LATEST)/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(LATEST)/python tests/versions.py
	$(LATEST)/pytest -n 2 --dist worksteal $(OUTSIDE)

# Failures are written to siege.log as they are found. The commands take turns: each mutated copy goes through one of those
# that read it. PICO_SIEGE_EACH=1 sends it through all of them, which takes most of a day.
siege: .venv/.dev
	PICO_SIEGE=500 PICO_SIEGE_LOG=siege.log $(BIN)/pytest -n 2 --dist worksteal tests/siege

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

# Figures are drawn from runs/demo and by running the tutorials; what has not changed is not drawn again.
docs: .venv/.dev browser runs/demo/run.json
	$(BIN)/python docs/figures/demo_loss.py
	$(BIN)/python docs/figures/tutorials.py
	if command -v chromedriver >/dev/null; then $(BIN)/python docs/figures/report.py && $(BIN)/python docs/figures/view.py; fi
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

runs/demo/run.json:
	$(MAKE) demo

# Tests look at the report in a real browser, and hand jobs to a real SLURM (started and stopped by them, on this machine alone).
# Where these are not and cannot be installed, their tests are skipped and say so.
browser:
	$(call installed,chromium chromedriver,chromium chromium-driver)

slurm:
	$(call installed,munged slurmctld slurmd sbatch,munge slurm-wlm)

# $(1): programs that have to be there; $(2): the packages of Debian that hold them.
define installed
	@(PATH="$$PATH:/usr/sbin"; for program in $(1); do command -v $$program || exit 1; done) >/dev/null \
	|| { apt-get update && apt-get install --yes --no-install-recommends $(2); } >/dev/null 2>&1 \
	|| echo "Not here: $(1). As root: apt-get install $(2)"
endef

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-latest build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/pip .venv-latest/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pico needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(@:/bin/pip=)

# constraints.txt holds the versions that were tested together; pyproject.toml says which others may do.
.venv/.%: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@
