# Two commands: `make run` runs the lessons, `make test` tests them. Both install what they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lab reproduce retrain audit bench libraries course doctor lint clean

run: .venv/installed          ## run all lessons and print the paper's tables beside ours
	$(BIN)/advlab run

test: .venv/installed         ## unit tests, then every lesson by papermill and nbval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1

lab: .venv/installed          ## open JupyterLab on the lessons
	$(BIN)/jupyter lab notebooks

reproduce: .venv/installed    ## the whole paper from nothing by the recipe FAST (half an hour)
	$(BIN)/advlab reproduce

retrain: .venv/installed      ## train all models anew (hours); refresh notebooks and figures
	$(BIN)/advlab retrain

audit: .venv/installed        ## attack every shipped model, AutoAttack included (hours; resumes)
	$(BIN)/advlab audit

bench: libraries              ## speed beside the paper's way and other libraries (minutes)
	$(BIN)/advlab bench

# torchattacks pins an old `requests` that JupyterLab cannot live with, hence --no-deps.
libraries: .venv/installed    ## torchattacks, foolbox and ART, to compare with
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[bench]"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps torchattacks==3.5.1

course: .venv/installed       ## nbgrader, and the student versions of the assignments
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[course]"
	$(BIN)/advlab course build

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
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[test,audit]"
	touch .venv/installed
