# Two commands do everything on a fresh machine: `make demo` and `make test`. `make soak` breaks things for ten minutes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo soak test lint proto clean

demo: $(VENV)/.demo
	$(BIN)/edgefm demo $(ARGS)

soak: $(VENV)/.demo
	$(BIN)/edgefm bench soak $(ARGS)

# Two processes: many tests wait for processes, sockets and clocks.
test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

proto: $(VENV)/.dev
	$(BIN)/python proto/generate.py proto/v1

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	@echo "Installing EdgeFM with the cloud's packages (PyTorch among them: several GB, a few minutes) ..."
	$(INSTALL) -e '.[demo]'
	-$(BIN)/edgefm weights get smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	@echo "Installing EdgeFM with everything its tests need (PyTorch among them: several GB, a few minutes) ..."
	$(INSTALL) -e '.[dev]'
	$(BIN)/edgefm weights get smollm2
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info edgefm-demo
