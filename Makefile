# Each target makes its own environment on a machine that has Python >= 3.10, a C++ compiler and make.
#   make train   train on the handwritten digits        make test    lint, types and tests
#   make bench   all tables of the processor            make lint    lint and types only
#   make bench-quick   its first table and the kernels, five minutes
#   make compare the last table of docs/users/measured.md, and README's picture of it
#   make test-fast                  the tests without the slow ones      make docs   the site, into build/site
#   make fuzz FUZZ_EXAMPLES=5000    random calls, as many for each test as asked for
#   make sanitize                   the operators' tests under ASan and UBSan, at each SIMD level of this processor
# On a machine with an NVIDIA GPU and a CUDA torch, offline, in six minutes each; make gpu is both:
#   make gpu-right OUT=folder   build, tests and compute-sanitizer     GPU_ARGS="--stages tests" runs some of it
#   make gpu-fast OUT=folder    build and benchmarks, against what was predicted
PYTHON ?= python3
VENV ?= .venv
TRAIN_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
COMPARE_ARGS ?=
FUZZ_EXAMPLES ?= 1000
OUT ?= runs/gpu
GPU_ARGS ?=

python := $(VENV)/bin/python
# What the environment and the compiled part are made from: a newer file prepares them again.
inputs := $(wildcard tools/prepare_venv.py pyproject.toml setup.py constraints.txt build_backend/*.py) \
          $(shell find csrc -type f)
cxx_files := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: train test test-fast lint pytest fuzz sanitize bench bench-quick compare docs gpu gpu-right gpu-fast clean

train: $(VENV)/.train
	$(python) -m densenet_ext train $(TRAIN_ARGS)

test: lint pytest

lint: $(VENV)/.dev
	ruff check .
	ruff format --check .
	$(python) -m mypy
	clang-format --dry-run -Werror $(cxx_files)

# Two files at a time, in the order of tests/support/order.py; threads that wait leave the processor to others.
run_tests = OMP_WAIT_POLICY=passive $(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
pytest: $(VENV)/.dev
	$(run_tests) $(TEST_ARGS)

# Neither what is marked slow, there or in tests/support/slow.py, nor random calls.
test-fast: $(VENV)/.dev
	$(run_tests) -m "not slow and not fuzz" $(TEST_ARGS)

fuzz: $(VENV)/.dev
	OMP_WAIT_POLICY=passive FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(python) -m pytest -n 2 -m fuzz $(TEST_ARGS)

sanitize: $(VENV)/.dev
	$(python) tools/sanitize.py $(TEST_ARGS)

# All tables of README and of docs/users/measured.md but for those of a GPU and of `make compare`.
# BENCH_ARGS="--efficient FOLDER": with a clone of gpleiss/efficient_densenet_pytorch instead of the tests' look-alike.
# An interrupted run of `depth` goes on.
bench: $(VENV)/.dev
	$(python) -m benchmarks $(BENCH_ARGS)
	$(python) -m benchmarks workloads
	$(python) -m benchmarks roofline
	$(python) -m benchmarks profile
	$(python) -m benchmarks host
	$(python) -m benchmarks depth
	$(python) -m benchmarks table

bench-quick: $(VENV)/.dev
	$(python) -m benchmarks workloads --no-compile --rounds 3 --seconds 200 --out build/bench/workloads.json
	$(python) -m benchmarks roofline --shortest 0 --out build/bench/roofline.json
	$(python) -m benchmarks host --rounds 5 --out build/bench/host.json

# The last table of README and its picture.
compare: $(VENV)/.dev
	rm -rf build/compare
	$(python) -m densenet_ext compare --seeds 5 --out build/compare $(COMPARE_ARGS)
	cp build/compare/comparison.json benchmarks/results/compare-digits.json
	cp build/compare/comparison.png docs/pictures/compare-digits.png
	$(python) -m benchmarks table

docs: $(VENV)/.docs
	$(python) tools/build_site.py

gpu:
	$(MAKE) --keep-going gpu-right gpu-fast

gpu-right gpu-fast: gpu-%:
	$(PYTHON) tools/gpu.py $* --out $(OUT) $(GPU_ARGS)

$(VENV)/.train $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(inputs)
	$(PYTHON) tools/prepare_venv.py $(VENV) $*
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info densenet_ext/_C.*.so
