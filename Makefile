# Everything a newcomer needs: `make run` and `make test`. No root; Python 3.11 or newer, git and make.

PYTHON = $(firstword $(foreach name,python3.11 python3.12 python3.13 python3, \
    $(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
SOURCES := gateway discovery policies observability open_inference reference_backend benchmarks deploy tests setup.py .ci/audit.py
COMPILED := build/compiled
FUZZED := tests/fuzz tests/corpora/test_openai_openapi.py
FUZZ_SECONDS ?= 600
# What is run again on the compiled build: stories and faults of the data path, and the decisions. The backends of
# test_balance.py are fakes below a class that is compiled, which takes none.
ROAD := tests/policies $(wildcard tests/integration/test_road_*.py) tests/integration/test_data_path.py \
    tests/faults/test_a_backends.py --ignore=tests/policies/test_balance.py
# Most tests wait most of the time: two run beside each other, each with its servers, ports and folders. Those that measure a
# machine or fill it (Ray) run alone, with those that fork, which no threads of gRPC must see; the compiler gives way to all
# (`nice`).
BESIDE := -n 2 --dist worksteal
ALONE := tests/soak tests/gateway/test_children.py tests/gateway/test_workers.py tests/integration/test_ray.py
HAS_CC = $(shell command -v $${CC:-cc})

.PHONY: setup run test test-alone test-compiled fuzz compiled check fmt stubs lock bench-peers soak clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed
	@sh .ci/install_torch.sh $(BIN)/python

run: setup
	@$(BIN)/weir up

test: setup
	@$(BIN)/python -m pytest $(BESIDE) $(addprefix --ignore=,$(ALONE))
	@$(MAKE) --no-print-directory -j2 test-alone $(if $(HAS_CC),compiled)
	@$(if $(HAS_CC),$(MAKE) --no-print-directory test-compiled,echo "no C compiler here: the compiled build is not tested")

test-alone: setup
	@$(BIN)/python -m pytest $(ALONE)

test-compiled: compiled
	@PYTHONPATH=$(COMPILED) $(BIN)/python -m pytest $(BESIDE) -o "pythonpath=$(COMPILED) ." $(ROAD)

# More of what Hypothesis tries in `make test`: other examples in each round, until the time is over.
fuzz: setup
	@end=$$(($$(date +%s) + $(FUZZ_SECONDS))); while [ $$(date +%s) -lt $$end ]; do \
	    $(BIN)/python -m pytest -q --hypothesis-profile=fuzz -o timeout=1200 $(FUZZED) || exit 1; done

# The same program with its data path compiled by mypyc: see docs/compiled.md.
compiled: $(COMPILED)/.made

$(COMPILED)/.made: $(VENV)/.installed setup.py $(shell find gateway discovery policies observability -name '*.py')
	@command -v $${CC:-cc} >/dev/null || { \
	    echo "make: no C compiler found; install gcc or clang (Debian: gcc), or run Weir as Python, which needs none" >&2; exit 3; }
	@echo "compiling the data path into $(COMPILED) (about a minute)"
	@rm -rf build
	@WEIR_COMPILE=1 nice $(BIN)/python -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps \
	    --target $(COMPILED) .
	@touch $@

check: $(VENV)/.installed
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(BIN)/python .ci/audit.py

fmt: $(VENV)/.installed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# What protoc makes of open_inference/inference.proto, in a pool of its own: in the common one its names would clash with
# those of a client library (Triton's) in the same process.
stubs: setup
	@$(BIN)/python -m grpc_tools.protoc -I open_inference --python_out=open_inference --pyi_out=open_inference inference.proto orca_load_report.proto
	@sed -i 's/_descriptor_pool.Default()/_descriptor_pool.DescriptorPool()/' open_inference/*_pb2.py

# Pins what the environment holds now. Upgrade there, test, then `make lock`. The local part of torch's version
# (+cpu, +cu130) is the machine's choice and not pinned.
lock: setup
	@$(BIN)/python -m pip freeze --all --exclude-editable | sed 's/^\(torch==[^+]*\)+.*/\1/' > constraints.txt

# Everything around the gateway breaks, under load, for half an hour: see docs/reliability.md. The 120 seconds of `make test`
# are `make soak SECONDS=120 SEED=1`: the same seed and time give the same faults again.
SECONDS := 1800
soak: setup
	@$(BIN)/python -m tests.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# The other gateways, each in its own folder under benchmarks/peers/: see docs/benchmarks.md.
bench-peers: setup
	@sh benchmarks/install_peers.sh

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

# The stamp is newer than what it was made from, or it is made again. pip itself comes first: groups need 25.1.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; install python3.11 (or newer) and try again" >&2; exit 3; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: $(PYTHON) cannot make environments; install its venv package (Debian: python3-venv) and try again" >&2; exit 3; }
	@echo "installing Weir into $(VENV) (about a minute)"
	@$(PIP) pip setuptools
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable '.[local]' --group dev --group tests
	@touch $@
