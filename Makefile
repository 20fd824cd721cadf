# make report | test | gpu-check | lab | docs | docs-serve | readme | install       PYTHON=python3.12 chooses the Python that .venv is made with
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 3
export PYTHONNOUSERSITE = 1
export PIP_USER = 0

.PHONY: help report test gpu-check lab docs docs-serve readme install
help:
	@echo 'make report   install, fine-tune the small base model three ways and open the way to the reports (minutes)'
	@echo 'make test     every notebook and tests/, on three processes'
	@echo 'make gpu-check  is this GPU right, how fast, and does memory go as planned (ten minutes)'
	@echo 'make lab      JupyterLab on the notebooks (LAB=--no-browser and the like are passed on)'
	@echo 'make readme   README.md from nbs/index.ipynb'
	@echo 'make docs     the docs site, in _docs'
	@echo 'make docs-serve  shows it on localhost (PORT=8000), and builds it first where there is none'
	@echo 'make install  only make .venv and install into it'

.venv/installed: settings.ini setup.py pyproject.toml tools/install.sh
	@tools/install.sh "$(PYTHON)"

install: .venv/installed

report: install
	@HF_HUB_OFFLINE=1 $(BIN)/llmft run params/sweeps/quickstart.yaml

# What the docs and the tests need beside the rest; make report does not.
.venv/docs: .venv/installed
	@$(BIN)/python -m pip install -q --progress-bar off --disable-pip-version-check -e '.[docs]' 2> >(grep -v 'is ignored: it is neither' >&2)
	@touch .venv/docs

.venv/extras: .venv/docs
	@missing=; for extra in zero cluster trackers; do \
	  DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --progress-bar off --disable-pip-version-check -e ".[$$extra]" 2> >(grep -v 'is ignored: it is neither' >&2) || \
	    { missing="$$missing $$extra"; echo "the extra $$extra could not be installed: its tests are skipped"; }; \
	done; \
	if [ -z "$$missing" ]; then touch .venv/extras; elif [ -n "$$CI" ]; then exit 1; fi

test: .venv/extras
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

gpu-check: install
	@HF_HUB_OFFLINE=1 $(BIN)/llmft gpu-check

lab: install
	@JUPYTER_CONFIG_PATH="$(CURDIR)/tools/lab$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.app_settings_dir=tools/lab --LabApp.default_url=/lab/tree/nbs/experiments/finetune.ipynb $(LAB)

readme: install
	@$(BIN)/python tools/readme.py

docs: .venv/docs
	@$(BIN)/python tools/docs.py

docs-serve: .venv/docs
	@$(BIN)/python tools/docs.py --serve --port $(or $(PORT),8000)
