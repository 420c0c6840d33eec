# %% [markdown]
# # The advantages side by side
#
# `peft-jax compare configs/compare/quickstart.yaml` runs full fine-tuning, the six techniques and two chains on one task, three seeds
# each. This notebook reads its report. Where there is none yet, it runs a small comparison of three recipes first.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("peft_jax") is None:  # on Colab, with a CPU, GPU or TPU
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "peft-jax"], check=True)

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from peft_jax.recipes.compare import run_comparison
from peft_jax.recipes.config import parse_config

path = Path("runs/compare/report.json")
if not path.is_file():
    countries = "builtin:countries"
    recipes = {
        "full": {
            "title": "full fine-tuning",
            "run": {"method": {"name": "full"}, "optimizer": {"learning_rate": 2e-3}},
        },
        "lora": {"title": "LoRA", "run": {"method": {"name": "lora", "rank": 8}}},
        "adapter": {"title": "adapter", "run": {"method": {"name": "bottleneck", "size": 32}}},
    }
    config = {
        "output": "runs/notebooks/compare",
        "data": {
            "kind": "completion",
            "sequence_length": 128,
            "train": {"path": countries, "split": "train"},
            "validation": None,
            "test": {"path": countries, "split": "test"},
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
        "train": {"steps": 30, "batch_size": 8, "log_every": 5, "tensorboard": False},
        "evaluate": {"metrics": ["perplexity"]},
        "compare": {"recipes": recipes, "seeds": [0, 1], "quality": "accuracy"},
    }
    run_comparison(parse_config(config), Console(quiet=True, force_jupyter=False))
    path = Path("runs/notebooks/compare/report.json")
report = json.loads(path.read_text())
print(f"{len(report['recipes'])} recipes, seeds {report['seeds']}, {report['about']['device']}")

# %% [markdown]
# ## Every advantage is a number of the run

# %%
for recipe in report["recipes"]:
    if recipe["name"] == report["reference"]:
        continue
    print(recipe["title"])
    for said in recipe["gains"] or ["no advantage over full fine-tuning on this task"]:
        print("   +", said)
    for said in recipe["costs"]:
        print("   -", said)

# %% [markdown]
# ## Quality against memory, and against what trains
#
# Up and to the left is better.

# %%
figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
for axis, key, unit in zip(axes, ("memory", "trained"), (1e6, 1), strict=True):
    for recipe in report["recipes"]:
        x, y = recipe["numbers"][key]["mean"] / unit, recipe["numbers"]["quality"]
        color = "tab:red" if recipe["name"] == report["reference"] else "tab:blue"
        axis.errorbar(x, y["mean"], yerr=y["spread"], fmt="o", color=color, capsize=3)
        axis.annotate(recipe["title"][:24], (x, y["mean"]), (5, 5), textcoords="offset points")
    axis.set(ylabel=report["quality"])
axes[0].set(xlabel="memory of a training step, MB")
axes[1].set(xlabel="trained parameters", xscale="log")
axes[1].xaxis.set_minor_formatter("")
plt.show()
numbers = {r["name"]: r["numbers"] for r in report["recipes"]}
assert numbers["lora"]["memory"]["mean"] < numbers["full"]["memory"]["mean"]
assert numbers["lora"]["trained"]["mean"] < 0.1 * numbers["full"]["trained"]["mean"]

# %% [markdown]
# ## When to use what
#
# - Memory of training is short: LoRA, adapters, QLoRA.
# - Many tasks on one base: LoRA or adapters, in a bank.
# - The model must be small where it is served: structured pruning and distillation, factorization, quantization.
# - Facts are missing: knowledge injection.
# - They combine: a chain is one YAML file (see the next notebook).
#
# Read on: Han et al. 2024, [a survey of parameter-efficient fine-tuning](https://arxiv.org/abs/2403.14608).
