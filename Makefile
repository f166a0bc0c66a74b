# Thin wrappers over bootstrap.py, which also runs where there is no make:
#   python bootstrap.py demo CHECKPOINT=my-model.safetensors
PYTHON ?= python3

TARGETS := demo test lint serve bench card setup clean
SETTINGS := CHECKPOINT PACK STEPS ARGS PORT OPEN NAME ALL FAST HOST

.PHONY: help $(TARGETS)

help:
	@$(PYTHON) bootstrap.py --help

# Only settings given on make's command line are handed on; the shell takes their values from the
# environment, where make puts them, so that quotes and spaces survive. exec: a shell in between would die of Ctrl-C,
# and make would call that an error.
$(TARGETS):
	@exec $(PYTHON) bootstrap.py $@ $(foreach name,$(SETTINGS),$(if $(filter command,$(firstword $(origin $(name)))),"$(name)=$$$(name)"))
