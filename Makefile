# make demo: segment the sample photos with the light runtime.   make test: everything that must pass.
PYTHON ?= python3
DEMO   := .venv-demo
DEV    := .venv
OUT    := demo-output

.PHONY: help demo test check pytest format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install the light runtime into $(DEMO) and cut pets out of the sample photos"
	@echo "make test    install everything the tests need into $(DEV), then make check and the tests"
	@echo "make check   formatting, lint, types, import contracts"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove environments, caches and outputs"

demo: $(DEMO)/.installed
	$(DEMO)/bin/petseg infer runtime/petseg_runtime/models/samples --as cutout --output $(OUT)/cutout
	$(DEMO)/bin/petseg infer runtime/petseg_runtime/models/samples --as overlay --output $(OUT)/overlay
	@echo
	@echo "The pictures are in $(CURDIR)/$(OUT): cutout/ has the pets alone, overlay/ shows them in their photos."

test: check pytest

check: $(DEV)/.installed
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

pytest: $(DEV)/.installed
	$(DEV)/bin/python -m pytest

format: $(DEV)/.installed
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

clean:
	rm -rf $(DEMO) $(DEV) $(OUT) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist build

# An environment is made anew when pyproject.toml changes; the stamp is written last, so a broken install is repeated.
$(DEMO)/.installed: pyproject.toml
	$(call make_venv,$(DEMO))
	$(DEMO)/bin/python -m pip install --quiet ".[cpu]"
	@touch $@

$(DEV)/.installed: pyproject.toml
	$(call make_venv,$(DEV))
	$(DEV)/bin/python -m pip install --quiet --editable ".[dev]"
	@touch $@

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "petseg needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@rm -rf $(1)
	@$(PYTHON) -m venv $(1) || (rm -rf $(1); echo "On Debian and Ubuntu: apt install python3-venv"; exit 1)
	@echo "installing into $(1) ..."
endef
