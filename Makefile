# Two commands: make quickstart, make test.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
NATIVE := $(wildcard src/lorimer/kernels/native/*.[ch]pp src/lorimer/kernels/native/build.py)

help:
	@echo "make quickstart  train a real model on this machine and prove it (no account, no GPU)"
	@echo "make test        format, lint, types, docs and every test"
	@echo "make bench       lorimer against TRL and PEFT, in an environment of its own"
	@echo "make bench-all   every benchmark and every peer: some hours; writes benchmarks/RESULTS.md"
	@echo "make llamacpp    exported files in llama.cpp, compiled here: same tokens, same score?"
	@echo "make large       random bases of 1.1B and 7B in NF4: memory and time (writes 14 GB, deletes them)"
	@echo "make memory      24 runs: planned against measured peak memory"
	@echo "make crashes     some 500 kills and 1,700 disk faults, each run resumed and compared: 80 minutes"
	@echo "make plants      classic bugs put back one at a time: do the tests turn red? 20 minutes"
	@echo "make templates   1,000 random chats for each of 41 chat templates: what training makes, what inference feeds"
	@echo "make mutants     2,300 small changes of loss, mask, pack, merge, checkpoint: does a test fail? 40 minutes"
	@echo "make mutations   10,000 damaged inputs: one message each, no traceback; half an hour"
	@echo "make docs        write the generated pages of docs/ anew"
	@echo "make sanitize    the kernels' tests with address and undefined-behaviour checks"
	@echo "make clean       delete the virtual environments and caches"

quickstart: $(VENV)/.installed
	$(RUN)/lorimer quickstart

test: $(VENV)/.installed-test
	$(RUN)/ruff format --check
	$(RUN)/ruff check
	$(RUN)/mypy
	$(RUN)/python docs/generate.py --check
	$(RUN)/python -m pytest -n 2 --dist loadfile

bench: .venv-bench/.installed
	.venv-bench/bin/lorimer pull smollm2-135m
	.venv-bench/bin/python benchmarks/training.py

bench-all: .venv-bench/.installed .venv-bench-torchtune/.installed .venv-bench-llamafactory/.installed
	.venv-bench/bin/lorimer pull smollm2-135m
	.venv-bench/bin/python benchmarks/results.py

large: $(VENV)/.installed
	$(RUN)/lorimer pull smollm2-135m
	$(RUN)/python benchmarks/large.py 1.1B --tokens 2048 --steps 2 train.recompute=layers
	$(RUN)/python benchmarks/large.py 7B --tokens 512 --steps 1 train.recompute=layers

memory: $(VENV)/.installed
	$(RUN)/lorimer pull smollm2-135m
	$(RUN)/python benchmarks/memory.py

crashes: $(VENV)/.installed-test
	$(RUN)/python tests/crash/kills.py
	$(RUN)/python tests/crash/disks.py

plants: $(VENV)/.installed-test
	$(RUN)/python tests/plants.py

templates: $(VENV)/.installed-test
	$(RUN)/python tests/data/chat_campaign.py

mutants: $(VENV)/.installed-test
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/mutants/requirements.txt
	nice $(RUN)/python tests/mutants/run.py

mutations: $(VENV)/.installed-test
	$(RUN)/python tests/crash/mutate.py

llamacpp: .venv-llamacpp/.installed
	.venv-llamacpp/bin/lorimer pull smollm2-135m
	.venv-llamacpp/bin/python benchmarks/llamacpp.py

sanitize: $(VENV)/.installed-test
	$(RUN)/python tests/kernels/sanitize.py

docs: $(VENV)/.installed
	$(RUN)/python docs/generate.py

# The environment is made anew only when what it is made from has changed.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/.python
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/.python
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

# The peers that are compared are not wanted in the environment that users get.
.venv-bench/.installed: pyproject.toml constraints.txt $(NATIVE) benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements.txt
	@touch $@

.venv-bench-torchtune/.installed: constraints.txt benchmarks/requirements-torchtune.txt
	$(PYTHON) -m venv .venv-bench-torchtune
	.venv-bench-torchtune/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements-torchtune.txt
	@touch $@

.venv-bench-llamafactory/.installed: benchmarks/requirements-llamafactory.txt
	$(PYTHON) -m venv .venv-bench-llamafactory
	.venv-bench-llamafactory/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-llamafactory.txt
	.venv-bench-llamafactory/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	@touch $@

.venv-llamacpp/.installed: pyproject.toml constraints.txt $(NATIVE) benchmarks/requirements-llamacpp.txt
	$(PYTHON) -m venv .venv-llamacpp
	CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_LLAMAFILE=OFF" nice .venv-llamacpp/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/requirements-llamacpp.txt
	@touch $@

clean:
	rm -rf .mutants $(VENV) .venv-bench .venv-bench-torchtune .venv-bench-llamafactory .venv-llamacpp .mypy_cache .ruff_cache .pytest_cache

.PHONY: help quickstart test bench bench-all large memory crashes plants templates mutants mutations llamacpp docs sanitize clean
