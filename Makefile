# The menu: one line per verb, no logic. Values travel by environment, so quotes, spaces and $ survive.
VALUES := RECIPE PROFILE MODEL DATA CONFIG FILE OUTPUT SET ENGINE GPUS DRY OVERWRITE CHECKPOINT PROMPT INPUT ADAPTERS WEIGHTS COMBINATION FORCE SECTION GPU KIND NAME ARG REGISTRY IMAGE CLOUD SPOT AS OUTPUTS
# To make itself AS is the assembler, and to conda's environments too.
ifneq ($(origin AS),command line)
override AS :=
endif
$(foreach v,$(VALUES),$(eval override export $v := $$(value $v)))

VENV := .venv
INVOKE := $(VENV)/bin/python -m invoke

.DEFAULT_GOAL := help
.PHONY: help setup new train resume infer evaluate merge check verify import plan launch status logs fetch stop prices adapters doctor gpu-config explain schema build push pull engine lock test lint bench clean

help: ## print this menu
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

train: setup ## train a recipe: make train [RECIPE=llm-qlora PROFILE=tiny MODEL=.. DATA=.. CONFIG=.. OUTPUT=output SET="lora.r=8" ENGINE=auto|docker|local GPUS=auto|none|all|N (auto: those that are there and divide the batch) DRY=1 OVERWRITE=1]
	@$(INVOKE) train --recipe "$$RECIPE" --profile "$$PROFILE" --model "$$MODEL" --data "$$DATA" --config "$$CONFIG" --output "$$OUTPUT" --set "$$SET" --engine "$$ENGINE" --gpus "$$GPUS" --dry "$$DRY" --overwrite "$$OVERWRITE"

new: setup ## start a project: make new KIND=classification|generation|fine-tuning|peft|image-lora|custom NAME=.. [MODEL=.. ARG=.. CONFIG=.. OUTPUT=folder]
	@$(INVOKE) new --kind "$$KIND" --name "$$NAME" --model "$$MODEL" --arg "$$ARG" --config "$$CONFIG" --output "$$OUTPUT"

resume: setup ## go on from the newest checkpoint: make resume [OUTPUT=output] [CHECKPOINT=output/checkpoint-500] [SET="limits.memory=32g" GPUS=.. ENGINE=..] [FORCE=1]
	@$(INVOKE) resume --checkpoint "$$CHECKPOINT" --output "$$OUTPUT" --set "$$SET" --force "$$FORCE" --engine "$$ENGINE" --gpus "$$GPUS"

infer: setup ## ask a trained model: make infer [CHECKPOINT=output/final] [PROMPT=".." | INPUT=rows.jsonl OUTPUT=answers.jsonl] [ADAPTERS="a=path b=path"]
	@$(INVOKE) infer --checkpoint "$$CHECKPOINT" --prompt "$$PROMPT" --input "$$INPUT" --output "$$OUTPUT" --adapter "$$ADAPTERS" --engine "$$ENGINE" --gpus "$$GPUS"

evaluate: setup ## the recipe's metrics on new data: make evaluate [CHECKPOINT=output/final] DATA=new.jsonl
	@$(INVOKE) evaluate --checkpoint "$$CHECKPOINT" --data "$$DATA" --output "$$OUTPUT" --engine "$$ENGINE" --gpus "$$GPUS"

merge: setup ## write adapter + base as one model [CHECKPOINT=output/final OUTPUT=merged], or several adapters as one: ADAPTERS="a=path b=path" WEIGHTS="0.7 0.3" [COMBINATION=cat|svd|linear..]
	@$(INVOKE) merge --checkpoint "$$CHECKPOINT" --adapter "$$ADAPTERS" --weights "$$WEIGHTS" --combination "$$COMBINATION" --output "$$OUTPUT" --engine "$$ENGINE"

plan: setup ## memory, GPU, time and cost of a run before anything is spent: make plan [RECIPE=.. MODEL=hub name, folder or config.json DATA=.. SET=.. GPU="A100 80GB"]
	@$(INVOKE) plan --recipe "$$RECIPE" --profile "$$PROFILE" --model "$$MODEL" --data "$$DATA" --config "$$CONFIG" --set "$$SET" --gpu "$$GPU" --engine "$$ENGINE"

launch: setup ## run on a rented machine, checked before anything is spent: make launch CLOUD=runpod|aws|gcp|lambda|kubernetes|slurm|..[/region] [RECIPE=.. and all that train takes] [GPU="2x A100 80GB"|none SPOT=1 REGISTRY=push there first OUTPUTS=s3://bucket|volume (it outlives the machine) DRY=1 AS=sky|k8s|compose|slurm (only write it down) FORCE=1]
	@$(INVOKE) launch --recipe "$$RECIPE" --profile "$$PROFILE" --model "$$MODEL" --data "$$DATA" --config "$$CONFIG" --output "$$OUTPUT" --set "$$SET" --engine "$$ENGINE" --cloud "$$CLOUD" --gpu "$$GPU" --gpus "$$GPUS" --spot "$$SPOT" --registry "$$REGISTRY" --as "$$AS" --outputs "$$OUTPUTS" --dry "$$DRY" --overwrite "$$OVERWRITE" --force "$$FORCE"

status: setup ## how a launched run is: make status [OUTPUT=output]
	@$(INVOKE) status --output "$$OUTPUT"

logs: setup ## what a launched run says, to its end
	@$(INVOKE) logs --output "$$OUTPUT"

fetch: setup ## bring a launched run's outputs here; once it is over and all is as recorded, its machine is let go
	@$(INVOKE) fetch --output "$$OUTPUT"

stop: setup ## end a launched run: saved, fetched, checked, its machine let go [FORCE=1: not fetched]
	@$(INVOKE) stop --output "$$OUTPUT" --force "$$FORCE"

prices: setup ## refresh the prices of GPUs from SkyPilot's catalogues on this machine
	@$(INVOKE) prices

check: setup ## what the data holds, checked as a training would; for images a contact sheet: make check RECIPE=.. DATA=.. [OUTPUT=contact-sheet.png]
	@$(INVOKE) check --recipe "$$RECIPE" --profile "$$PROFILE" --data "$$DATA" --config "$$CONFIG" --set "$$SET" --output "$$OUTPUT"

verify: setup ## recheck a run's files against its record: make verify [OUTPUT=output]
	@$(INVOKE) verify --output "$$OUTPUT"

import: setup ## translate a configuration of axolotl, LLaMA-Factory, kohya, ai-toolkit or PEFT: make import FILE=axolotl.yml [OUTPUT=mine.yaml]
	@$(INVOKE) import "$$FILE" --output "$$OUTPUT"

adapters: setup ## list the adapters below a folder: make adapters [OUTPUT=output]
	@$(INVOKE) adapters --output "$$OUTPUT"

doctor: setup ## what this machine can do, and which fields of gpu.jsonc are left to GPU CLI: make doctor [RECIPE=..] [CONFIG=..]
	@$(INVOKE) doctor --recipe "$$RECIPE" --config "$$CONFIG"

gpu-config: setup ## write a gpu.jsonc for a recipe: make gpu-config RECIPE=.. [MODEL=.. OUTPUT=gpu.jsonc OVERWRITE=1]
	@$(INVOKE) gpu-config "$$RECIPE" --model "$$MODEL" --config "$$CONFIG" --output "$$OUTPUT" --overwrite "$$OVERWRITE"

explain: setup ## every field of a recipe, with type, default and meaning: make explain [SECTION=lora]
	@$(INVOKE) explain --section "$$SECTION"

schema: setup ## write the recipe's JSON Schema for editors
	@$(INVOKE) schema

build: setup ## build the images: make build [RECIPE="a b"] (all of them without)
	@$(INVOKE) build --recipe "$$RECIPE" --engine "$$ENGINE"

push: setup ## push images to a registry, once per layer, after docker login: make push REGISTRY=host[:port]/prefix [RECIPE="a b"|all]
	@$(INVOKE) push --recipe "$$RECIPE" --registry "$$REGISTRY"

pull: setup ## get images back by digest: make pull REGISTRY=host[:port]/prefix [RECIPE="a b"|all], or IMAGE=registry/repo@sha256:..
	@$(INVOKE) pull --recipe "$$RECIPE" --registry "$$REGISTRY" --image "$$IMAGE"

engine: setup ## as root on Debian or Ubuntu: install and start a container engine
	@$(INVOKE) engine

lock: setup ## refresh every lock and print what changed
	@$(INVOKE) lock

test: setup ## lint, types and every test, those in containers included
	@$(INVOKE) test

lint: setup ## ruff and mypy
	@$(INVOKE) lint

bench: setup ## measure the figures that the README quotes
	@$(INVOKE) bench

clean: ## remove .venv, .venv-cloud and the tools' caches (outputs, images and downloads stay)
	@rm -rf $(VENV) .venv-cloud .venv-cloud.lock .pytest_cache .mypy_cache .ruff_cache

setup: $(VENV)/.ready

# The .pth line is relative to site-packages, so the tree may be moved or renamed.
$(VENV)/.ready: requirements.lock
	@python=$$(for p in python3 python3.13 python3.14 python3.12 python3.11; do \
	    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done); \
	[ -n "$$python" ] || { echo "error: no Python >= 3.11 found"; echo "  install one, on Debian: apt-get install python3 python3-venv"; exit 2; } >&2; \
	$$python -c 'import venv, ensurepip' 2>/dev/null || { \
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing Debian's python3-venv" && \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv; } >/dev/null; } || \
	    { echo "error: $$python cannot make virtual environments"; echo "  run: sudo apt-get install python3-venv"; exit 2; } >&2; \
	echo "making $(VENV) from requirements.lock (once, about half a minute)" && \
	$$python -m venv --clear $(VENV) && \
	$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock && \
	echo ../../../../src > "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/trainbox.pth" && \
	touch $@
