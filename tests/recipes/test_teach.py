"""Whole runs with teachers from YAML, and `peft-jax teach`: files, an endpoint, texts."""

import functools
import http.server
import json
import threading

import jax
import numpy as np
import pytest
import torch
import transformers as tr

import peft_jax
from peft_jax.core.options import ConfigError
from peft_jax.data import read_records
from peft_jax.low_rank import Factorized
from peft_jax.recipes.config import parse_config
from peft_jax.recipes.evaluate import run_evaluation
from peft_jax.recipes.export import run_export
from peft_jax.recipes.setup import set_up, subject_in, teacher_of
from peft_jax.recipes.teach import run_teaching
from peft_jax.recipes.train import run_training
from peft_jax.training.lesson import lesson
from peft_jax.training.rows import make_rows
from tests.reference import relative_error

MESH = {"data": 1, "fsdp": 2, "tensor": 4}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [
        {"text": f"it was the {w} of times, and {w} times it was."}
        for w in ("best", "worst", "age", "season")
    ] * 3
    (folder / "texts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    pairs = [
        {"prompt": f"it was the {w}", "completion": " of times."}
        for w in ("best", "worst", "age", "season")
    ] * 3
    (folder / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pairs))
    return folder


def configuration(tiny_folder, texts, out, records="texts", **changes):
    source = {"path": str(texts / f"{records}.jsonl")}
    tree = {
        "output": str(out),
        "model": {"path": str(tiny_folder)},
        "method": {"name": "lora", "rank": 2},
        "mesh": MESH,
        "data": {"train": source, "validation": source, "sequence_length": 24, "packing": False}
        | ({"kind": "completion"} if records == "pairs" else {}),
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 1},
        "train": {"steps": 4, "batch_size": 8, "log_every": 1, "tensorboard": False},
    }
    for key, value in changes.items():
        tree[key] = (
            {**tree.get(key, {}), **value} if isinstance(value, dict) and key != "method" else value
        )
    return parse_config(tree)


@pytest.fixture(scope="module")
def teacher(tiny_folder, tmp_path_factory):
    """The tiny model moved: a folder with the same tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    model, params = peft_jax.load(tiny_folder)

    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda w: w + 0.1 * rng.normal(size=w.shape).astype(w.dtype), params)
    peft_jax.save(folder, model, moved, tokenizer=peft_jax.load_tokenizer(tiny_folder))
    return folder


def divergences(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r["divergence"] for r in rows if r["kind"] == "train"]


def test_a_pruned_student_learns_from_its_quantized_teacher(tiny_folder, teacher, texts, tmp_path):
    config = configuration(
        tiny_folder,
        texts,
        tmp_path / "run",
        prune={"keep": {"layers": 1}, "importance": "spaced"},
        method={"name": "full"},
        distill={
            "teachers": [
                {"path": str(teacher), "quantize": {"format": "int8"}},
                {"path": str(tiny_folder), "weight": 0.5},
            ],
            "temperature": 2.0,
            "data_weight": 0.5,
            "features": {"cosine": {"layers": [[1, 3]]}},
        },
    )
    run_training(config)
    found = divergences(tmp_path / "run")
    assert found[-1] < found[0]
    model, _ = peft_jax.load(tmp_path / "run" / "model")
    assert model.config.num_layers == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    again = run_evaluation(configuration(tmp_path / "run" / "model", texts, tmp_path / "x"))
    assert again["loss"] == pytest.approx(results["after"]["loss"], rel=1e-4)
    for folder, said in (("x", "Evaluation"), ("run", "On the held-out data")):
        assert f"<h2>{said}</h2>" in (tmp_path / folder / "report.html").read_text()
    exported = run_export(config, merged=False)  # from the checkpoint, with its teachers
    assert peft_jax.load(exported)[0].config.num_layers == 1


def test_stored_predictions_of_all_tokens_are_the_teacher_itself(
    tiny_folder, teacher, texts, tmp_path
):
    """k = V in float32; fewer tokens bring nearly as much; what a token takes is said."""
    teachers = {"teachers": [{"path": str(teacher)}]}
    for k, dtype in ((4096, "float32"), (32, "float16")):
        run_teaching(
            configuration(
                tiny_folder,
                texts,
                tmp_path / str(k),
                distill=teachers,
                teach={"k": k, "dtype": dtype, "shard_rows": 5},
            )
        )
    losses = {}
    for name, section in {"online": teachers, "4096": None, "32": None}.items():
        section = section or {"cache": str(tmp_path / name)}
        run_training(configuration(tiny_folder, texts, tmp_path / f"run{name}", distill=section))
        losses[name] = divergences(tmp_path / f"run{name}")
    np.testing.assert_allclose(losses["4096"], losses["online"], rtol=1e-5)
    assert (np.asarray(losses["32"]) < losses["online"]).all()
    cache = {"cache": str(tmp_path / "32")}
    shorter = configuration(
        tiny_folder, texts, tmp_path / "x", distill=cache, data={"sequence_length": 16}
    )
    with pytest.raises(ValueError, match="was written with another data"):
        run_training(shorter)
    warmer = configuration(
        tiny_folder, texts, tmp_path / "x", distill={**cache, "temperature": 2.0}
    )
    with pytest.raises(
        ValueError, match=r"was written with another temperature: 1\.0, and here it is 2\.0"
    ):
        run_training(warmer)


def test_a_factorized_student_and_a_resumed_cache(tiny_folder, teacher, texts, tmp_path):
    """Factors train and are written; stopped and continued with stored predictions, the run is the
    same bit for bit.
    """
    run_teaching(
        configuration(
            tiny_folder, texts, tmp_path / "cache", distill={"teachers": [{"path": str(teacher)}]}
        )
    )

    assert "<td>shards</td>" in (tmp_path / "cache" / "report.html").read_text()

    def run(name, steps):
        config = configuration(
            tiny_folder,
            texts,
            tmp_path / name,
            factorize={"keep": 0.5},
            method={"name": "full"},
            distill={"cache": str(tmp_path / "cache")},
            train={"steps": steps, "keep_best": False},
            optimizer={"schedule": "constant", "learning_rate": 0.003},
            resume_with=["train.steps"],
        )
        return run_training(config)

    whole = run("a", 4)
    run("b", 2)
    resumed = run("b", 4)

    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    found = divergences(tmp_path / "a")
    assert found[-1] < found[0]
    assert divergences(tmp_path / "b") == found
    kernel = peft_jax.load(tmp_path / "b" / "model")[1]["model"]["layers"]["mlp"]["up_proj"][
        "kernel"
    ]
    assert isinstance(kernel, Factorized)


def test_the_base_with_a_context_teaches_its_adapter(tiny_folder, texts, tmp_path):
    section = {
        "teachers": [{"path": "self"}],
        "context": "Speak of the age of wisdom. ",
        "divergence": "reverse_kl",
    }
    run_training(configuration(tiny_folder, texts, tmp_path / "run", distill=section))
    found = divergences(tmp_path / "run")
    assert 0 < found[-1] < found[0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A teacher with a tokenizer of its own."""
    from tests.distillation.test_match import theirs

    folder = tmp_path_factory.mktemp("stranger")
    torch.manual_seed(0)
    tokenizer = theirs.__wrapped__()
    tokenizer.save_pretrained(folder)
    config = tr.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    tr.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("divergence", ["uld", "forward_kl"])
def test_a_teacher_with_another_tokenizer(divergence, stranger, tiny_folder, texts, tmp_path):
    section = {"teachers": [{"path": str(stranger)}], "divergence": divergence, "data_weight": 0.1}
    run_training(configuration(tiny_folder, texts, tmp_path / "run", distill=section))
    found = divergences(tmp_path / "run")
    assert 0 < found[-1] < found[0]


def test_an_encoder_learns_labels_and_hidden_states(tmp_path):
    from tests.training.test_tasks import REVIEWS

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    tr.BertForSequenceClassification(tr.BertConfig(**sizes, **labels)).save_pretrained(
        tmp_path / "teacher"
    )
    peft_jax.load_tokenizer("builtin:base").save_pretrained(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r.value) + "\n" for r in REVIEWS * 4))
    features = {"cosine": {}, "attention": {"layers": [[1, 2]]}, "minilm": {}}
    config = configuration(
        tmp_path / "teacher",
        tmp_path,
        tmp_path / "run",
        records="data",
        method={"name": "full"},
        optimizer={"learning_rate": 0.003},
        train={"steps": 10},
        prune={"keep": {"layers": 1}, "importance": "spaced"},
        distill={
            "teachers": [{"path": str(tmp_path / "teacher")}],
            "data_weight": 0.5,
            "features": features,
        },
    )
    run_training(config)
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    first, last = (next(r for r in order if r["kind"] == "train") for order in (rows, rows[::-1]))
    assert {"divergence", "data_loss", *features} <= set(first)
    assert last["loss"] < first["loss"]


@pytest.fixture
def endpoint(teacher):
    """An endpoint in vLLM's manner: the teacher on loopback."""
    model, params = peft_jax.load(teacher)
    apply = peft_jax.bind(model)
    state = {"failures": 1, "asked": 0, "told": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["asked"] += 1
            if state["failures"]:
                state["failures"] -= 1
                return self.answer(503, {})
            if body["model"] != "teacher":
                return self.answer(404, {"error": "no such model"})
            assert self.path == "/v1/completions"
            return self.answer(
                200,
                {"choices": [self.choice(i, p, body) for i, p in enumerate(body["prompt"])][::-1]},
            )

        def choice(self, index, prompt, body):
            logits = np.asarray(apply(params, np.asarray([prompt]))[0], np.float64)
            log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            told = [None]
            for row, token in zip(log[:-1], prompt[1:], strict=True):
                top = np.argsort(-row)[: body["prompt_logprobs"] - state["told"]]
                told.append(
                    {str(i): {"logprob": row[i], "rank": 1} for i in {*top.tolist(), token}}
                )
            return {"index": index, "text": "", "prompt_logprobs": told}

        def answer(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", state
    server.shutdown()


def test_an_endpoint_tells_what_the_model_itself_would(
    endpoint, tiny_folder, teacher, texts, tmp_path
):
    from peft_jax.distillation.cache import open_cache

    url, state = endpoint
    options = {"k": 8, "dtype": "float32"}

    def asking(out, model):
        return configuration(
            tiny_folder, texts, tmp_path / out, teach={**options, "url": url, "model": model}
        )

    run_teaching(asking("remote", "teacher"))
    section = {"teachers": [{"path": str(teacher)}]}
    run_teaching(
        configuration(tiny_folder, texts, tmp_path / "local", teach=options, distill=section)
    )
    remote, local = (open_cache(tmp_path / n) for n in ("remote", "local"))
    config = configuration(tiny_folder, texts, tmp_path / "x")
    counted = make_rows(subject_in(config, set_up(config)), config.data.train).weights > 0
    np.testing.assert_array_equal(remote.ids[:][counted], local.ids[:][counted])
    assert relative_error(remote.log_probs[:][counted], local.log_probs[:][counted]) < 1e-4
    with pytest.raises(ValueError, match=r"refused with status 404: .*no such model"):
        run_teaching(asking("r2", "other"))
    state["told"] = 4
    with pytest.raises(ValueError, match=r"log-probabilities of token \d+, not 8; lower teach.k"):
        run_teaching(asking("r3", "teacher"))


def test_a_teachers_texts_are_data(tiny_folder, teacher, texts, tmp_path):
    teachers = {"teachers": [{"path": str(teacher)}]}
    generate = {"max_tokens": 5, "temperature": 0.0}
    config = configuration(
        tiny_folder,
        texts,
        tmp_path,
        records="pairs",
        distill=teachers,
        teach={"what": "texts"},
        generate=generate,
        evaluate={"batch_size": 8},
    )
    path = run_teaching(config)
    records = read_records(str(path), kind="completion")
    assert len(records) == 12
    model, params = peft_jax.load(teacher)
    tokenizer = peft_jax.load_tokenizer(teacher)
    expected = peft_jax.generate(
        model, params, [r.value["prompt"] for r in records[:2]], tokenizer=tokenizer, max_tokens=5
    )
    assert [r.value["completion"] for r in records[:2]] == expected
    (tmp_path / ".completions.jsonl").write_text(
        "\n".join(path.read_text().splitlines()[:9]) + "\n"
    )  # interrupted
    before = path.read_text()
    path.unlink()
    assert run_teaching(config).read_text() == before


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"teachers": [{"pth": "x"}]},
            r"unknown option 'distill.teachers.0.pth'. Did you mean 'path'\?",
        ),
        ({"divergence": "kl"}, r"unknown divergence 'kl'"),
        (
            {"divergence": "jensen_shannon", "divergence_options": {"beta": 3}},
            r"beta of jensen_shannon must lie in \[0, 1\]",
        ),
        ({"temperature": 0}, "option 'distill.temperature' must be above 0"),
        ({"cache": "x", "teachers": [{}]}, "distill.cache holds one teacher's predictions"),
        ({"on_policy": {}}, "distill.on_policy needs distill.teachers"),
        (
            {"teachers": [{}], "on_policy": {"minillm": True, "share": 0.5}},
            "minillm samples every batch as it is",
        ),
        ({"teachers": [{}], "on_policy": {"share": 2}}, r"share must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_configured_is_refused(section, message, tiny_folder, texts, tmp_path):
    with pytest.raises(ConfigError, match=message):
        configuration(tiny_folder, texts, tmp_path, distill=section)


def test_what_cannot_be_taught_is_refused(tiny_folder, stranger, texts, tmp_path):
    def made(**section):
        config = configuration(tiny_folder, texts, tmp_path, distill=section)
        setup = set_up(config)
        subject = subject_in(config, setup)
        rows = make_rows(subject, config.data.train)
        opened = functools.partial(teacher_of, config)
        return lesson(config.distill, subject, setup.params, rows, opened)

    with pytest.raises(ConfigError, match="uld compares different tokenizers"):
        made(teachers=[{"path": str(tiny_folder)}], divergence="uld")
    with pytest.raises(
        ConfigError, match="features, top_k and on_policy need a teacher that reads the same tokens"
    ):
        made(teachers=[{"path": str(stranger)}], top_k=3)
    with pytest.raises(ConfigError, match="minilmv2 needs the option 'relation_heads'"):
        made(teachers=[{"path": str(tiny_folder)}], features={"minilmv2": {}})
    with pytest.raises(FileNotFoundError, match=r"holds no teacher.json"):
        made(cache=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        run_teaching(
            configuration(
                tiny_folder, texts, tmp_path, distill={"teachers": [{"path": str(stranger)}]}
            )
        )
    with pytest.raises(ConfigError, match="teach needs one teacher"):
        run_teaching(configuration(tiny_folder, texts, tmp_path))
    with pytest.raises(ConfigError, match=r"model\.config is that of a fresh model"):
        configuration(tiny_folder, texts, tmp_path, model={"config": {"num_hidden_layers": 1}})
