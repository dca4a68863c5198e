# Two commands: `make run` runs the lessons, `make test` tests them. Both install what they need.
PYTHON ?= python3
BIN := .venv/bin
ADVLAB := $(BIN)/python -m advlab
# The exact versions that the committed numbers were made with.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: run test lab reproduce retrain audit bench libraries course browser site doctor lint clean

run: .venv/installed          ## run all lessons and print the paper's tables beside ours
	$(ADVLAB) run

test: .venv/installed         ## unit tests, then every lesson by papermill and nbval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 --durations 25

# Torch's threads that wait for work leave the cores to other notebooks; who sets the variable decides.
lab: export OMP_WAIT_POLICY ?= passive
lab: .venv/installed          ## open JupyterLab on the lessons
	$(BIN)/python -m jupyter lab notebooks

reproduce: .venv/installed    ## the whole paper from nothing by the recipe FAST (30 to 40 minutes)
	$(ADVLAB) reproduce

retrain: .venv/installed      ## train all models anew (hours); refresh notebooks and figures
	$(ADVLAB) retrain

audit: .venv/installed        ## attack every shipped model, AutoAttack included (hours; resumes)
	$(ADVLAB) audit

bench: libraries              ## speed beside the paper's way and other libraries (minutes)
	$(ADVLAB) bench

# torchattacks pins an old `requests` that JupyterLab cannot live with, hence --no-deps.
libraries: .venv/installed    ## torchattacks, foolbox, ART and pyautoattack, to compare with
	$(PIP) --quiet --editable ".[bench,audit]"
	$(PIP) --quiet --no-deps torchattacks

course: .venv/installed       ## nbgrader, and the student versions of the assignments
	$(PIP) --quiet --editable ".[course]"
	$(ADVLAB) course build

browser: .venv/installed      ## what the tests in a browser need beside Chromium
	$(PIP) --quiet --editable ".[browser]"

site: .venv/installed         ## the lessons as a site to be read in a browser, in outputs/site
	$(PIP) --quiet --editable ".[course,site]"
	$(ADVLAB) site

doctor: .venv/installed       ## check this machine
	$(ADVLAB) doctor

lint: .venv/installed         ## style of code and notebooks, and types
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check . && $(BIN)/python -m mypy
	$(BIN)/python -m advlab.upkeep.hygiene

clean:                        ## remove the environment and all outputs
	rm -rf .venv outputs

# The package makes its environment itself, on systems without make too: `python -m advlab setup`.
.PHONY: .venv/installed
.venv/installed:
	@$(PYTHON) -m advlab setup
