"""PEFT's folders on GPT-2, BERT, RoBERTa, T5 and Mixtral: LoRA, IA3, prompts and prefixes,
exchanged both ways with heads.

PEFT 0.21 refuses prefixes for encoders under transformers 5 ("Model does not support past key
values"), so ours for BERT is held to attention written out in NumPy.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tr

import peft_jax
from peft_jax.adapters import ia3, prefix_tuning, prompt_tuning
from peft_jax.core import drop_adapters, set_adapter
from peft_jax.core.reparametrised import Replacement, replace_arrays
from peft_jax.core.tree import map_places, places
from peft_jax.low_rank import combine_adapters
from peft_jax.methods import METHODS
from tests.models.test_encoders import ENCODERS, T5_SIZES
from tests.reference import FAMILIES, perturb, random_tokens, relative_error

TOKENS, TARGETS, P = random_tokens(2, 9), random_tokens(2, 5, seed=1), 3
BASES = {
    "bert_trunk": (
        lambda: tr.BertModel(ENCODERS["bert"](), add_pooling_layer=False),
        "FEATURE_EXTRACTION",
    ),
    "gpt2": (lambda: tr.GPT2LMHeadModel(FAMILIES["gpt2"]()), "CAUSAL_LM"),
    "bert": (lambda: tr.BertForSequenceClassification(ENCODERS["bert"](num_labels=3)), "SEQ_CLS"),
    "bert_tokens": (
        lambda: tr.BertForTokenClassification(ENCODERS["bert"](num_labels=3)),
        "TOKEN_CLS",
    ),
    "roberta": (
        lambda: tr.RobertaForSequenceClassification(ENCODERS["roberta"](num_labels=3)),
        "SEQ_CLS",
    ),
    "t5": (
        lambda: tr.T5ForConditionalGeneration(tr.T5Config(**dict(T5_SIZES, d_kv=8))),
        "SEQ_2_SEQ_LM",
    ),
    "mixtral": (lambda: tr.MixtralForCausalLM(FAMILIES["mixtral_sliding"]()), "CAUSAL_LM"),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# case -> (PEFT's configuration for a task, ours from the start)
CONFIGS = {
    "lora": (
        lambda task, more: peft.LoraConfig(task_type=task, r=4, lora_alpha=6, **more),
        lambda p, t: peft_jax.lora(p, jax.random.key(0), rank=4, alpha=6, targets=t),
    ),
    "ia3": (
        lambda task, more: peft.IA3Config(task_type=task, **more),
        lambda p, t: ia3(p, jax.random.key(0), targets=t),
    ),
    "prompt": (
        lambda task, more: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P),
        lambda p, t: prompt_tuning(p, jax.random.key(0), num_virtual_tokens=P),
    ),
    "prefix": (
        lambda task, more: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
        lambda p, t: prefix_tuning(
            p, jax.random.key(0), num_virtual_tokens=P, targets=t if "/" in str(t) else "*"
        ),
    ),
}
LORA = {
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
    "bert_tokens": ["query", "dense"],
    "bert_trunk": ["query", "output.dense"],
    "roberta": ["query", "value"],
    "t5": ["q", "v", "wi", "wo"],
    "mixtral": ["q_proj", "v_proj"],
}
CASES = [
    (b, m)
    for b in BASES
    for m in CONFIGS
    if m != "prefix" or b not in ("bert", "bert_tokens", "bert_trunk", "roberta")
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    loaded = {}

    def get(name):
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            their_base(name).save_pretrained(folder)
            model, params = peft_jax.load(folder)
            loaded[name] = params, jax.jit(peft_jax.bind(model)), folder
        return loaded[name]

    return get


def their_base(name):
    torch.manual_seed(0)
    model = BASES[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def their_logits(name, model):
    more = {"decoder_input_ids": torch.tensor(TARGETS)} if name == "t5" else {}
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(TOKENS),
            attention_mask=torch.ones(TOKENS.shape, dtype=torch.long),
            **more,
        )
    logits = out.logits if "logits" in out else out.last_hidden_state
    return logits[:, -TOKENS.shape[1] :].numpy() if logits.ndim == 3 else logits.numpy()


def our_logits(name, run, params):
    return run(params, TOKENS, *([TARGETS] if name == "t5" else []))


def options(name, method):
    if method == "lora":
        return {"target_modules": LORA[name]}
    # PEFT looks for Mixtral's experts under names that transformers 5 no longer has
    return (
        {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
        if name == "mixtral"
        else {}
    )


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_exchange(bases, name, method, tmp_path):
    params, run, _ = bases(name)
    configure, make = CONFIGS[method]
    more, task = options(name, method), BASES[name][1]
    torch.manual_seed(1)
    theirs = moved(peft.get_peft_model(their_base(name), configure(task, more)))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(name, theirs)
    loaded = peft_jax.load_adapter(params, tmp_path / "theirs")
    assert relative_error(our_logits(name, run, loaded), expected) < 1e-4
    assert relative_error(our_logits(name, run, params), expected) > 1e-3

    targets = (
        ["decoder/*/SelfAttention/core"]
        if (name, method) == ("t5", "prefix")
        else more.get("target_modules", "")
    )
    ours = perturb(make(params, targets), scale=0.3)
    if name in ("bert", "bert_tokens", "roberta"):
        ours = with_head(ours)
    peft_jax.save_adapter(tmp_path / "ours", ours, task_type=task)
    back = peft.PeftModel.from_pretrained(their_base(name), tmp_path / "ours").eval()
    expected = their_logits(name, back)
    assert relative_error(our_logits(name, run, ours), expected) < 1e-4
    again = peft_jax.load_adapter(params, tmp_path / "ours", name="again")
    assert relative_error(our_logits(name, run, again), expected) < 1e-4
    peft_jax.save_adapter(tmp_path / "third", again, name="again", task_type=task)


def with_head(params):
    """The tree with its classifier trained too."""
    heads = {p: "module" for p in places(params) if p.startswith("classifier/")}
    own = replace_arrays(params, heads, name="default")
    return map_places(
        lambda _, w: w.replace(value=w.value + 0.1) if isinstance(w, Replacement) else w, own
    )


def classifier(name, labels):
    config = FAMILIES["llama2"]() if name == "llama" else ENCODERS[name]()
    config.num_labels = labels
    config.pad_token_id = 0
    return config


OURS = {  # method -> options
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "adalora": {"init_rank": 2, "target_rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "hira": {"rank": 2},
    "gralora": {"rank": 4},
    "delora": {"rank": 2},
    "vera": {"rank": 2},
    "randlora": {"rank": 4},
    "vblora": {"rank": 2, "vectors": 16, "length": 4},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "ia3": {},
    "hra": {"rank": 2},
    "road": {"group_size": 4},
    "fourierft": {"frequencies": 10},
    "waveft": {"frequencies": 10},
    "shira": {"rank": 1},
    "c3a": {"block_size": 4},
    "miss": {"rank": 4},
    "trainable_tokens": {"ids": [5, 6]},
    "ln_tuning": {},
    "prompt_tuning": {"num_virtual_tokens": 2},
    "p_tuning": {"num_virtual_tokens": 2},
}
TASKS = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
HEADED = [("bert", m, "SEQ_CLS") for m in OURS]
HEADED += [("bert", "lora", t) for t in TASKS] + [
    ("distilbert", "lora", "SEQ_CLS"),
    ("roberta", "vera", "SEQ_CLS"),
]
HEADED += [("llama", m, "SEQ_CLS") for m in ("lora", "ia3")]
ALL_HEADED = [(b, m, t) for b in ("bert", "distilbert", "roberta") for m in OURS for t in TASKS]


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    loaded = {}

    def get(model, task):
        if (model, task) not in loaded:
            folder = tmp_path_factory.mktemp(f"{model}_{task}")
            torch.manual_seed(0)
            auto = getattr(tr, f"AutoModelFor{TASKS[task]}")
            auto.from_config(classifier(model, 2 if task == "QUESTION_ANS" else 3)).save_pretrained(
                folder
            )
            loaded[model, task] = auto, folder, *peft_jax.load(folder)
        return loaded[model, task]

    return get


def without_head(headed, model, method, task, folder):
    """An adapter beside a head that did not train: PEFT wants the head in the file, and it does not
    train here.
    """
    auto, base, runner, params = headed(model, task)
    targets = {
        "bert": ["query", "value"],
        "roberta": ["query", "value"],
        "distilbert": ["q_lin", "v_lin"],
    }
    named = {"targets": targets.get(model, ["q_proj", "v_proj"])}
    if method == "trainable_tokens":
        named = {"targets": "word_embeddings"}
    elif method in ("ln_tuning", "prompt_tuning", "p_tuning"):
        named = {}
    key = [] if method == "ln_tuning" else [jax.random.key(0)]
    ours = perturb(METHODS[method](params, *key, **OURS[method], **named), scale=0.3)
    run = peft_jax.bind(runner)
    expected = run(ours, TOKENS)
    peft_jax.save_adapter(folder, ours, task_type=task)
    back = peft.PeftModel.from_pretrained(auto.from_pretrained(base), folder).eval()
    with torch.no_grad():
        out = back(
            input_ids=torch.tensor(TOKENS),
            attention_mask=torch.ones(TOKENS.shape, dtype=torch.long),
        )
    theirs = (
        torch.stack([out.start_logits, out.end_logits], -1)
        if task == "QUESTION_ANS"
        else out.logits
    )
    assert (
        relative_error(expected, theirs if task == "SEQ_CLS" else theirs[:, -TOKENS.shape[1] :])
        < 1e-4
    )
    again = peft_jax.load_adapter(params, folder)
    assert not any(
        isinstance(w, Replacement) and w.saved_as == "module" for w in places(again).values()
    )
    assert relative_error(run(again, TOKENS), expected) < 1e-5


@pytest.mark.parametrize("case", HEADED, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_a_head_that_did_not_train(headed, case, tmp_path):
    without_head(headed, *case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_HEADED, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_heads_that_did_not_train(headed, case, tmp_path):
    without_head(headed, *case, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_patterns_name_experts_too(bases, tmp_path):
    """Ranks and alphas of their own for a parameter, and for one layer of another, as PEFT advises
    for experts.
    """
    params, run, _ = bases("mixtral")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=EXPERTS,
        use_rslora=True,
        rank_pattern={"experts.down_proj": 2, r"layers\.1\..*gate_up_proj": 1, "q_proj": 3},
        alpha_pattern={"experts.gate_up_proj": 30, r"layers\.1\..*down_proj": 3},
    )
    theirs = moved(peft.get_peft_model(their_base("mixtral"), config))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, expected = (
        peft_jax.load_adapter(params, tmp_path / "theirs"),
        their_logits("mixtral", theirs),
    )
    assert relative_error(run(loaded, TOKENS), expected) < 1e-4
    peft_jax.save_adapter(tmp_path / "ours", loaded)
    back = peft.PeftModel.from_pretrained(their_base("mixtral"), tmp_path / "ours").eval()
    assert relative_error(their_logits("mixtral", back), expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[1:]], ids=["both", "down"])
def test_lora_of_experts(bases, parameters, tmp_path):
    params, run, _ = bases("mixtral")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=parameters,
    )
    theirs = moved(peft.get_peft_model(their_base("mixtral"), config))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft_jax.load_adapter(params, tmp_path / "theirs")
    expected = their_logits("mixtral", theirs)
    assert relative_error(run(loaded, TOKENS), expected) < 1e-4
    assert relative_error(run(peft_jax.merge(loaded), TOKENS), expected) < 1e-4
    targets = [f"experts/{p.rpartition('.')[2]}" for p in parameters]
    ours = perturb(
        peft_jax.lora(params, jax.random.key(0), rank=2, targets=["q_proj", *targets]), scale=0.3
    )
    peft_jax.save_adapter(tmp_path / "ours", ours)
    back = peft.PeftModel.from_pretrained(their_base("mixtral"), tmp_path / "ours").eval()
    assert relative_error(run(ours, TOKENS), their_logits("mixtral", back)) < 1e-4
    assert (
        relative_error(
            run(peft_jax.load_adapter(params, tmp_path / "ours"), TOKENS), run(ours, TOKENS)
        )
        < 1e-5
    )


def test_experts_that_do_not_fit_are_refused(bases, tmp_path):
    params, _, _ = bases("mixtral")
    dora = peft_jax.low_rank.dora(params, jax.random.key(0), rank=2, targets="experts/down_proj")
    with pytest.raises(ValueError, match="of stacked experts PEFT's folders hold LoRA alone"):
        peft_jax.save_adapter(tmp_path / "dora", dora, format="peft")
    some = peft_jax.lora(params, jax.random.key(0), rank=2, targets="experts/down_proj", layers=[1])
    with pytest.raises(ValueError, match="adapts some of the layers"):
        peft_jax.save_adapter(tmp_path / "some", some)
    apart = peft_jax.lora(params, jax.random.key(0), targets="experts/down_proj")

    def uneven(_, w):
        return w.replace(scale=w.scale.at[..., -1].set(5.0)) if hasattr(w, "scale") else w

    apart = map_places(uneven, apart)
    with pytest.raises(ValueError, match="experts of different scales"):
        peft_jax.save_adapter(tmp_path / "apart", apart)


def test_an_adapter_of_another_task_is_refused(bases, tmp_path):
    params, _, _ = bases("bert")
    peft_jax.save_adapter(
        tmp_path / "a",
        with_head(prompt_tuning(params, jax.random.key(0))),
        task_type="SEQ_CLS",
    )
    with pytest.raises(
        ValueError,
        match=r"has classifier\.bias, which the model lacks; load it with the adapter's task",
    ):
        peft_jax.load_adapter({"bert": params["bert"]}, tmp_path / "a")


def test_a_prefix_in_an_encoder_is_seen_by_every_token(bases):
    """One BERT layer's attention with a prefix, written out in NumPy."""
    params, _, folder = bases("bert")
    model, _ = peft_jax.load(folder)
    ours = perturb(prefix_tuning(params, jax.random.key(0), num_virtual_tokens=P), scale=0.3)
    node = ours["bert"]["encoder"]["layer"]["attention"]["self"]["core"]["prefix_default"]
    q, k, v = (
        np.random.default_rng(i).standard_normal((2, 9, 4, 8)).astype(np.float32) for i in range(3)
    )

    from peft_jax.models.blocks import AttentionCore
    from peft_jax.models.encoder import encoder_mask
    from peft_jax.models.operands import AttentionOperands

    core = AttentionCore(8**-0.5)
    mask = encoder_mask(TOKENS, None, np.arange(9)[None])
    first = jax.tree.map(lambda a: a[0], node)
    operands = AttentionOperands(q, k, v, mask)
    out = first.around(lambda o: core.apply({}, o), operands)
    keys, values = (
        np.concatenate(
            [np.broadcast_to(np.asarray(x).reshape(1, P, 4, 8), (2, P, 4, 8)), y], axis=1
        )
        for x, y in ((first.keys, k), (first.values, v))
    )
    scores = np.einsum("bthd,bshd->bhts", q, keys) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), values)
    assert relative_error(out, expected) < 1e-5
    logits = jax.jit(peft_jax.bind(model))(ours, TOKENS)
    assert relative_error(logits, jax.jit(peft_jax.bind(model))(params, TOKENS)) > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_whole_modules_belong_to_their_adapter(headed, tmp_path):
    """Heads and norms that PEFT saved: dropped, banked, saved and merged by their adapter's name,
    the base beneath.
    """
    auto, base, runner, params = headed("llama", "SEQ_CLS")
    theirs = {}
    for seed, name in enumerate(("a", "b")):
        options = dict(r=2, target_modules=["q_proj"], modules_to_save=["norm", "score"])
        adapted = peft.get_peft_model(
            auto.from_pretrained(base), peft.LoraConfig(task_type="SEQ_CLS", **options)
        ).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, adapted.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.5)
            adapted.save_pretrained(tmp_path / name)
            mask = torch.ones(TOKENS.shape, dtype=torch.long)
            theirs[name] = adapted(
                input_ids=torch.tensor(TOKENS), attention_mask=mask
            ).logits.numpy()
    run = peft_jax.bind(runner)
    both = params
    for name in theirs:
        both = peft_jax.load_adapter(both, tmp_path / name, name=name)
    for name, other in ("ab", "ba"):
        assert relative_error(run(drop_adapters(both, [other]), TOKENS), theirs[name]) < 1e-5
        for format in ("peft", "native"):
            peft_jax.save_adapter(
                tmp_path / format / name, both, name=name, task_type="SEQ_CLS", format=format
            )
            again = peft_jax.load_adapter(params, tmp_path / format / name)
            assert relative_error(run(peft_jax.merge(again), TOKENS), theirs[name]) < 1e-5
    chex.assert_trees_all_equal(drop_adapters(both, ["a", "b"]), params)

    bank = peft_jax.core.bank(peft_jax.load_adapter(params, tmp_path / "a"), 2)
    bank = set_adapter(bank, 1, peft_jax.load_adapter(params, tmp_path / "b"))
    out = run(bank, TOKENS[:2], adapter_ids=jnp.asarray([1, 0]))
    assert relative_error(out, np.stack([theirs["b"][0], theirs["a"][1]])) < 1e-5
    assert (
        relative_error(
            run(bank, TOKENS[:2], adapter_ids=jnp.asarray([-1, -1])), run(params, TOKENS[:2])
        )
        < 1e-5
    )

    with pytest.raises(ValueError, match="whole modules cannot be combined"):
        combine_adapters(both, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="holds an adapter 'a' already"):
        peft_jax.load_adapter(both, tmp_path / "a", name="a")
    replaced = peft_jax.load_adapter(both, tmp_path / "b", name="a", replace=True)
    assert relative_error(run(drop_adapters(replaced, ["b"]), TOKENS), theirs["b"]) < 1e-5
