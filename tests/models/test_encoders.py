"""Encoders and T5 with every head against PyTorch transformers, through the real loading code and
back.
"""

import json
import logging

import jax
import numpy as np
import pytest
import torch
import transformers as tr

import peft_jax
from peft_jax.models.layers import stack_layers, unstack_layers
from tests.reference import VOCAB, random_tokens, relative_error

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)
DEBERTA = dict(SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32)
MODERN = dict(
    SIZES, local_attention=8, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
)
ENCODERS = {
    "bert": lambda **k: tr.BertConfig(**SIZES, **k),
    "roberta": lambda **k: tr.RobertaConfig(**dict(SIZES, pad_token_id=1), type_vocab_size=1, **k),
    "distilbert": lambda **k: tr.DistilBertConfig(
        vocab_size=VOCAB,
        dim=32,
        hidden_dim=48,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=64,
        **k,
    ),
    "deberta_v3": lambda **k: tr.DebertaV2Config(
        **DEBERTA,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        **k,
    ),
    "deberta_v2": lambda **k: tr.DebertaV2Config(
        **DEBERTA, share_att_key=False, type_vocab_size=2, **k
    ),
    "modernbert": lambda **k: tr.ModernBertConfig(
        **MODERN, norm_bias=True, classifier_pooling="mean", **k
    ),
}
TYPED = ("bert", "deberta_v2")
CLASSES = {
    "masked_lm": tr.AutoModelForMaskedLM,
    "sequence_classification": tr.AutoModelForSequenceClassification,
    "token_classification": tr.AutoModelForTokenClassification,
    "question_answering": tr.AutoModelForQuestionAnswering,
    "feature_extraction": tr.AutoModel,
}
LABELS = {"sequence_classification": {"num_labels": 3}, "token_classification": {"num_labels": 5}}
POOLERS = {"bert", "roberta"}  # of the trunk alone, which no task here uses


def torch_encoder(name, task):
    torch.manual_seed(0)
    model = (
        CLASSES[task]
        .from_config(ENCODERS[name](**LABELS.get(task, {})), attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name):
    """Two rows, the second with padding; types where the family has them."""
    tokens, seen = random_tokens(2, 24), np.ones((2, 24), np.int32)
    seen[1, 17:] = 0
    tokens[seen == 0] = 1 if name == "roberta" else 0
    types = (
        {"token_type_ids": np.tile((np.arange(24) > 11).astype(np.int32), (2, 1))}
        if name in TYPED
        else {}
    )
    return tokens, seen, types


def their_output(model, tokens, seen, types):
    with torch.no_grad():
        more = {k: torch.tensor(v).long() for k, v in types.items()}
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(seen), **more)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def difference(ours, theirs, seen):
    ours = np.asarray(ours)
    return (
        relative_error(ours[seen > 0], theirs[seen > 0])
        if ours.shape[:2] == seen.shape
        else relative_error(ours, theirs)
    )


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_match_pytorch_and_folders_come_back(name, task, tmp_path):
    theirs = torch_encoder(name, task)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, seen, types = inputs(name)
    expected = their_output(theirs, tokens, seen, types)
    model, params = peft_jax.load(tmp_path / "theirs")
    assert model.task == task
    run = jax.jit(peft_jax.bind(model, strict=True))
    assert difference(run(params, tokens, segment_ids=seen, **types), expected, seen) < 1e-5
    looped = jax.jit(peft_jax.bind(model.clone(scan_layers=False)))
    assert (
        difference(
            looped(unstack_layers(params), tokens, segment_ids=seen, **types), expected, seen
        )
        < 1e-5
    )
    assert jax.tree.structure(stack_layers(unstack_layers(params))) == jax.tree.structure(params)
    peft_jax.save(tmp_path / "ours", model, params)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    back = CLASSES[task].from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    again, before = back.state_dict(), theirs.state_dict()
    for key, value in before.items():
        assert (again[key] == value).all() or (
            task == "feature_extraction" and name in POOLERS and "pooler" in key
        ), key


def test_looped_loading_equals_unstacking(tmp_path):
    torch_encoder("modernbert", "masked_lm").save_pretrained(tmp_path)
    _, stacked = peft_jax.load(tmp_path)
    _, looped = peft_jax.load(tmp_path, scan_layers=False)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), unstack_layers(stacked), looped)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "name", [n for n in ENCODERS if n != "deberta_v2"]
)  # whose convolution sees neighbours
def test_packed_segments_are_apart(name, tmp_path):
    torch_encoder(name, "feature_extraction").save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    run = jax.jit(peft_jax.bind(model))
    tokens = random_tokens(2, 9)
    if "deberta" in name:  # distances count within the row
        packed, first = np.concatenate([tokens[:1], tokens[1:]], 1), run(params, tokens[:1])
        out = run(params, packed, segment_ids=np.asarray([[1] * 9 + [2] * 9], np.int32))
        assert relative_error(out[:, :9], first) < 1e-5
        return
    packed = np.concatenate([tokens[:1], tokens[1:]], axis=1)
    segments = np.asarray([[1] * 9 + [2] * 9], np.int32)
    positions = np.asarray([[*range(9), *range(9)]], np.int32)
    out = run(params, packed, segment_ids=segments, positions=positions)
    assert relative_error(out[:, :9], run(params, tokens[:1])) < 1e-5
    assert relative_error(out[:, 9:], run(params, tokens[1:])) < 1e-5


def test_a_new_head_starts_anew_and_says_so(tmp_path, caplog):
    torch_encoder("bert", "masked_lm").save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, "peft_jax"):
        model, params = peft_jax.load(
            tmp_path / "base", task="sequence_classification", labels=["no", "yes", "who knows"]
        )
    assert "has no bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias" in caplog.text
    assert params["classifier"]["kernel"].shape == (32, 3)
    assert "cls" not in params
    peft_jax.save(tmp_path / "tuned", model, params)
    back = tr.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert back.config.id2label == {0: "no", 1: "yes", 2: "who knows"}
    # another number of labels replaces the head, and keeps the pooler
    with caplog.at_level(logging.WARNING, "peft_jax"):
        _, other = peft_jax.load(tmp_path / "tuned", labels=5)
    assert other["classifier"]["kernel"].shape == (32, 5)
    np.testing.assert_array_equal(
        other["bert"]["pooler"]["dense"]["kernel"], params["bert"]["pooler"]["dense"]["kernel"]
    )


def test_trunks_without_their_name_and_old_norms_are_read(tmp_path):
    theirs = torch_encoder("bert", "masked_lm")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.bert.save_pretrained(tmp_path / "trunk")
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "trunk" / "model.safetensors"

    def old(n):
        return n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    save_file({old(n): v for n, v in load_file(file).items()}, file)
    _, whole = peft_jax.load(tmp_path / "whole")
    _, trunk = peft_jax.load(tmp_path / "trunk", task="token_classification")
    assert all(
        jax.tree.leaves(
            jax.tree.map(lambda a, b: bool((a == b).all()), whole["bert"], trunk["bert"])
        )
    )


def test_dropout_needs_randomness(tmp_path):
    torch_encoder("distilbert", "sequence_classification").save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    apply, tokens = jax.jit(peft_jax.bind(model)), random_tokens(2, 8)
    one, two = (apply(params, tokens, rng=jax.random.key(i)) for i in (0, 1))
    assert relative_error(one, two) > 1e-3
    np.testing.assert_array_equal(one, apply(params, tokens, rng=jax.random.key(0)))
    assert relative_error(one, apply(params, tokens)) > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tr.BertConfig(**SIZES, is_decoder=True),
            "is_decoder and add_cross_attention are not supported",
        ),
        (
            lambda: tr.BertConfig(**SIZES, tie_word_embeddings=False),
            "bert with tie_word_embeddings=false is not supported",
        ),
        (
            lambda: tr.BertConfig(**dict(SIZES, hidden_act="mish")),
            "activation 'mish' is not supported; there are silu",
        ),
        (
            lambda: tr.DebertaV2Config(**DEBERTA, conv_kernel_size=3),
            "conv_kernel_size of DeBERTa-v2 is not supported",
        ),
        (
            lambda: tr.DistilBertConfig(sinusoidal_pos_embds=True),
            "sinusoidal_pos_embds=true is not supported",
        ),
        (
            lambda: tr.GPT2Config(add_cross_attention=True),
            "add_cross_attention=true is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_refused(make, message, tmp_path):
    from safetensors.numpy import save_file

    make().save_pretrained(tmp_path)
    save_file({"nothing": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        peft_jax.load(tmp_path)


def test_a_task_without_a_head_is_refused(tmp_path):
    torch_encoder("bert", "masked_lm").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"no head for .causal_lm.\. Did you mean .masked_lm.\? It has: masked_lm, seq",
    ):
        peft_jax.load(tmp_path, task="causal_lm")
    with pytest.raises(ValueError, match="Did you mean 'token_classification'"):
        peft_jax.load(tmp_path, task="token_clasification")


# --------------------------------------------------------------------------------------------------
# T5

T5_SIZES = dict(
    vocab_size=VOCAB,
    d_model=32,
    d_kv=12,
    d_ff=48,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    decoder_start_token_id=0,
)
T5S = {
    "t5": lambda: tr.T5Config(**T5_SIZES, num_decoder_layers=2),
    "t5_v1.1": lambda: tr.T5Config(
        **T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
}


@pytest.fixture(scope="module", params=T5S)
def t5(request, tmp_path_factory):
    """(PyTorch's model, ours, parameters)."""
    torch.manual_seed(0)
    theirs = tr.T5ForConditionalGeneration(T5S[request.param]()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return theirs, *peft_jax.load(folder)


def test_t5_logits_match_pytorch(t5, tmp_path):
    theirs, model, params = t5
    tokens, seen, _ = inputs("t5")
    targets = random_tokens(2, 21, seed=1)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens),
            attention_mask=torch.tensor(seen),
            decoder_input_ids=torch.tensor(targets),
        ).logits.numpy()
    out = jax.jit(peft_jax.bind(model, strict=True))(params, tokens, targets, segment_ids=seen)
    assert relative_error(out, expected) < 1e-5
    looped = jax.jit(peft_jax.bind(model.clone(scan_layers=False)))
    assert (
        relative_error(looped(unstack_layers(params), tokens, targets, segment_ids=seen), expected)
        < 1e-5
    )
    peft_jax.save(tmp_path / "out", model, params)
    back = tr.T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(bool((back.state_dict()[k] == v).all()) for k, v in theirs.state_dict().items())


def test_t5_with_a_head_of_its_own(t5, tmp_path):
    """Flan-T5's checkpoints have a head beside the embedding."""
    from safetensors.numpy import load_file, save_file

    theirs, model, params = t5
    peft_jax.save(tmp_path, model, params)
    file = tmp_path / "model.safetensors"
    head = np.random.default_rng(0).standard_normal((VOCAB, 32)).astype(np.float32)
    save_file({**load_file(file), "lm_head.weight": head}, file)
    untied, own = peft_jax.load(tmp_path)
    assert not untied.config.tie_embeddings
    hidden = np.random.default_rng(1).standard_normal((1, 2, 32)).astype(np.float32)
    scale = 32**-0.5 if model.config.scale_logits else 1.0
    logits = untied.apply({"params": own}, hidden, method="unembed")
    assert relative_error(logits, scale * hidden @ head.T) < 1e-5
    peft_jax.save(tmp_path / "again", untied, own)
    np.testing.assert_array_equal(peft_jax.load(tmp_path / "again")[1]["lm_head"]["kernel"], head.T)


def test_t5_decodes_with_a_cache_as_in_one_pass(t5):
    _, model, params = t5
    tokens, seen, _ = inputs("t5")
    targets = random_tokens(2, 6, seed=1)
    apply = peft_jax.bind(model)
    whole = jax.jit(apply)(params, tokens, targets, segment_ids=seen)
    cache = jax.jit(lambda p: apply(p, tokens, seen, 8, method="start"))(params)
    step = jax.jit(lambda p, t, at, c: apply(p, t, positions=at, cache=c, method="decode"))
    parts = []
    for i in range(6):
        logits, cache = step(params, targets[:, i : i + 1], np.full((2, 1), i, np.int32), cache)
        parts.append(logits)
    assert relative_error(np.concatenate(parts, axis=1), whole) < 1e-5
