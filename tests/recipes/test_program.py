"""A planned step is the one that a run trains with, and TPUs that are not there compile it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from peft_jax.core.mesh import make_mesh
from peft_jax.core.options import ConfigError
from peft_jax.core.partition import partition
from peft_jax.core.program import read_program
from peft_jax.recipes.config import load_config
from peft_jax.recipes.program import planned_step
from peft_jax.recipes.setup import context_of, set_up
from peft_jax.training.data import Subject
from peft_jax.training.loop import initial_state, on_devices
from peft_jax.training.optimizer import make_optimizer
from peft_jax.training.rows import make_rows
from peft_jax.training.stage import STAGE, prepare

ROOT = Path(__file__).parents[2]
MESH = {"fsdp": 4, "tensor": 2}


def overrides(folder, texts, *more):
    return [
        f"model.path={folder}",
        "model.fresh=true",
        "model.remat=full",
        f"data.train.path={texts}",
        "data.validation=null",
        "data.sequence_length=16",
        "train.batch_size=8",
        "train.steps=2",
        f"mesh={json.dumps(MESH)}",
        *more,
    ]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(f"a text of no great length, number {i}" for i in range(40)))
    return path


QLORA = ("quantize.format=nf4", 'quantize.options={"block_size": 8, "double": false}')


@pytest.mark.parametrize(
    "more",
    [("method.rank=4",), ("method.name=full",), (*QLORA, "method.rank=4")],
    ids=["lora", "full", "qlora"],
)
def test_a_planned_step_has_the_shapes_and_places_of_the_real_one(tiny_folder, texts, more):
    config = load_config(None, overrides(tiny_folder, texts, *more))
    planned = planned_step(config, make_mesh(config.mesh))
    setup, section = set_up(config), STAGE.section_of(config)
    context = context_of(config, setup, console=Console(quiet=True))
    made = prepare(section, setup.state, context)
    optimizer = make_optimizer(section.optimizer, made.steps, section.method)
    state = initial_state(made.params, optimizer, 0, setup.mesh)
    subject: Subject = context.subject(setup.model)
    rows = make_rows(subject, config.data.train)
    batch = on_devices({k: v[:8] for k, v in rows._asdict().items()}, setup.mesh)
    real = (state, partition(made.params)[1], batch)
    ours = (planned.state, planned.frozen, planned.batch)
    assert jax.tree.structure(ours) == jax.tree.structure(real)
    for a, b in zip(*map(jax.tree.leaves, (ours, real)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, len(a.shape)), (a, b.sharding)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("quantize={format: int4, rounding: gptq, options: {block_size: 8}}", "statistics"),
        ("stages=[train, merge]", "stages"),
        ("model.task=sequence_classification", "causal language models"),
    ],
)
def test_what_cannot_be_planned_is_said(tiny_folder, texts, more, said):
    config = load_config(None, overrides(tiny_folder, texts, more))
    with pytest.raises(ConfigError, match=said):
        planned_step(config, make_mesh(config.mesh))


SHAPE = {
    "model_type": "llama",
    "vocab_size": 65536,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_slice_of_four_tpus_compiles_the_step(tmp_path):
    """Kernels, collectives and FLOPs of a LoRA step on v5e:2x2, which is not there."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    rows, length, rank = 4, 2048, 16
    given = [
        f"model.path={tmp_path}",
        "model.dtype=bfloat16",
        "model.remat=full",
        f"method.rank={rank}",
        f"data.sequence_length={length}",
        f"train.batch_size={rows}",
        'mesh={"fsdp": 4}',
        "topology=v5e:2x2",
    ]
    script = [sys.executable, ROOT / "scripts" / "tpu_program.py", *given]
    env = {
        **os.environ,
        "PYTHONPATH": ":".join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    env.pop("XLA_FLAGS", None)
    dump = tmp_path / "program.txt"
    subprocess.run([*script, "--dump", dump], check=True, env=env, capture_output=True)
    program = read_program(dump.read_text())
    assert sum(program.kernels.values()) == 2 * 4  # layers x (forward, again, two backward)
    D, F, V, L = (
        SHAPE[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    )
    attention, mlp, head = 4 * D * D, 3 * D * F, D * V
    tokens = rows * length / 4
    factors = L * rank * (8 * D + 3 * (D + F))
    flops = 2 * tokens * (L * (3 * (attention + mlp) - D * F) + 3 * head + 4 * factors)
    assert program.flops == pytest.approx(flops, rel=0.03)
    gathered = 2 * (2 * L * (attention + mlp) + head + 2 * factors)  # bfloat16, forward and back
    due = (
        gathered + 2 * factors + 2 * tokens * D
    )  # and factors' gradients, and the embedding's rows
    assert program.moved == pytest.approx(due, rel=0.1)
    assert not [c for c in program.collectives if c.times > 1 and str(V) in c.type]
