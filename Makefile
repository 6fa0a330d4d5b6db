# make demo: segment the sample photos with the light runtime.   make test: run all checks and tests.
PYTHON ?= python3
DEMO   := .venv-demo
DEV    := .venv
OLDEST := .venv-oldest
GPU    := .venv-gpu
OUT    := demo-output

.PHONY: help demo test test-oldest check pytest format bench gpu-check gpu-there clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install the light runtime into $(DEMO) and cut pets out of the sample photos"
	@echo "make test    install everything the tests need into $(DEV), then run make check and the tests"
	@echo "make test-oldest  run the tests with the oldest packages that pyproject.toml allows, in $(OLDEST)"
	@echo "make check   check formatting, lint, types and import contracts"
	@echo "make format  let ruff format the code and fix what it can"
	@echo "make bench   run most benchmarks (half an hour or less; needs DATA=data), then update the tables in the pages;"
	@echo "             with RESULTS=folder, write the records there and leave the tables alone"
	@echo "make gpu-check  with an NVIDIA GPU: run all its tests and benchmarks, and write one file to send back"
	@echo "make clean   remove environments, caches and outputs"

demo: $(DEMO)/.installed
	$(DEMO)/bin/petseg infer runtime/petseg_runtime/models/samples --as cutout --output $(OUT)/cutout
	$(DEMO)/bin/petseg infer runtime/petseg_runtime/models/samples --as overlay --output $(OUT)/overlay
	@echo
	@echo "The pictures are in $(CURDIR)/$(OUT): cutout/ has the pets alone, overlay/ marks them in the photos."

test: check pytest

check: $(DEV)/.installed
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

# Runs in parallel on all cores (at most 8); most tests use one core. JOBS=0, or plain pytest, runs them sequentially.
JOBS ?= auto
pytest: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

# The tests only: types are checked against the newest packages, by make check.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

format: $(DEV)/.installed
	$(DEV)/bin/ruff format .
	$(DEV)/bin/ruff check --fix .

# Takes nine to sixteen minutes on two cores with bf16 (measured: 537, 521 and, on an older EPYC, 858, 947 and 765 s),
# about half an hour with AVX2 only (1927 s, with more rounds than now), once the peers' environments exist
# (benchmarks.peers makes them). If a step fails, the others still run; the failed steps are listed at the end, and the
# exit code is 1. ISNET=FILE adds the background remover's quality. RESULTS=FOLDER writes the records there, to compare
# them with ours, or as another machine's (benchmarks/results/machines/NAME).
DATA    ?= data
ISNET   ?=
RESULTS ?=
bench: $(DEV)/.installed
	@BIN="$(DEV)/bin" DATA="$(DATA)" ISNET="$(ISNET)" PETSEG_RESULTS="$(RESULTS)" sh -c "$$BENCH"

# Needs an NVIDIA GPU and its driver, and exits with a message if there is none. CUDA and cuDNN come with the packages:
# `gpu` is ONNX Runtime on CUDA, `rtx` is TensorRT for RTX; `train`, `export` and `openvino` are for the tests of training
# on a GPU and of compiling for one. TensorRT is taken from the system if $(PYTHON) can import it (a Jetson, an NVIDIA
# container); otherwise, `make gpu-check GPU_EXTRAS=train,export,openvino,gpu,rtx,trt` installs it from NVIDIA.
GPU_EXTRAS := train,export,openvino,gpu,rtx
gpu-check: $(GPU)/.installed
	@$(PYTHON) -c "$$LINK_TENSORRT" $$($(GPU)/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
	$(GPU)/bin/python -m benchmarks.gpu_check

# Checked before 10 GB are installed; the module needs only Python.
gpu-there:
	@PYTHONPATH=runtime $(PYTHON) -c 'import sys; from petseg_runtime.host import no_gpu, nvidia_gpus; sys.exit(nvidia_gpus() == 0 and f"{no_gpu()}; nothing was installed or checked")'

clean:
	rm -rf $(DEMO) $(DEV) $(OLDEST) $(GPU) $(OUT) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache \
	    dist build

# An environment is made again when pyproject.toml changes. The stamp is written last, so a failed install is repeated.
$(DEMO)/.installed: pyproject.toml
	$(call make_venv,$(DEMO))
	$(DEMO)/bin/python -m pip install --quiet ".[cpu]"
	@touch $@

$(DEV)/.installed: pyproject.toml
	$(call make_venv,$(DEV))
	$(DEV)/bin/python -m pip install --quiet --no-compile --editable ".[dev]"
	$(call compile,$(DEV))
	@touch $@

# uv takes the lowest version of every package that pyproject.toml names, and the newest of those that they need.
$(OLDEST)/.installed: pyproject.toml
	$(call make_venv,$(OLDEST))
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable ".[dev]"
	@touch $@

$(GPU)/.installed: pyproject.toml | gpu-there
	$(call make_venv,$(GPU))
	$(GPU)/bin/python -m pip install --quiet --editable ".[$(GPU_EXTRAS)]" pytest pytest-timeout hypothesis
	@touch $@

# The int8 file is exported once for two steps; if that fails, each step exports it itself.
define BENCH
scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT || exit 1
failed= && began=$$(date +%s)
step() {
    name=$$1 && shift && start=$$(date +%s) && echo "== $$name"
    "$$@" || failed="$$failed $$name"
    echo "== $$name took $$(($$(date +%s) - start)) s"
}
measure() { step "$$1" "$$BIN/python" -m benchmarks "$$@"; }
part() { for name in "$$DATA/oxford-iiit-pet$$1" "$$DATA/oxford-iiit-pet"; do [ -d "$$name" ] && break; done; echo "$$name"; }
step int8 "$$BIN/petseg" export petseg/weights/edge.safetensors --output "$$scratch/int8.onnx" --precision int8 \
    --data "$$(part -native)" --int8-data "$$(part -best)"
int8= && [ -f "$$scratch/int8.onnx" ] && int8="--int8 $$scratch/int8.onnx"
measure latency --data "$$DATA" --rounds 7 --no-compile $$int8
measure throughput --data "$$DATA" --photos 100 --rounds 5
measure video --data "$$DATA" --seconds 3 --rounds 5
measure scaling --rounds 7 --clip-rounds 1
measure training --data "$$DATA" --epochs 3
measure accuracy --data "$$DATA" $$int8 $${ISNET:+--isnet "$$ISNET"}
measure peers --data "$$DATA" --photos 100 --rounds 5 --starts 5
if [ -z "$$PETSEG_RESULTS" ]; then measure report
else echo "$$BIN/python -m benchmarks compare benchmarks/results $$PETSEG_RESULTS shows what differs"; fi
echo "== all of it took $$(($$(date +%s) - began)) s"
[ -z "$$failed" ] || { echo "FAILED:$$failed" >&2; exit 1; }
endef
export BENCH

# Links only the system's TensorRT packages into the environment: its other packages could have other versions.
define LINK_TENSORRT
import importlib.util, pathlib, sys
for name in ("tensorrt", "tensorrt_bindings", "tensorrt_libs"):
    found = importlib.util.find_spec(name)
    link = pathlib.Path(sys.argv[1], name)
    if found and found.submodule_search_locations and not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(found.submodule_search_locations[0])
        print(f"using the system's {name}")
endef
export LINK_TENSORRT

# pip would compile the ten thousand modules on one core. A few are for a newer Python and cannot be compiled.
define compile
	@$(1)/bin/python -m compileall -qq -j 0 $(1)/lib/python*/site-packages || true
endef

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "petseg needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@rm -rf $(1)
	@$(PYTHON) -m venv $(1) || (rm -rf $(1); echo "On Debian and Ubuntu: apt install python3-venv"; exit 1)
	@echo "installing into $(1) ..."
endef
