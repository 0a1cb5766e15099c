# vlm-bridge: set-up, quickstart and checks. `make help` lists the targets.

# Where the environment goes and which interpreter makes it; e.g. `make install PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
# Written last, so an interrupted installation is taken up again; the files below are all it depends on.
STAMP := $(VENV)/.installed

# Tools live in an environment of their own: what they need must not choose what we use.
TOOLS := $(VENV)/release

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
	@# torch first: it is the one large package, and nothing after it may choose another build. What builds an
	@# editable install is pinned too.
	$(BIN)/python -m pip install torch hatchling editables --constraint constraints.txt
	$(BIN)/python -m pip install --no-build-isolation --editable '.[lite,photos,demo,dev]' --constraint constraints.txt
	$(BIN)/vlm-bridge weights
	@touch $@

.PHONY: quickstart
quickstart: install ## Install, then train, evaluate and caption on this machine in minutes
	$(BIN)/vlm-bridge quickstart

# An image that scikit-image brings, for those who have none at hand.
EXAMPLE = $(BIN)/python -c 'import skimage; print(skimage.__path__[0] + "/data/coffee.png")'

.PHONY: caption
caption: install ## Install, then caption an image: make caption IMAGE=photo.jpg (without one, an example)
	@[ -n "$(IMAGE)" ] || echo "captioning an example, a cup of coffee; yours: make caption IMAGE=photo.jpg" >&2
	@image="$(IMAGE)"; $(BIN)/vlm-bridge caption "$${image:-$$($(EXAMPLE))}"

.PHONY: test
test: install ## Install, then run every test and the linter
	$(BIN)/python -m pytest -n 2
	@$(BIN)/ruff check --quiet

# Two environments of their own say what the ranges in pyproject.toml say: each runs the whole suite, with the locked
# torch, whose other builds are gigabytes. The newest versions are those of today, whatever constraints.txt pins.
TESTED_EXTRAS := lite,photos,demo,dev
TORCH = $$(grep '^torch==' constraints.txt)

.PHONY: test-newest
test-newest: ## Run every test with the newest versions of everything, in .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$(TORCH)"
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager "$(TORCH)" \
	  --editable '.[$(TESTED_EXTRAS)]'
	.venv-newest/bin/vlm-bridge weights
	-.venv-newest/bin/vlm-bridge doctor
	.venv-newest/bin/python -m pytest -n 2

.PHONY: test-lowest
test-lowest: $(TOOLS)/.installed ## Run every test with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	@mkdir -p build
	echo "$(TORCH)" | $(TOOLS)/bin/uv pip compile --quiet --no-config --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --resolution lowest-direct --python .venv-lowest/bin/python pyproject.toml - \
	  --extra lite --extra photos --extra demo --extra dev > build/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet "$(TORCH)"
	.venv-lowest/bin/python -m pip install --quiet --constraint build/lowest.txt --editable '.[$(TESTED_EXTRAS)]'
	.venv-lowest/bin/vlm-bridge weights
	-.venv-lowest/bin/vlm-bridge doctor
	.venv-lowest/bin/python -m pytest -n 2

.PHONY: lint
lint: install ## Check formatting, lint, types and workflows
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

.PHONY: format
format: install ## Rewrite the sources in the house format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# The fifth stage three times: as its recipe says, on other crops (each seen once: nothing to cache), and for longer.
# The last stage twice.
CAPTIONER := runs/captioner-flickr8k
FIFTH_STAGE := config/captioner-flickr8k-views-scst.yaml --resume auto
LAST_STAGE := config/captioner-flickr8k-words-scst.yaml --resume auto
HELD_OUT := data/flickr8k-held-out

.PHONY: captioner
captioner: install ## Train the captioner that comes with the package, from data/flickr8k; typed again, it goes on
	$(BIN)/vlm-training --config config/captioner-flickr8k.yaml --resume auto
	$(BIN)/vlm-training --config config/captioner-flickr8k-long.yaml --resume auto
	$(BIN)/vlm-training --config config/captioner-flickr8k-scst.yaml --resume auto
	$(BIN)/vlm-training --config config/captioner-flickr8k-views.yaml --resume auto
	$(BIN)/vlm-training --config $(FIFTH_STAGE)
	$(BIN)/vlm-training --config $(FIFTH_STAGE) seed=1 feature_cache=off \
	  output_dir=$(CAPTIONER)-views-second
	$(BIN)/vlm-training --config $(FIFTH_STAGE) max_steps=400 num_epochs=2 \
	  output_dir=$(CAPTIONER)-views-third
	$(BIN)/vlm-bridge average $(CAPTIONER)-views-scst $(CAPTIONER)-views-second $(CAPTIONER)-views-third \
	  --output-dir $(CAPTIONER)-views-mean --overwrite
	[ -d $(HELD_OUT) ] || $(BIN)/python -m benchmarks.hold_out --data-dir data/flickr8k --output-dir $(HELD_OUT)
	$(BIN)/vlm-training --config config/captioner-flickr8k-words.yaml --resume auto
	$(BIN)/vlm-training --config $(LAST_STAGE)
	$(BIN)/vlm-training --config $(LAST_STAGE) seed=1 max_steps=150 output_dir=$(CAPTIONER)-words-second
	$(BIN)/vlm-bridge average $(CAPTIONER)-words-scst $(CAPTIONER)-words-second \
	  --named-apart-from $(CAPTIONER)-views-mean --output-dir $(CAPTIONER)-final --overwrite
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
	rm -rf $(VENV) .venv-lowest .venv-newest build dist site .pytest_cache .ruff_cache
	find src tests benchmarks -type d -name __pycache__ -exec rm -rf {} +

# Releases and the supply chain.
$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet build twine pip-audit cyclonedx-bom uv
	@touch $@

.PHONY: lock
lock: $(TOOLS)/.installed ## Choose the newest version of every package, in constraints.txt and in pyproject.toml
	$(TOOLS)/bin/python scripts/lock.py $(TOOLS)/bin/uv

.PHONY: audit
audit: $(TOOLS)/.installed ## Look for known vulnerabilities in every pinned package
	@# Of all systems and Pythons: without markers, and a package of two versions in two files.
	@# Strict: a package that nobody could look up is a failure.
	@rm -rf build/audit && mkdir -p build/audit
	@sed '/^#/d; s/ *;.*//' constraints.txt | awk -F == '{ print > ("build/audit/" ++seen[$$1] ".txt") }'
	@for pins in build/audit/*.txt; do \
	  $(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --requirement "$$pins" || failed=yes; \
	done; [ -z "$$failed" ]

.PHONY: dist
dist: $(TOOLS)/.installed ## Build wheel and source distribution into dist/, and check what they say of themselves
	rm -rf dist
	$(TOOLS)/bin/python -m build
	$(TOOLS)/bin/twine check --strict dist/*

.PHONY: sbom
sbom: $(TOOLS)/.installed ## Write the bill of materials of a release (CycloneDX) into dist/
	@mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --output-reproducible \
	  --output-format JSON --output-file dist/sbom.cdx.json
