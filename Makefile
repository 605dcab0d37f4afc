# Ergon's face. Every target sets up what it needs; see README.md.
SHELL := /bin/sh
VENV ?= .venv
PYTHON := $(VENV)/bin/python
RUN ?= deploy/runs/quickstart.toml
ARGS ?=
READY := $(VENV)/.ready

.PHONY: setup run test test-envs test-adapters test-gateway-clients check lint format bench fuzz chaos chaos-real reference lock clean help

help: ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): requirements.lock pyproject.toml deploy/setup.sh
	@deploy/setup.sh $(VENV)
	@touch $@

setup: $(READY) ## virtual environment, locked packages, system packages

run: $(READY) ## the main job on this machine: RUN=file.toml ARGS="--set run.seed=1"
	@$(PYTHON) -m deploy run $(RUN) $(ARGS)

test: $(READY) ## unit, contract and integration tests
	@$(PYTHON) -m pytest $(ARGS)

# Agent frameworks and SDKs that are in no lock of ours, installed into CLIENTS, which the sandbox's user must be able to
# enter.
CLIENTS ?= /var/tmp/ergon-gateway-clients
test-gateway-clients: $(READY) ## agents of other people's SDKs against the gateway; installs them
	@tests/integration/gateway/clients/install.sh $(PYTHON) $(CLIENTS)
	@ERGON_GATEWAY_CLIENTS=$(CLIENTS) $(PYTHON) -m pytest tests/integration/gateway/test_clients.py $(ARGS)

# Environments of TextArena, OpenEnv and verifiers behind their adapters, of packages that are in no lock of ours, installed
# into FOREIGN.
FOREIGN ?= /var/tmp/ergon-foreign
test-adapters: $(READY)
	@tests/integration/envs/adapters/install.sh $(PYTHON) $(FOREIGN)
	@ERGON_FOREIGN=$(FOREIGN) $(PYTHON) -m pytest tests/integration/envs/adapters $(ARGS)

test-envs: $(READY) ## every built-in environment at length: 200 tasks, 1,000 resets, 64 at once
	@ERGON_ENVS_FULL=1 $(PYTHON) -m pytest tests/integration/envs/test_builtin.py --timeout 1200 $(ARGS)

check: $(READY) ## format, lint, types, import contracts, documentation tests
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(PYTHON) -m pytest tests/contract/test_documentation.py

lint: check

format: $(READY) ## rewrite the code in the house's format
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

bench: bench-broker bench-weights bench-learner ## the benchmarks that take minutes; bench-end-to-end takes an hour and a half

bench-broker: ## the broker against Redis Streams and bare pyzmq; ARGS="--quick", "--only 2KiB/16", "--curve"

bench-weights: ## the weight channel on real versions against sending everything: ARGS="--quick", "--only codec,crowd"

bench-learner: ## the trainer against plain PyTorch and TRL's GRPOTrainer: ARGS="--quick", "--only packed,trl"

bench-end-to-end: $(READY) ## the main job trained by Ergon and by TRL, wall-clock to the same reward: ARGS="--quick", "--seeds 0"
	@$(PYTHON) -m tests.bench.end_to_end $(ARGS)

bench-rollout: ## an actor with slow tools against none, and against a synchronous batch loop: ARGS="--quick"

bench-envs: ## sandboxes, shells and every built-in environment at 1, 16 and 64 at once: ARGS="--quick", "--only sandbox,code"

bench-exactness: ## the actor's log-probs against a Hugging Face forward pass of the same weights

bench-%: $(READY) ## one benchmark: tests/bench/%.py
	@$(PYTHON) -m tests.bench.$* $(ARGS)

fuzz: $(READY) ## a million hostile messages against live processes; ARGS="--messages 20000"
	@$(PYTHON) -m tests.fuzz.broker $(ARGS)

chaos: $(READY) ## the kill matrix: 200 faults on real processes, nothing lost, nothing twice: ARGS="--seed 1 --curve"
	@ERGON_ALL_PHASES=1 $(PYTHON) -m pytest tests/integration/actors/test_actor_killed.py
	@$(PYTHON) -m tests.chaos.matrix $(ARGS)

chaos-real: $(READY) ## kill every process of a real vLLM and DeepSpeed run once
	@$(PYTHON) -m tests.chaos.kill_each $(ARGS)

reference: $(READY) ## rewrite deploy/REFERENCE.md from the code
	@$(PYTHON) -m tests.reference --write

lock: $(READY) ## rewrite requirements.lock from the virtual environment
	@deploy/lock.sh $(VENV) > requirements.lock.tmp && mv requirements.lock.tmp requirements.lock

clean: ## remove what was built, not the runs
	rm -rf $(VENV) build *.egg-info broker/protocol/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
