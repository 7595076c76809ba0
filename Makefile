# One command each: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
# Packages are installed with --no-compile: Python compiles what is imported, which is a small part of them.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-oldest
demo: $(VENV)/installed
	$(RUN) train.py --resume
	$(RUN) train.py --objective.name bt --resume
	$(RUN) decode.py --batch-size 100 --max-new-tokens 64

test: $(VENV)/installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# On the oldest versions that are allowed; without PyTorch, tests that compare with it are skipped or left out.
test-oldest: tests/oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --no-compile --editable . pytest hypothesis --constraint tests/oldest.txt
	$(VENV)-oldest/bin/python -m pytest tests/data tests/text tests/test_config.py tests/training/test_fingerprints.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --editable '.[report]'
	touch $@

$(VENV)/installed-test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --editable '.[test]'
	touch $@
