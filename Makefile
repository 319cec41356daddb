# make demo, make test: everything they install, cache and write stays in this folder (.venv, .cache, runs).

# resume=auto: interrupted, it goes on; finished, it is only evaluated again (remove runs/demo to start over)
DEMO_TRAIN    = train.py shapes_r18 run_dir=runs/demo resume=auto
DEMO_EVALUATE = evaluate.py shapes_r18 runs/demo/last.pth --both --pictures runs/demo/pictures --json runs/demo/evaluation.json

# PYTHON=... picks another one than the first suitable of these; python3 comes first, as the one that is switched on
PYTHONS = python3 python3.13 python3.12 python3.11
# what is installed and, meanwhile, its downloads: with PyTorch's CPU build, with a CUDA build
CPU_GB  = 4
CUDA_GB = 12

CACHE = $(CURDIR)/.cache
export PIP_CACHE_DIR                := $(CACHE)/pip
export XDG_CACHE_HOME               := $(CACHE)
export TRITON_CACHE_DIR             := $(CACHE)/triton
export TORCHINDUCTOR_CACHE_DIR      := $(CACHE)/inductor
export CUDA_CACHE_PATH              := $(CACHE)/cuda
export MPLCONFIGDIR                 := $(CACHE)/matplotlib
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
# pip asks rustc for its version, and rustup then writes its settings
export RUSTUP_HOME                  := $(CACHE)/rustup
# set for other Pythons (ROS does), they put other people's packages before the pinned ones
unexport PYTHONPATH PYTHONHOME
# a user's own pip settings that would install elsewhere
unexport PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_USER := 0

PY    = .venv/bin/python
READY = .venv/.ready

PYTEST   = $(PY) -m pytest --basetemp=.cache/tests -n auto --maxprocesses 8 --dist loadfile
STEMS    = decode point_head point_sample refine select uncertainty
AS_A_GPU = --gpu-twin -q -m "not slow" -k "not compil and not contracts" tests/test_gpu_twin.py tests/test_library.py \
    $(wildcard $(foreach stem,$(STEMS),tests/test_$(stem).py tests/kernels/test_$(stem).py))

.PHONY: help demo test lint typecheck check compat format clean

help:
	@echo "make demo       train a small model from scratch and evaluate it (minutes, no GPU needed)"
	@echo "make test       the whole test suite; ARGS='-k name' is passed to pytest"
	@echo "make check      lint, typecheck and test, as CI does"
	@echo "make compat     the tests in other versions of PyTorch, Triton, NumPy and OpenCV (hours of a core)"
	@echo "make format     put the code into the form that lint wants"
	@echo "make clean      remove what was installed and cached; runs/ stays"

demo: $(READY)
	$(PY) $(DEMO_TRAIN)
	$(PY) $(DEMO_EVALUATE)
	@echo "Pictures: runs/demo/pictures (image, truth, coarse, refined, uncertainty, the refined points, errors)"

# twice, unless ARGS choose: what compares kernels with PyTorch also with that as a GPU computes it
test: $(READY)
	@mkdir -p .cache
	$(PYTEST) $(ARGS)
	$(if $(ARGS),,$(PYTEST) $(AS_A_GPU))

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

typecheck: $(READY)
	$(PY) -m mypy

check: lint typecheck test

# ARGS=newest: one of the environments; see tests/compat/run.py
compat: $(READY)
	$(PY) tests/compat/run.py $(ARGS)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv .cache

# A .venv is trusted if it was finished after the last change of the pins (.ready is written last), still
# has its Python, and that Python is the version PYTHON asks for, if it does. Otherwise it is made again
# from nothing: pip takes a half-written package for an installed one.
version = $(shell "$(1)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
HAS   := $(call version,$(PY))
WANTS := $(if $(PYTHON),$(call version,$(PYTHON)),$(HAS))
ifeq ($(and $(HAS),$(filter $(HAS),$(WANTS))),)
.PHONY: $(READY)
endif

# prints the Python itself where a virtual environment is switched on: it may be the one that is made again
SUITABLE = import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit(1); print(sys._base_executable)

$(READY): requirements.lock
	@fail() { printf '\n%s\n' "$$@" >&2; exit 1; }; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	  python=$$("$$candidate" -c '$(SUITABLE)' 2>/dev/null) && break; python=; \
	done; \
	[ -n "$$python" ] || fail "Python 3.11, 3.12 or 3.13 is needed: $(if $(PYTHON),$(PYTHON) is not,none of $(PYTHONS) is). Install one, or say where it is: make PYTHON=/path/to/python3.12"; \
	"$$python" -c 'import venv, ensurepip' 2>/dev/null \
	  || fail "$$python cannot make virtual environments: on Debian and Ubuntu, install python3-venv."; \
	other=$$(cat .cache/installing 2>/dev/null) && kill -0 "$$other" 2>/dev/null \
	  && fail "Another make (process $$other) is installing into .venv: wait for it to end, or remove .cache/installing if there is none."; \
	rm -rf .venv || fail "The unfinished or outdated .venv cannot be removed: see above."; \
	free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	[ "$${free:-$(CUDA_GB)}" -ge $(CPU_GB) ] \
	  || fail "$(CPU_GB) GB of free disk are needed here ($(CUDA_GB) GB for a CUDA build of PyTorch); there are $$free."; \
	[ "$${free:-$(CUDA_GB)}" -ge $(CUDA_GB) ] \
	  || echo "$$free GB are free: enough for PyTorch's CPU build, too little for a CUDA build ($(CUDA_GB) GB)."; \
	echo "Installing into .venv with $$python: this takes minutes, once."; \
	trap 'rm -rf .cache/tmp .cache/installing' EXIT; trap 'exit 1' INT TERM; \
	mkdir -p .cache/tmp && echo $$$$ > .cache/installing && "$$python" -m venv .venv || fail "$$python could not make .venv: see above."; \
	TMPDIR="$(CACHE)/tmp" $(PY) -m pip install --retries 2 --disable-pip-version-check --no-input --only-binary :all: -r requirements.lock \
	  || fail "pip could not install what requirements.lock lists: see above. It needs the network (or an index that pip is configured with), disk space, and Linux (x86-64, aarch64) or macOS (arm64). Then run make again."; \
	$(PY) -c 'import cv2, numpy, torch' || fail "What was installed does not run here: see above."
	@touch $@
