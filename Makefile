# Ergon's face. Every target sets up what it needs; see README.md.
SHELL := /bin/sh
VENV ?= .venv
PYTHON := $(VENV)/bin/python
RUN ?= deploy/runs/quickstart.toml
ARGS ?=
READY := $(VENV)/.ready

.PHONY: setup run monitor dashboards test test-monitoring test-chart test-cluster test-images chart-golden test-envs test-adapters test-gateway-clients check lint format bench fuzz chaos chaos-real reference lock clean help

help: ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): requirements.lock pyproject.toml deploy/setup.sh
	@deploy/setup.sh $(VENV)
	@touch $@

setup: $(READY) ## virtual environment, locked packages, system packages

run: $(READY) ## the main job on this machine: RUN=file.toml ARGS="--set run.seed=1"
	@$(PYTHON) -m deploy run $(RUN) $(ARGS)

monitor: $(READY) ## Prometheus for the run on this machine, and its dashboards as a page: RUN=runs/NAME/config.toml
	@$(PYTHON) -m deploy monitor $(RUN) $(ARGS)

# Two at a time: most of a test is waiting. A module stays with one worker, for its engine; slow ones do not come last.
WORKERS ?= 2
test: $(READY) ## unit, contract and integration tests: ARGS="tests/unit/broker", WORKERS=1
	@$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Agent frameworks and SDKs that are in no lock of ours, installed into CLIENTS, which the sandbox's user must be able to
# enter.
CLIENTS ?= /var/tmp/ergon-gateway-clients
test-gateway-clients: $(READY) ## agents of other people's SDKs against the gateway; installs them
	@tests/integration/gateway/clients/install.sh $(PYTHON) $(CLIENTS)
	@ERGON_GATEWAY_CLIENTS=$(CLIENTS) $(PYTHON) -m pytest tests/integration/gateway/test_clients.py $(ARGS)

# Environments of TextArena, OpenEnv, verifiers and reasoning-gym behind their adapters, of packages that are in no lock of
# ours, installed into FOREIGN.
FOREIGN ?= /var/tmp/ergon-foreign
test-adapters: $(READY) ## environments of TextArena, OpenEnv, verifiers and reasoning-gym behind their adapters; installs them
	@tests/integration/envs/adapters/install.sh $(PYTHON) $(FOREIGN)
	@ERGON_FOREIGN=$(FOREIGN) $(PYTHON) -m pytest tests/integration/envs/adapters tests/integration/envs/test_reasoning_gym.py $(ARGS)

test-envs: $(READY) ## every built-in environment at length: 200 tasks, 1,000 resets, 64 at once
	@ERGON_ENVS_FULL=1 $(PYTHON) -m pytest tests/integration/envs/test_builtin.py tests/integration/envs/test_miniwob.py --timeout 1200 $(ARGS)

test-monitoring: $(READY) ## a real run watched by a real Prometheus: every query of dashboards and alerts, an alert to a webhook
	@ERGON_MONITORING=1 $(PYTHON) -m pytest tests/integration/monitoring --timeout 900 $(ARGS)

CLUSTER := $(VENV)/cluster
$(CLUSTER)/.ready: tests/cluster/requirements.txt tests/cluster/tools.sh | $(READY)
	@tests/cluster/tools.sh $(PYTHON) $(CLUSTER)
	@touch $@

test-chart: $(CLUSTER)/.ready ## the chart by the real helm: golden files, schemas of Kubernetes 1.34-1.37, security; Dockerfiles
	@$(PYTHON) -m pytest tests/cluster --timeout 300 $(ARGS)

# Programs of Kubernetes and images, which are built outside the tree.
IMAGES ?= $(HOME)/.cache/ergon/images
KUBERNETES ?= $(HOME)/.cache/ergon/kubernetes/1.20.2
test-cluster: $(CLUSTER)/.ready ## the chart on a real control plane with played nodes; builds Kubernetes first (20 minutes, once)
	@tests/cluster/plane/build.sh $(KUBERNETES)
	@ERGON_KUBERNETES=$(KUBERNETES) ERGON_IMAGES=$(IMAGES) $(PYTHON) -m pytest tests/cluster/plane --timeout 1200 -s $(ARGS)

test-images: $(CLUSTER)/.ready ## the slim image by buildah, without a registry: build/ergon-broker.cdx.json is what is in it
	@tests/cluster/images.sh $(IMAGES) $(CLUSTER)/bin/python
	@mkdir -p build && cp $(IMAGES)/broker.cdx.json build/ergon-broker.cdx.json
	@ERGON_IMAGES=$(IMAGES) $(PYTHON) -m pytest tests/cluster/image tests/cluster/test_images.py -s $(ARGS)

chart-golden: $(CLUSTER)/.ready ## rewrite tests/cluster/golden from the chart; look at the diff
	@$(PYTHON) -m tests.cluster.rendering

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

# A rule of its own: `async` is a word of the language, and no module's name.
bench-async: $(READY) ## the main job with slow tools, staleness 0 against 8, wall-clock to the same reward: ARGS="--quick"
	@$(PYTHON) -m tests.bench.async_vs_sync $(ARGS)

bench-rollout: ## an actor with slow tools against none, and against a synchronous batch loop: ARGS="--quick"

bench-scale: ## real broker and relay with up to 1,000 simulated actors: ARGS="--quick", "--only measured/1000"

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

dashboards: $(READY) ## rewrite deploy/monitoring/dashboards from panels.yml
	@$(PYTHON) -m deploy.monitoring.dashboards

lock: $(READY) ## rewrite requirements.lock from the virtual environment
	@deploy/lock.sh $(VENV) > requirements.lock.tmp && mv requirements.lock.tmp requirements.lock

clean: ## remove what was built, not the runs
	rm -rf $(VENV) build *.egg-info broker/protocol/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
