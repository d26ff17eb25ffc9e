# make demo      the whole story on this machine, in minutes (make demo FRESH=1 starts over)
# make test      all tests, the notebooks included, in two processes with a core each
# make test-slow the real models on this machine's CPU (14 GB) and a killed rank under torchrun, some 15 minutes
# make lint      the linter, the formatter and the type checker
# make lab       JupyterLab on the notebooks
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo lint test test-package test-notebooks test-slow lab clean

demo: .venv/installed
	$(BIN)/python -m kl3m_nb demo $(if $(FRESH),--fresh)

test: .venv/installed
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --output-sync=target test-package test-notebooks

test-package: .venv/installed
	$(BIN)/python -m pytest tests --ignore=tests/notebooks/test_static.py

# The static test stands here for its conftest.py, which gives the notebooks an empty runs/.
test-notebooks: .venv/installed
	$(BIN)/python -m pytest tests/notebooks/test_static.py notebooks

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow tests

lint: .venv/installed
	$(BIN)/ruff check kl3m_nb tests benchmarks
	$(BIN)/ruff format --check kl3m_nb tests benchmarks
	$(BIN)/mypy

lab: .venv/installed
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

# The mark is written last, so an installation that broke off is taken up again; it is done anew when the versions change.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
