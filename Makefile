# SPDX-License-Identifier: Apache-2.0
# One command per job. `make demo` and `make test` do all set-up by themselves on a fresh Debian 12.

PYTHON ?= python3
# Tests mostly wait, so two for each processor.
PROCESSES ?= $(shell n=$$((2 * $$(nproc))); echo $$((n < 8 ? n : 8)))
VENV := .venv
STAMP := $(VENV)/installed
S3_STAMP := build/s3server/installed
RUN := $(VENV)/bin/python

# What the test suite and the bench use beside Python; stasis itself needs none of it.
DEBIAN_PACKAGES := python3-venv e2fsprogs xfsprogs util-linux mount fuse3 fio nbdkit libnbd-bin python3-libnbd \
	nbd-client qemu-utils qemu-system-common gnutls-bin openssl strace file groff-base systemd criu \
	gcc libc6-dev tmux redis-tools
# The S3 server of the tests comes from npm. Node from elsewhere brings its own, which Debian's package would clash with.
DEBIAN_PACKAGES += $(if $(shell command -v npm),,npm)
BENCH_PACKAGES := restic borgbackup
VM_PACKAGES := qemu-system-x86 busybox-static cpio kmod xz-utils dmsetup

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-backup bench-process bench-live bench-datto figures man lint vmtest deps print-packages clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## Snapshot and copy two disks under load, in about a minute, without root
	@$(RUN) tools/demo.py $(DEMO_OPTIONS)

test: $(STAMP) $(S3_STAMP) ## Run the test suite (TESTS=... and PYTEST_OPTIONS=... narrow it, PROCESSES=0: one by one)
	@$(RUN) -m compileall -q src # what is started thousands of times need not be compiled each time
	@$(RUN) -m pytest -n $(PROCESSES) --dist worksteal $(PYTEST_OPTIONS) $(TESTS)

bench: $(STAMP) ## Measure against nbdkit and qemu-storage-daemon; writes bench/results/
	@$(RUN) bench/run.py $(BENCH_OPTIONS)

bench-backup: $(STAMP) ## Measure backups against restic, borg, qemu-img and cp
	@$(RUN) bench/run.py --suite backup $(BENCH_OPTIONS)

bench-process: $(STAMP) ## Measure checkpoints of processes, as root
	@$(RUN) bench/run.py --suite process $(BENCH_OPTIONS)

bench-live: $(STAMP) ## Measure tracking and copying of live devices, as root
	@$(RUN) bench/run.py --suite live $(BENCH_OPTIONS)

bench-datto: $(STAMP) ## Measure dattobd's tracers and update-img
	@$(RUN) bench/run.py --suite datto $(BENCH_OPTIONS)

figures: $(STAMP) ## Write results of the bench into README.md and docs/figures.md (RESULTS=FILE...)
	@$(RUN) tools/figures.py $(or $(RESULTS),$(lastword $(sort $(wildcard bench/results/*.json))))

man: $(STAMP) ## Build the manual pages and shell completions into build/
	@$(RUN) tools/build_man.py build/man
	@$(RUN) tools/build_completion.py build/completion

lint: $(STAMP) ## Check style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

vmtest: $(STAMP) $(S3_STAMP) ## Run tests/vm as root on Debian's 6.1 and 6.12 kernels, in a virtual machine
	@tools/vmtest setup
	@tools/vmtest test

deps: ## Install the Debian packages that tests and bench use (as root), or name them
	@if [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive \
			apt-get install -q -y --no-install-recommends $(DEBIAN_PACKAGES) $(BENCH_PACKAGES); \
	else \
		echo "Run as root: apt-get install --no-install-recommends $(DEBIAN_PACKAGES) $(BENCH_PACKAGES)"; \
	fi
	@echo "make vmtest also needs: $(VM_PACKAGES)"

print-packages:
	@echo $(DEBIAN_PACKAGES)

clean: ## Remove the environment and everything built
	@rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml tools/setup-env
	@PYTHON=$(PYTHON) tools/setup-env $(VENV)

$(S3_STAMP): tools/setup-s3 tools/s3server/package.json tools/s3server/package-lock.json
	@tools/setup-s3 build/s3server
