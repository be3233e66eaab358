# make train    install into .venv, then tune the shipped policy towards positive film reviews
# make test     the default test suite
# PYTHON=/path/to/python3.13 and VENV=.venv-3.13 give another interpreter, with an environment of its own
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do command -v python$$v >/dev/null 2>&1 && python$$v -c 'import venv, ensurepip' 2>/dev/null && echo python$$v && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.tested
# Installed first, so that pip takes a wheel for CPUs where the machine has one. A newer one: make TORCH='torch<2.15'
TORCH ?= torch>=2.8,<2.14

# A worker for each processor, one thread each: threads of tiny models would wait for each other.
WORKERS := -n logical --maxprocesses 8 --dist worksteal

.PHONY: train train_smoke train_quick train_full test test_slow test_machines test_python test_lowest test_newest check \
	tensorboard experiments verify bench clean

train: $(INSTALLED)          ## the main job: a minute on two cores
	$(RUN) train.py algo=grpo reward=sentiment

train_smoke: $(INSTALLED)    ## seconds: does everything still fit together?
	$(RUN) train.py name=smoke steps=2 prompts_per_step=2 group_size=4 max_new_tokens=8 eval_prompts=8

train_quick: $(INSTALLED)    ## half a minute
	$(RUN) train.py name=quick steps=20 eval_prompts=32

train_full: $(INSTALLED)     ## the recorded experiment: held by KL, 256 held-out prompts
	$(RUN) train.py +experiment=sentiment_grpo

experiments: $(INSTALLED)    ## the tables and pictures under experiments/: three hours on two cores
	for run in experiments/*/run.sh; do PYTHON=$(RUN) $$run || exit 1; done

verify: $(INSTALLED)         ## every online algorithm against exact answers; the pages under docs/verify
	$(RUN) -m rlft verify --out docs/verify

bench: $(TESTED)             ## beside the peers: benchmarks/results.md; TRL_PYTHON and PPO_PYTHON are theirs
	$(RUN) -m benchmarks.versus --trl $(or $(TRL_PYTHON),$(RUN)) $(if $(PPO_PYTHON),--ppo $(PPO_PYTHON))

test: $(TESTED)
	$(RUN) -m pytest -q $(WORKERS)

test_slow: $(TESTED)      ## minutes a test: what is long and seldom changes
	$(RUN) -m pytest -q -m slow

test_machines: $(TESTED)  ## a line for each setting of another machine; ONLY="threads_3 order" takes these
	$(RUN) -m tests.machines $(ONLY)

test_python:                 ## PYTHON=/path/to/python3.13: the suite in an environment of its own
	$(MAKE) test PYTHON=$(PYTHON) VENV=.venv-$(notdir $(PYTHON))

test_lowest test_newest:     ## the versions that pyproject.toml allows, or the index has; KEEP=torch==2.13.0 stays
	$(PYTHON) -m tests.versions $(@:test_%=%) $(if $(KEEP),--keep $(KEEP))

check: $(TESTED)          ## lint, types, and that imports run down; make test checks that every configuration composes
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

tensorboard: $(INSTALLED)
	$(VENV)/bin/tensorboard --logdir outputs

clean:
	rm -rf $(VENV) .venv-* outputs multirun build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "rlft needs Python 3.11, 3.12 or 3.13; give one: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip
	$(RUN) -m pip install -q '$(TORCH)'
	$(RUN) -m pip install -q -e '.[all]'
	@touch $@

$(TESTED): $(INSTALLED)
	$(RUN) -m pip install -q -e '.[dev]'
	$(RUN) -m pip install -q --no-deps liger-kernel==0.8.5 trl==1.16.0 || echo "tests skip what they compare with these"
	@touch $@
