# %% [markdown]
# # Pruning
#
# Many weights matter little. Pruning sets them to zero by a score. Wanda's score of a weight is its size times the size of its input:
#
# $$S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2$$
#
# SparseGPT also changes the weights that stay, so that each layer's output remains as it was.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("peft_jax") is None:  # on Colab, with a CPU, GPU or TPU
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "peft-jax"], check=True)

# %% [markdown]
# ## The task
#
# A small model of English novels answers questions about countries. It has 5.5 million parameters and comes with the package.
# `fine_tune` is one run, as `peft-jax train` does it. It returns what the run measured: loss and accuracy on held-out questions,
# bytes and seconds.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console

from peft_jax.recipes.config import parse_config
from peft_jax.recipes.train import run_training
from peft_jax.reports.folder import numbers

countries = "builtin:countries"
TASK = {
    "data": {
        "kind": "completion",
        "sequence_length": 128,
        "train": {"path": countries, "split": "train"},
        "validation": None,
        "test": {"path": countries, "split": "test"},
    },
    "train": {"steps": 30, "batch_size": 8, "log_every": 5, "tensorboard": False},
    "evaluate": {"metrics": ["perplexity"]},
}
FULL = {"method": {"name": "full"}, "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5}}
ADAPTED = {"learning_rate": 1e-2, "warmup_steps": 5}


def fine_tune(name, changes):
    """Run the task with some options changed, and return the numbers of the run."""
    out = Path("runs/notebooks") / name
    run_training(
        parse_config({**TASK, **changes, "output": str(out), "resume": False}),
        Console(quiet=True, force_jupyter=False),
    )
    return numbers(out)


def draw(title, unit, found):
    """Bars of one number of each run."""
    figure, axis = plt.subplots(figsize=(7, 0.7 + 0.4 * len(found)))
    axis.bar_label(axis.barh(list(found), list(found.values())), fmt="%.3g", padding=3)
    axis.set(xlabel=unit, title=title)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    plt.show()


full = fine_tune("full", FULL)
print(f"full fine-tuning: accuracy {full['accuracy']:.2f}, {full['disk'] / 1e6:.1f} MB on disk")

# %% [markdown]
# ## Half of the weights gone
#
# First without any training: how well the base still says what it says by itself. It writes some texts, half for calibration, half to
# measure on.

# %%
import json

import peft_jax
from peft_jax.core.calibrate import calibrate
from peft_jax.data import encode, evaluation_batches, fit, pack, read_records
from peft_jax.pruning import sparsity_of
from peft_jax.training.evaluate import perplexity

model, params = peft_jax.load("builtin:base")
tokenizer = peft_jax.load_tokenizer("builtin:base")
start = [[tokenizer.bos_token_id]] * 64
written = peft_jax.generate(model, params, start, max_tokens=128, temperature=1.0, eos_token_id=[])
own = Path("runs/notebooks/own_texts.jsonl")
texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
own.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
examples = encode(read_records(str(own), kind="text"), tokenizer, "text")
rows = pack(fit(examples, 128, "text", "skip"), 128)
half = len(rows.tokens) // 2
known, asked = (rows._make(x[part] for x in rows) for part in (slice(half), slice(half, None)))
batches = list(evaluation_batches(known, 8))

loss = {"dense": perplexity(model, params, asked)["loss"]}
needs = {"magnitude": None, "wanda": "second_moment", "sparsegpt": "covariance"}
for score, name in needs.items():
    found = name and calibrate(peft_jax.bind(model), params, batches, statistic=name)
    pruned = peft_jax.prune(params, 0.5, score=score, statistics={name: found} if name else None)
    loss[score] = perplexity(model, pruned, asked)["loss"]
draw("Half of the weights pruned, nothing trained", "nats per token", loss)
assert loss["sparsegpt"] < loss["magnitude"]

# %% [markdown]
# ## Recovered by LoRA under the mask
#
# LoRA's update is masked too, so the zeros stay when it is merged.

# %%
half = {"sparsity": 0.5, "score": "sparsegpt", "calibration_batches": 4}
pruned = fine_tune("pruned", {"prune": half, "method": {"name": "lora"}, "optimizer": ADAPTED})
merged = peft_jax.load("runs/notebooks/pruned/model")[1]
zeros = {path: float(share.mean()) for path, share in sparsity_of(merged).items()}
share = sum(zeros.values()) / len(zeros)
runs = {"full fine-tuning": full, "half pruned, LoRA": pruned}
draw("Accuracy on held-out questions", "share", {k: r["accuracy"] for k, r in runs.items()})
draw("Trained parameters", "thousands", {k: r["trained"] / 1e3 for k, r in runs.items()})
print(f"{share:.0%} of the linear layers' weights are zero after training and merging.")
assert abs(share - 0.5) < 0.02
assert pruned["trained"] < 0.1 * full["trained"]

# %% [markdown]
# ## When to use it
#
# Prune when zeros pay: 2:4 patterns on GPUs that skip them, blocks, or whole heads and layers (`prune.keep`), which are smaller and
# faster everywhere. Zeros without a pattern save disk space once the file is compressed, and no time.
#
# Read on: Frantar and Alistarh 2023, [SparseGPT](https://arxiv.org/abs/2301.00774); Sun et al. 2023,
# [Wanda](https://arxiv.org/abs/2306.11695); Muralidharan et al. 2024, [Minitron](https://arxiv.org/abs/2407.14679).
