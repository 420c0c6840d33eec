"""The commands, from a shell's point of view."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.shell_completion import ShellComplete
from click.testing import CliRunner

import peft_jax
from peft_jax.cli import USER_ERRORS, main
from peft_jax.core import calibrate, places
from peft_jax.core.options import ConfigError
from peft_jax.pruning import sparsity_of
from peft_jax.quantization import Quantized
from peft_jax.recipes.config import describe, load_config, parse_config
from peft_jax.recipes.run_config import to_dict
from peft_jax.recipes.setup import set_up, subject_in
from peft_jax.training.rows import first_batches, make_rows

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run(*args):
    result = CliRunner().invoke(main, list(args), catch_exceptions=True)
    return result.output, result.exception


@pytest.fixture
def options(tiny_folder, tmp_path):
    return [
        f"output={tmp_path}/run",
        f"model.path={tiny_folder}",
        "method.rank=2",
        "data.train.path=builtin:countries",
        "data.validation.path=builtin:countries",
        "data.kind=completion",
        "data.sequence_length=32",
        "train.steps=3",
        "train.batch_size=8",
        "train.log_every=1",
        "data.train.limit=40",
        "data.validation.limit=16",
        "evaluate.metrics=[perplexity]",
        "evaluate.limit=4",
        "evaluate.batch_size=4",
        "generate.prompts=[]",
    ]


def test_train_evaluate_generate_export_and_inspect(options, tmp_path):
    options += ["evaluate.metrics=[perplexity,exact_match]", "evaluate.max_tokens=4"]
    options += ['generate.prompts=["What is the capital of France?"]', "generate.max_tokens=4"]
    out, error = run("train", *options)
    assert error is None, out
    for text in (
        "before:",
        "after:",
        "exact_match",
        "prompt: What is the capital of France?",
        "adapter",
    ):
        assert text in out
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())
    assert results["after"]["loss"] != results["before"]["loss"]
    assert load_config(str(folder / "config.yaml")).method["rank"] == 2
    adapter = f"model.adapter={folder / 'adapter'}"
    out, error = run("evaluate", *options, adapter)
    assert error is None
    assert f"{results['after']['loss']:.6g}"[:6] in out
    out, error = run("generate", *options, adapter, "generate.temperature=0")
    assert error is None
    assert out.startswith("What is the capital of France?")
    out, error = run("export", "--merged", *options)
    assert error is None, out
    assert (folder / "model" / "config.json").is_file()
    assert (folder / "model" / "tokenizer.json").is_file()
    out, error = run("inspect", *options)
    assert error is None
    assert "LoRA(r=2) > array" in out
    assert "model/layers/self_attn/q_proj/kernel" in out
    assert "trained" in out


def test_full_fine_tuning_exports_a_model(options, tmp_path):
    full = [o for o in options if not o.startswith("method")]
    out, error = run("train", *full, "method.name=full")
    assert error is None, out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_help_shows_every_option_with_its_default():
    out, _ = run("train", "--help")
    flat = " ".join(out.split())
    for name, default, _ in describe():
        assert f"{name}={default}" in flat.replace(" ", "") or name in flat, name
    assert "train.batch_size=8" in flat
    assert "method.rank=8" in flat
    out, _ = run("--help")
    for verb in ("train", "evaluate", "generate", "export", "inspect", "quantize", "prune"):
        assert verb in out


def test_options_are_listed_by_section():
    out, _ = run("options")
    assert {"run", "model", "method", "optimizer"} <= set(out.replace("│", " ").split())
    out, _ = run("options", "optimizer.")
    rows = [line for line in out.splitlines() if "optimizer." in line]
    names = [name for name, _, _ in describe() if name.startswith("optimizer.")]
    assert len(rows) == len(names)
    assert "[norm, magnitude]" in out
    assert "train.steps" not in out
    _, error = run("options", "optimiser")
    assert "Did you mean 'optimizer'?" in str(error)


def test_names_of_options_are_completed():
    completion = ShellComplete(main, {}, "peft-jax", "_PEFT_JAX_COMPLETE")
    found = completion.get_completions(["train", "configs/quickstart.yaml"], "optimizer.le")
    assert [item.value for item in found] == ["optimizer.learning_rate="]
    assert "peak learning rate" in found[0].help
    first = completion.get_completions(["train"], "conf")
    assert [item.type for item in first] == ["file"]


BAD = {
    "unknown option": (["train.stpes=3"], "unknown option 'train.stpes'. Did you mean 'steps'?"),
    "unknown section": (["trian.steps=3"], "unknown option 'trian'. Did you mean 'train'?"),
    "wrong type": (["train.steps=many"], "option 'train.steps': input should be a valid integer"),
    "wrong choice": (
        ["data.kind=prose"],
        "option 'data.kind': input should be 'text', 'completion', 'chat', 'classification'",
    ),
    "unknown method": (["method.name=lorra"], "unknown method 'lorra'. Did you mean 'lora'?"),
    "unknown method option": (
        ["method.rnak=3"],
        "unknown option 'method.rnak' of lora. Did you mean 'rank'?",
    ),
    "method type": (["method.rank=x"], "option 'method.rank'"),
    "target": (
        ["method.targets=[q_porj]"],
        "target 'q_porj' matches nothing. Did you mean 'q_proj'?",
    ),
    "no file": (
        ["configs/quikstart.yaml"],
        "configuration file configs/quikstart.yaml does not exist Did you mean",
    ),
    "not key=value": (["a=1", "steps"], "override 'steps' should read key=value"),
    "model": (["model.path=./no/such/model"], "./no/such/model is no folder"),
    "builtin model": (["model.path=builtin:bse"], "there is builtin:base"),
    "dtype": (["model.dtype=float8"], "'float8' is none of float32, bfloat16, float16"),
    "adapter": (["model.adapter=./no/adapter"], "./no/adapter is no folder"),
    "data": (["data.train.path=./no.jsonl"], "data file ./no.jsonl does not exist"),
    "too long": (
        ["data.train.path=builtin:countries", "data.kind=completion", "data.sequence_length=2"],
        "no record fits",
    ),
    "zero": (["train.batch_size=0"], "option 'train.batch_size' must be at least 1"),
    "accumulate": (
        ["train.accumulate=3"],
        "train.batch_size=8 is not a multiple of train.accumulate=3",
    ),
    "no validation": (["data.validation=null", "train.eval_every=2"], "need data.validation"),
    "mesh": (["mesh.data=3"], "does not divide"),
    "batch on mesh": (["mesh.data=8", "train.batch_size=4"], "a micro-batch of 4 rows"),
    "quantized format": (["quantize.format=nf5"], "option 'quantize': unknown format 'nf5'"),
    "quantized option": (
        ["quantize.format=nf4", "quantize.options={blocks: 3}"],
        "format 'nf4' has no option 'blocks'",
    ),
    "rounding option": (
        ["quantize.format=int4", "quantize.rounding_options={grid: 3}"],
        "'nearest' has no option 'grid'",
    ),
    "quantized block": (
        ["quantize.format=nf4", "quantize.options={block_size: 48}"],
        "block_size=48 does not divide the 32",
    ),
    "quantized targets": (
        ["quantize.format=int8", "quantize.targets=q_porj"],
        "target 'q_porj' matches nothing. Did you mean 'q_proj'?",
    ),
    "sparsity": (
        ["prune.sparsity=1.5"],
        "option 'prune': sparsity, the share of entries that go, must lie in [0, 1), got 1.5",
    ),
    "pattern": (
        ["prune.pattern=5:4"],
        "option 'prune': pattern 5:4 keeps more of a group than it has",
    ),
    "score": (["prune.score=weight"], "option 'prune': unknown score 'weight'"),
    "score option": (["prune.score_options={power: 1}"], "score 'wanda' has no option 'power'"),
    "distribution": (
        ["prune.sparsity=0.5", "prune.distribution=even"],
        "unknown distribution 'even'",
    ),
    "distribution option": (
        ["prune.distribution=owl", "prune.distribution_options={spred: 1}"],
        "'owl' has no option 'spred'",
    ),
    "groups": (["prune.pattern=2:5"], "pattern 2:5 does not divide the"),
    "keep": (["prune.keep={layers: 9}"], "layers must leave between 1 and 3, got 9"),
    "keep twice": (["prune.keep={layers: 2}", "prune.keep_parameters=0.5"], "give one of them"),
    "what to keep": (["prune.keep={rows: 2}"], "option 'prune.keep"),
    "sparse and best": (
        ["method={name: sparse, sparsity: 0.5}", "train.eval_every=2"],
        "set train.keep_best=false",
    ),
    "sparse training": (["method={name: sparse}"], "sparsity is missing"),
    "loftq": (["method.init=loftq"], "method.init=loftq needs quantize.format"),
    "metric of text": (["evaluate.metrics=[bleu]"], "needs data of kind completion or chat"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said_in_one_sentence(tiny_folder, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides, message = BAD[kind]
    common = [
        f"output={tmp_path}/run",
        "train.steps=1",
        "data.train.limit=2",
        "data.validation.limit=1",
    ]
    common += [] if kind in ("model", "builtin model") else [f"model.path={tiny_folder}"]
    first = [o for o in overrides if "=" not in o and o.endswith(".yaml")]
    rest = [o for o in overrides if o not in first]
    _, error = run("train", *first, *common, *rest)
    assert isinstance(error, USER_ERRORS), error
    assert message in str(error)
    assert "\n" not in str(error)
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_console_script_exits_with_2_and_no_traceback(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "peft_jax", "train", "train.stpes=3"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown option 'train.stpes'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path):
    config = load_config(str(path))
    assert parse_config(to_dict(config)) == config


def test_yaml_that_is_none(tmp_path):
    for text, message in [("a: [", "is not valid YAML"), ("- 1", "should hold a mapping")]:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(str(tmp_path / "c.yaml"))


def test_scientific_notation_without_a_dot_is_a_number():
    assert load_config(None, ["optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4
    assert yaml.safe_load("x: 1e-4")["x"] == "1e-4"  # which is why


@pytest.mark.parametrize(
    "method",
    [
        "method={name: lora, rank: 2, init: eva}",
        "method={name: adalora, init_rank: 2, target_rank: 1}",
        pytest.param("method={name: lora, rank: 2, init: lora_ga}", marks=pytest.mark.slow),
        pytest.param("method={name: vera, rank: 4}", marks=pytest.mark.slow),
    ],
)
def test_other_methods_train_export_and_are_inspected(options, method):
    """Methods that need the training rows, share arrays, or add to the optimizer, by the same road
    as LoRA.
    """
    options = [o for o in options if not o.startswith("method.")] + [method]
    for command in ("inspect", "train"):
        out, error = run(command, *options)
        assert error is None, out
    assert "after:" in out


@pytest.mark.parametrize(
    ("method", "quantized", "merged"),
    [
        pytest.param(
            "method={name: lora, rank: 2}",
            "quantize={format: nf4, options: {block_size: 16}}",
            "arrays",
            marks=pytest.mark.slow,
        ),
        (
            "method={name: lora, rank: 2, init: loftq}",
            "quantize={format: nf4, options: {block_size: 16}}",
            "arrays",
        ),
        (
            "method={name: qalora, rank: 2}",
            "quantize={format: int4, options: {block_size: 16}, rounding: gptq}",
            "refused",
        ),
        ("method={name: qat, format: int8}", "quantize={}", "codes"),
    ],
)
def test_training_over_a_quantized_base(options, tmp_path, method, quantized, merged):
    options = [o for o in options if not o.startswith("method.")] + [
        method,
        quantized,
        "optimizer.name=adamw8bit",
    ]
    out, error = run("train", *options)
    assert error is None, out
    assert "after:" in out
    _, error = run("export", "--merged", *options)
    if merged == "refused":
        assert "fractional zero points" in str(error)
        return
    assert error is None
    nodes = places(peft_jax.load(tmp_path / "run" / "model")[1]).values()
    assert any(isinstance(w, Quantized) for w in nodes) == (merged == "codes")


def test_static_activations_are_calibrated_for_quantization_aware_training(options, tmp_path):
    """The exported weights hold scales of their inputs, which are those of the untrained model on
    the training rows.
    """
    options = [o for o in options if not o.startswith("method.")]
    method = (
        "method={name: qat, format: int8, options: {activations: static}, targets: "
        "[q_proj, down_proj]}"
    )
    out, error = run("train", *options, method)
    assert error is None, out
    config = load_config(None, [*options, method])
    setup = set_up(config)
    subject = subject_in(config, setup)
    batches = first_batches(subject, make_rows(subject, config.data.train), 8)
    where = {"targets": ["q_proj", "down_proj"], "statistic": "max_abs"}
    largest = calibrate(peft_jax.bind(setup.model), setup.params, batches, **where)
    found = places(peft_jax.load(tmp_path / "run" / "model")[1])
    for path, x in largest.items():
        assert found[path].format.activations == "static"
        np.testing.assert_allclose(found[path].input_scale, x.max(-1) / 127.5, rtol=1e-5)


def test_quantize_shows_both_perplexities_and_writes_a_folder(options, tmp_path):
    rest = ["quantize.format=int4", "quantize.options={block_size: 16}", "quantize.rounding=gptq"]
    out, error = run("quantize", *options, *rest)
    assert error is None, out
    assert "before:" in out
    assert "bits a quantized weight" in out
    nodes = places(peft_jax.load(tmp_path / "run" / "model")[1]).values()
    assert any(isinstance(w, Quantized) for w in nodes)
    assert "<h2>Quantization</h2>" in (tmp_path / "run" / "report.html").read_text()
    numbers = json.loads((tmp_path / "run" / "quantization.json").read_text())
    assert len(numbers["tokens"]) == 21
    assert len(set(numbers["tokens"].values())) == 1  # all tokens go through each dense weight
    _, error = run("quantize", *options)
    assert "quantize needs quantize.format" in str(error)


def zeros_of(folder):
    """Mean share of zeros of the linear layers of a model folder."""
    shares = sparsity_of(peft_jax.load(folder)[1])
    return sum(s.mean() for s in shares.values()) / len(shares)


def test_prune_shows_what_became_of_each_weight(options, tmp_path):
    options += ["prune.calibration_batches=2"]
    rest = [
        "prune.sparsity=0.5",
        "prune.score=magnitude",
        "prune.distribution=owl",
        "prune.sensitivity=[0.5]",
    ]
    out, error = run("prune", *options, *rest)
    assert error is None, out
    for text in ("before:", "after:", "% zeros a weight", "output error", "layer 2", "pruning.png"):
        assert text in out
    assert "<h2>Layers</h2>" in (tmp_path / "run" / "report.html").read_text()
    numbers = json.loads((tmp_path / "run" / "pruning.json").read_text())
    assert len(numbers["weights"]) == 21
    assert all(row["tokens"] > 0 for row in numbers["weights"].values())
    assert set(numbers["sensitivity"]) == {"layer 0", "layer 1", "layer 2"}
    assert abs(zeros_of(tmp_path / "run" / "model") - 0.5) < 0.01
    assert (tmp_path / "run" / "pruning.png").stat().st_size > 1000
    _, error = run("prune", *options)
    assert "prune needs prune.sparsity" in str(error)


def test_prune_makes_a_smaller_model(options, tmp_path):
    out, error = run(
        "prune", *options, "prune.keep={layers: 2, units: 32, kv_heads: 1}", "quantize.format=int8"
    )
    assert error is None, out
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (
        config["num_hidden_layers"],
        config["intermediate_size"],
        config["num_attention_heads"],
    ) == (2, 32, 2)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    out, error = run("evaluate", *options, f"model.path={tmp_path / 'run' / 'model'}")
    assert error is None, out


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        pytest.param(
            ["method={name: lora, rank: 2}", "prune.sparsity=0.5", "prune.score=taylor"],
            "model",
            marks=pytest.mark.slow,
        ),
        (
            [
                "method={name: lora, rank: 2}",
                "prune={keep: {layers: 2}, pattern: 2:4, mask_updates: false}",
            ],
            "adapter",
        ),
        (
            [
                "method={name: full}",
                "prune.sparsity=0.5",
                "prune.distribution=global",
                "prune.score=magnitude",
            ],
            "model",
        ),
        (["method={name: sparse, sparsity: 0.5, every: 1}"], "model"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[0][8:20] + v[-1][:18],
)
def test_training_over_a_pruned_base(options, tmp_path, changes, written):
    options = [o for o in options if not o.startswith("method.")] + [
        "prune.calibration_batches=1",
        *changes,
    ]
    out, error = run("train", *options)
    assert error is None, out
    folder = tmp_path / "run"
    assert (folder / written).is_dir()
    results = json.loads((folder / "results.json").read_text())
    if written == "model":
        assert abs(zeros_of(folder / "model") - 0.5) < 0.01
        again = [f"model.path={folder / 'model'}"]
    else:
        assert json.loads((folder / "adapter" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ] == str(folder / "base")
        again = [f"model.path={folder / 'base'}", f"model.adapter={folder / 'adapter'}"]
    out, error = run(
        "evaluate", *[o for o in options if not o.startswith(("prune", "model"))], *again
    )
    assert error is None, out
    assert f"{results['after']['loss']:.6g}"[:5] in out
