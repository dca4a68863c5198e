# Two commands: `make run` runs the lessons, `make test` tests them. Both install what they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lab retrain doctor lint clean

run: .venv/installed          ## run all lessons and print the paper's tables beside ours
	$(BIN)/advlab run

test: .venv/installed         ## unit tests, then every lesson by papermill and nbval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lab: .venv/installed          ## open JupyterLab on the lessons
	$(BIN)/jupyter lab notebooks

retrain: .venv/installed      ## train all models anew (hours); refresh notebooks and figures
	$(BIN)/advlab retrain

doctor: .venv/installed       ## check this machine
	$(BIN)/advlab doctor

lint: .venv/installed         ## style of code and notebooks
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:                        ## remove the environment and all outputs
	rm -rf .venv outputs

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[test]"
	touch .venv/installed
