# make demo    sets everything up in .venv, then trains and scores a recogniser of five languages (recipes/prompts5)
# make test    sets everything up in .venv, then passes the tests
# make lint    style and types
#
# All can be given again after an interruption; what is done stays done. Needed: make, Python 3.11-3.13, 9 GB of disk (PyTorch).
#
# PYTHON=python3.12        which Python to take, if not the newest that fits
# SOURCE=folder            where the packages of the prompt corpus lie, if apt cannot fetch them
# FIT="--trainer.x y"      options of `mole-asr fit` for the demo
# OUT, DATA, FILE          of the demo, see recipes/prompts5/run.sh

SHELL = /bin/bash
.DEFAULT_GOAL = help
.NOTPARALLEL:
.PHONY: help demo test lint

# A Python is fit if it can make a virtual environment; Debian and Ubuntu keep that in a package of its own (ensurepip).
VERSION_FITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
FITS = import ensurepip, venv; $(VERSION_FITS)
PIP = .venv/bin/python -m pip --disable-pip-version-check

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: .venv/demo.stamp
	SOURCE="$(SOURCE)" OUT="$(OUT)" DATA="$(DATA)" FILE="$(FILE)" bash recipes/prompts5/run.sh $(FIT)

test: .venv/test.stamp
	$(if $(SOURCE),MOLE_ASR_PROMPTS="$(SOURCE)") .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The stamps say that an installation went to its end; pip keeps what an interrupted one had fetched.
.venv/demo.stamp: pyproject.toml .venv/made.stamp
	$(PIP) install --editable .
	@touch $@

.venv/test.stamp: pyproject.toml .venv/made.stamp
	$(PIP) install --editable '.[dev]'
	@touch $@ .venv/demo.stamp

.venv/made.stamp:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
		if $$python -c '$(FITS)' 2>/dev/null; then \
			echo "making .venv with $$python"; \
			exec sh -c "$$python -m venv .venv && touch $@"; \
		elif $$python -c '$(VERSION_FITS)' 2>/dev/null; then \
			lacking=$${lacking:-$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')}; \
		fi; \
	done; \
	if [ -z "$$lacking" ]; then \
		echo "no Python 3.11, 3.12 or 3.13: install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name one with PYTHON=..." >&2; \
		exit 1; \
	elif [ "$$(id -u)" != 0 ] || [ -n "$$TRIED_APT" ]; then \
		echo "Python lacks its venv module: apt-get install $$lacking" >&2; \
		exit 1; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; apt-get update -q && apt-get install -qy $$lacking && TRIED_APT=1 $(MAKE) $@
