# make report | test | lab | docs | readme | install       PYTHON=python3.12 chooses the Python that .venv is made with
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
export PYTHONNOUSERSITE = 1

.PHONY: help report test lab docs readme install
help:
	@echo 'make report   install, fine-tune the small base model three ways and open the way to the reports (minutes)'
	@echo 'make test     every notebook and tests/, on two processes'
	@echo 'make lab      JupyterLab on the notebooks (LAB=--no-browser and the like are passed on)'
	@echo 'make readme   README.md from nbs/index.ipynb'
	@echo 'make docs     the docs site, or what it is made from where Quarto is missing'
	@echo 'make install  only make .venv and install into it'

.venv/installed: settings.ini setup.py pyproject.toml tools/install.sh
	@tools/install.sh $(PYTHON)

install: .venv/installed

report: install
	@HF_HUB_OFFLINE=1 $(BIN)/llmft run params/sweeps/quickstart.yaml

test: install
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

lab: install
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.default_url=/lab/tree/nbs/experiments/finetune.ipynb $(LAB)

readme: install
	@$(BIN)/python tools/readme.py

docs: install
	@$(BIN)/python tools/docs.py
