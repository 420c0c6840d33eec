"""Models whose head is their embedding: what PEFT's adapters of one, the other or both mean,
exchanged both ways.

Each case is saved by PEFT, loaded here, saved again and loaded by PEFT; merged, it is a checkpoint
that transformers loads.
"""

import itertools

import jax
import numpy as np
import peft
import pytest
import torch
import transformers as tr

import peft_jax
from peft_jax.adapters import ia3
from peft_jax.core import bank, count, unmerge
from peft_jax.core.weight import Trainable
from peft_jax.low_rank import dora, hira, trainable_tokens
from peft_jax.models import untie
from tests.models.test_encoders import ENCODERS, T5_SIZES
from tests.reference import (
    FAMILIES,
    perturb,
    random_tokens,
    relative_error,
    torch_logits,
    torch_model,
)

TOKENS = random_tokens(2, 8)
IDS = TOKENS[0, 1:4].tolist()
MODELS = {  # name -> (family, embedding, projection, tied)
    "llama": ("llama3_tied_biased", "embed_tokens", "q_proj", True),
    "gemma": ("gemma2_caps", "embed_tokens", "q_proj", True),
    "gpt2": ("gpt2", "wte", "c_attn", True),
    "untied": ("llama2", "embed_tokens", "q_proj", False),
}
# kind -> (modules, a projection) -> PEFT's options
KINDS = {
    "lora": lambda m, q: dict(target_modules=m),
    "dora": lambda m, q: dict(target_modules=m, use_dora=True),
    "module": lambda m, q: dict(target_modules=[q], modules_to_save=m),
    "tokens": lambda m, q: dict(target_modules=[q], trainable_token_indices={x: IDS for x in m}),
    "other tokens": lambda m, q: dict(
        target_modules=[q], trainable_token_indices={x: IDS[i:] for i, x in enumerate(m)}
    ),
    "mica": lambda m, q: dict(target_modules=m, init_lora_weights="mica"),
    "hira": None,
    "only tokens": None,
}
SIDES = {"embedding": (True, False), "head": (False, True), "both": (True, True)}
OPTIONS = ("lora", "dora", "module", "tokens")  # kinds that `ensure_weight_tying` is tried with
CASES = [
    (model, kind, side, ensure)
    for model, kind, side, ensure in itertools.product(MODELS, KINDS, SIDES, (False, True))
    if not (ensure and kind not in OPTIONS) and not (kind == "other tokens" and side != "both")
]
# PEFT 0.21 leaves Gemma's scale of embeddings out of HiRA's part of a look-up (its own merged
# weights have it).
CASES = [c for c in CASES if c[:2] != ("gemma", "hira") or c[2] == "head"]
# PEFT 0.21 cannot run its own model with trainable tokens alone on both of a tied pair.
CASES = [c for c in CASES if c[1:3] != ("only tokens", "both") or c[0] == "untied"]
QUICK = [c for c in CASES if c[0] == "llama" and c[1] not in ("mica", "only tokens")]
QUICK += [
    c
    for c in CASES
    if c[1:] in (("lora", "both", False), ("module", "embedding", False), ("tokens", "head", False))
]


def their_base(name):
    family, _, _, tied = MODELS[name]
    config = FAMILIES[family]()
    config.tie_word_embeddings = tied
    return torch_model(config)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    loaded = {}

    def get(name):
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            their_base(name).save_pretrained(folder)
            model, params = peft_jax.load(folder)
            loaded[name] = model, params
        return loaded[name]

    return get


def adapted(name, kind, side, ensure):
    """PEFT's model with an adapter that does something."""
    _, embedding, projection, _ = MODELS[name]
    modules = [m for m, here in zip((embedding, "lm_head"), SIDES[side], strict=True) if here]
    if kind == "hira":
        config = peft.HiraConfig(r=2, target_modules=modules)
    elif kind == "only tokens":
        config = peft.TrainableTokensConfig(token_indices=IDS, target_modules=modules)
    else:
        config = peft.LoraConfig(
            r=2, ensure_weight_tying=ensure, **KINDS[kind](modules, projection)
        )
    torch.manual_seed(1)
    return moved(peft.get_peft_model(their_base(name), config))


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def logits(model, params):
    return peft_jax.bind(model)(params, TOKENS)


def exchange(bases, case, folder, *, checkpoint):
    model, params = bases(case[0])
    theirs = adapted(*case)
    expected = torch_logits(theirs, TOKENS)
    theirs.save_pretrained(folder / "theirs")
    loaded = peft_jax.load_adapter(params, folder / "theirs")
    assert relative_error(logits(model, loaded), expected) < 1e-4
    assert relative_error(logits(model, params), expected) > 1e-3
    peft_jax.save_adapter(folder / "ours", loaded, format="peft")
    back = peft.PeftModel.from_pretrained(their_base(case[0]), folder / "ours").eval()
    assert relative_error(torch_logits(back, TOKENS), expected) < 1e-4
    again = peft_jax.load_adapter(params, folder / "ours")
    assert jax.tree.structure(again) == jax.tree.structure(loaded)
    if not checkpoint:
        return
    merged = peft_jax.merge(loaded)
    peft_jax.save(folder / "merged", model, merged)
    whole = tr.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert relative_error(torch_logits(whole, TOKENS), expected) < 1e-4
    assert relative_error(logits(*peft_jax.load(folder / "merged")), expected) < 1e-4
    if case[1] == "dora":  # an update larger than the weight has no one inverse
        return
    recovered = unmerge(merged, loaded)
    assert relative_error(logits(model, recovered), expected) < 1e-4


@pytest.mark.parametrize("case", QUICK, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_exchange(bases, case, tmp_path):
    exchange(bases, case, tmp_path, checkpoint=case[1] in ("lora", "module") and not case[3])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_exchange_of_all(bases, case, tmp_path):
    exchange(bases, case, tmp_path, checkpoint=True)


OURS = {
    "lora": lambda p, t: peft_jax.lora(p, jax.random.key(0), rank=2, alpha=6, targets=t),
    "hira": lambda p, t: hira(p, jax.random.key(0), rank=2, targets=t),
    "dora": lambda p, t: dora(p, jax.random.key(0), rank=2, targets=t),
    "module": lambda p, t: peft_jax.lora(
        p, jax.random.key(0), rank=2, targets="q_proj", modules_to_save=t
    ),
    "ia3_module": lambda p, t: ia3(p, jax.random.key(0), modules_to_save=t),
    "tokens": lambda p, t: trainable_tokens(p, jax.random.key(0), ids=IDS, targets=t),
}


@pytest.mark.parametrize(
    "side", ["embed_tokens", "embed_tokens/embedding", "embed_tokens/output_embedding"]
)
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.filterwarnings("ignore")
def test_ours_to_peft(bases, kind, side, tmp_path):
    """One embedding for both, or, with `untie`, one of the two alone."""
    model, params = bases("llama")
    ours = perturb(OURS[kind](untie(params) if "/" in side else params, side), scale=0.2)
    if (kind, side) in (("dora", "embed_tokens"), ("tokens", "embed_tokens/embedding")):
        with pytest.raises(ValueError, match="use this package's own format"):
            peft_jax.save_adapter(tmp_path / "peft", ours, format="peft")
        return
    expected = logits(model, ours)
    assert relative_error(logits(model, params), expected) > 1e-3
    peft_jax.save_adapter(tmp_path / "peft", ours)
    back = peft.PeftModel.from_pretrained(their_base("llama"), tmp_path / "peft").eval()
    assert relative_error(torch_logits(back, TOKENS), expected) < 1e-4
    again = peft_jax.load_adapter(params, tmp_path / "peft")
    assert relative_error(logits(model, again), expected) < 1e-5
    assert ("output_embedding" in again["model"]["embed_tokens"]) == ("/" in side)


@pytest.mark.parametrize(
    "side", ["embed_tokens", "embed_tokens/embedding", "embed_tokens/output_embedding"]
)
@pytest.mark.parametrize("kind", ["dora", "tokens", "module"])
def test_own_format_and_bank(bases, kind, side, tmp_path):
    model, params = bases("llama")
    ours = perturb(OURS[kind](untie(params) if "/" in side else params, side), scale=0.2)
    expected = logits(model, ours)
    peft_jax.save_adapter(tmp_path, ours, format="native")
    assert relative_error(logits(model, peft_jax.load_adapter(params, tmp_path)), expected) < 1e-5
    if kind == "dora":
        banked = bank(ours, 2)
        rows = peft_jax.bind(model)(banked, TOKENS, adapter_ids=np.asarray([1, -1]))
        assert relative_error(rows[0], expected[0]) < 1e-5
        assert relative_error(rows[1], logits(model, params)[1]) < 1e-5


def test_an_extended_vocabulary(bases, tmp_path):
    """PEFT stores both embeddings, which are one; they do not train."""
    theirs = their_base("llama")
    theirs.save_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(100)
    theirs.save_pretrained(tmp_path / "resized")
    theirs = moved(peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    with torch.no_grad():
        theirs.get_input_embeddings().weight[90:] += 0.5
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    model, params = peft_jax.load(tmp_path / "resized")
    loaded = peft_jax.load_adapter(params, tmp_path / "adapter")
    expected = torch_logits(theirs, TOKENS)
    assert relative_error(logits(model, loaded), expected) < 1e-4
    trained, _ = count(loaded)
    assert trained == count(peft_jax.lora(params, jax.random.key(0), rank=2, targets="q_proj"))[0]
    peft_jax.save_adapter(tmp_path / "ours", loaded)
    base = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert relative_error(torch_logits(back, TOKENS), expected) < 1e-4


CHECKPOINTS = {
    "llama": lambda: tr.LlamaForCausalLM(FAMILIES["llama3_tied_biased"]()),
    "gpt2": lambda: tr.GPT2LMHeadModel(FAMILIES["gpt2"]()),
    "t5": lambda: tr.T5ForConditionalGeneration(tr.T5Config(**dict(T5_SIZES, d_kv=8))),
    "bert": lambda: tr.BertForMaskedLM(ENCODERS["bert"]()),
    "roberta": lambda: tr.RobertaForMaskedLM(ENCODERS["roberta"]()),
    "distilbert": lambda: tr.DistilBertForMaskedLM(ENCODERS["distilbert"]()),
    "modernbert": lambda: tr.ModernBertForMaskedLM(ENCODERS["modernbert"]()),
}


OTHERS = {  # (model, PEFT's options); heads of masked language models have a bias
    "t5 head": ("t5", dict(target_modules=["lm_head"])),
    "t5 whole head": ("t5", dict(target_modules=["q"], modules_to_save=["lm_head"])),
    "bert head": ("bert", dict(target_modules=["predictions.decoder"])),
    "bert embedding": ("bert", dict(target_modules=["word_embeddings"])),
    "bert whole embedding": (
        "bert",
        dict(target_modules=["query"], modules_to_save=["word_embeddings"]),
    ),
    "bert whole head": (
        "bert",
        dict(target_modules=["query"], modules_to_save=["predictions.decoder"]),
    ),
    "bert tokens": (
        "bert",
        dict(target_modules=["query"], trainable_token_indices={"word_embeddings": IDS}),
    ),
    "distilbert head": ("distilbert", dict(target_modules=["vocab_projector"])),
}


def whole_model(name):
    torch.manual_seed(0)
    return CHECKPOINTS[name]().eval()


def whole_logits(name, model):
    more = {"decoder_input_ids": torch.tensor(TOKENS)} if name == "t5" else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS), **more).logits.numpy()


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_exchange_with_other_heads(case, tmp_path):
    name, options = OTHERS[case]
    whole_model(name).save_pretrained(tmp_path / "base")
    model, params = peft_jax.load(tmp_path / "base")
    theirs = moved(peft.get_peft_model(whole_model(name), peft.LoraConfig(r=2, **options)))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = whole_logits(name, theirs)
    loaded = peft_jax.load_adapter(params, tmp_path / "theirs")
    assert (
        relative_error(
            peft_jax.bind(model)(loaded, *[TOKENS] * (2 if name == "t5" else 1)), expected
        )
        < 1e-4
    )
    peft_jax.save_adapter(tmp_path / "ours", loaded, format="peft", task_type=None)
    back = peft.PeftModel.from_pretrained(whole_model(name), tmp_path / "ours").eval()
    assert relative_error(whole_logits(name, back), expected) < 1e-4
    peft_jax.save(tmp_path / "merged", model, peft_jax.merge(loaded))
    merged = type(whole_model(name)).from_pretrained(tmp_path / "merged").eval()
    assert relative_error(whole_logits(name, merged), expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_that_nothing_looks_up_in(tmp_path):
    """T5's encoder and decoder have modules of their own for its `shared`, whose adapter does
    nothing in PEFT.
    """
    whole_model("t5").save_pretrained(tmp_path / "base")
    _, params = peft_jax.load(tmp_path / "base")
    moved(
        peft.get_peft_model(whole_model("t5"), peft.LoraConfig(r=2, target_modules=["shared"]))
    ).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="PEFT's adapter of shared changes nothing"):
        peft_jax.load_adapter(params, tmp_path / "a")
    ours = peft_jax.lora(params, jax.random.key(0), rank=2, targets="shared")
    with pytest.raises(ValueError, match="PEFT's adapter of shared changes nothing"):
        peft_jax.save_adapter(tmp_path / "ours", ours, format="peft")
    peft_jax.save_adapter(tmp_path / "ours", ours)
    peft_jax.load_adapter(params, tmp_path / "ours")


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_with_another_head_keeps_it(name, tmp_path):
    """`tie_word_embeddings` says that head and embedding are one, and the file holds two:
    transformers 5 keeps them apart.
    """
    theirs = whole_model(name)
    head = theirs.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = type(theirs).from_pretrained(tmp_path / "theirs").eval()
    assert not torch.equal(
        theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight
    )
    expected = whole_logits(name, theirs)
    args = [TOKENS, TOKENS] if name == "t5" else [TOKENS]
    model, params = peft_jax.load(tmp_path / "theirs")
    assert relative_error(peft_jax.bind(model)(params, *args), expected) < 1e-4
    peft_jax.save(tmp_path / "ours", model, params)
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert relative_error(whole_logits(name, again), expected) < 1e-4
    model, params = peft_jax.load(tmp_path / "ours")
    assert relative_error(peft_jax.bind(model)(params, *args), expected) < 1e-4


def test_a_head_that_is_the_embedding_after_all_is_tied(bases, tmp_path):
    model, params = bases("llama")
    peft_jax.save(tmp_path, model, untie(params))
    again, loaded = peft_jax.load(tmp_path)
    assert again.config.tie_embeddings
    assert "output_embedding" not in loaded["model"]["embed_tokens"]
    assert not isinstance(loaded["model"]["embed_tokens"]["embedding"], Trainable)
    with pytest.raises(ValueError, match="no head that is tied to its embedding"):
        untie(bases("untied")[1])
