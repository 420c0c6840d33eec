"""PEFT's prompts, prefixes, adaption prompts and norms: exchanged both ways, logits and greedy
generation.
"""

import jax
import numpy as np
import peft
import pytest
import torch

import peft_jax
from peft_jax.adapters import (
    adaption_prompt,
    cpt,
    ia3,
    ln_tuning,
    multitask_prompt_tuning,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
)
from tests.reference import FAMILIES, perturb, random_tokens, relative_error, torch_model

TOKENS = random_tokens(2, 9)
P = 4
COMMON = {"task_type": "CAUSAL_LM"}
# method -> (PEFT's configuration, ours from the start)
METHODS = {
    "prompt_tuning": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=P, **COMMON),
        lambda p, m=None: prompt_tuning(p, jax.random.key(0), num_virtual_tokens=P, model=m),
    ),
    "p_tuning": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=12, **COMMON),
        lambda p: p_tuning(p, jax.random.key(0), num_virtual_tokens=P, hidden_size=12),
    ),
    "p_tuning_lstm": (
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=P,
            encoder_hidden_size=6,
            encoder_reparameterization_type="LSTM",
            encoder_num_layers=2,
            **COMMON,
        ),
        lambda p: p_tuning(
            p, jax.random.key(0), num_virtual_tokens=P, hidden_size=6, encoder="lstm"
        ),
    ),
    "cpt": (
        lambda: peft.CPTConfig(
            cpt_token_ids=[5, 6, 7, 8],
            cpt_mask=[1] * 4,
            cpt_tokens_type_mask=[1, 2, 3, 4],
            opt_projection_epsilon=9.0,
            **COMMON,
        ),
        lambda p, m=None: cpt(
            p,
            jax.random.key(0),
            token_ids=[5, 6, 7, 8],
            token_types=[1, 2, 3, 4],
            epsilon=9.0,
            model=m,
        ),
    ),
    "multitask": (
        lambda: peft.MultitaskPromptTuningConfig(
            num_virtual_tokens=P, num_tasks=3, num_ranks=2, **COMMON
        ),
        lambda p: multitask_prompt_tuning(
            p, jax.random.key(0), num_virtual_tokens=P, num_tasks=3, num_ranks=2
        ),
    ),
    "prefix": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=P, **COMMON),
        lambda p: prefix_tuning(p, jax.random.key(0), num_virtual_tokens=P),
    ),
    "prefix_projection": (
        None,  # PEFT's own is not made for grouped queries
        lambda p: prefix_tuning(
            p, jax.random.key(0), num_virtual_tokens=P, projection=True, hidden_size=5
        ),
    ),
    "adaption_prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=2, **COMMON),
        lambda p: adaption_prompt(p, jax.random.key(0), adapter_len=P, adapter_layers=2),
    ),
    "ln_tuning": (lambda: peft.LNTuningConfig(**COMMON), lambda p: ln_tuning(p)),
    "ia3": (lambda: peft.IA3Config(**COMMON), lambda p: ia3(p, jax.random.key(0))),
}
FAMILY = {"ia3": "qwen2_sliding"}  # its biases are scaled too
SLIDING = ("prompt_tuning", "prefix")
GEMMAS = (
    "gemma",
    "gemma2_caps",
    "gemma3",
)  # their embeddings are scaled, and in transformers virtual tokens are not
AT_THE_EMBEDDING = ("prompt_tuning", "p_tuning", "p_tuning_lstm", "cpt", "multitask")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    loaded = {}
    for family in ("llama2", "qwen2_sliding", "mistral_sliding", "gpt2", *GEMMAS):
        folder = tmp_path_factory.mktemp(family)
        torch_model(FAMILIES[family]()).save_pretrained(folder)
        model, params = peft_jax.load(folder)
        loaded[family] = model, params, jax.jit(peft_jax.bind(model))
    return loaded


def their_logits(model, tokens, tasks=None):
    more = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    with torch.no_grad():
        logits = model(
            torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long), **more
        ).logits
    return logits[:, -tokens.shape[1] :].numpy()


def their_tokens(model, tokens, tasks=None):
    """Greedy continuations by PEFT's forward pass. (Its `generate` departs from it for prompts
    under transformers 5.)
    """
    rows = np.asarray(tokens)
    for _ in range(6):
        rows = np.concatenate(
            [rows, their_logits(model, rows, tasks)[:, -1].argmax(-1)[:, None]], axis=1
        )
    return rows[:, -6:].tolist()


def same(model, run, params, theirs, tasks):
    ids = {} if tasks is None else {"adapter_ids": np.asarray(tasks)}
    expected = their_logits(theirs, TOKENS, tasks)
    assert relative_error(run(params, TOKENS, **ids), expected) < 1e-4
    ours = peft_jax.generate(
        model, params, TOKENS.tolist(), max_tokens=6, adapter_ids=tasks, eos_token_id=[]
    )
    assert ours == their_tokens(theirs, TOKENS, tasks)
    return expected


CASES = [(m, FAMILY.get(m, "llama2")) for m in METHODS] + [(m, "mistral_sliding") for m in SLIDING]
CASES += [("adaption_prompt", "gpt2")]  # one projection for queries, keys and values


def theirs_of(family, method, folder):
    """A model with PEFT's, moved from its start and saved in a folder."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(torch_model(FAMILIES[family]()), METHODS[method][0]())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.eval().save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(("method", "family"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_exchange(bases, method, family, tmp_path):
    model, params, run = bases[family]
    configure, make = METHODS[method]
    tasks = [2, 0] if method == "multitask" else None
    if configure is not None:
        theirs = theirs_of(family, method, tmp_path / "theirs")
        loaded = peft_jax.load_adapter(params, tmp_path / "theirs")
        expected = same(model, run, loaded, theirs, tasks)
        assert relative_error(run(params, TOKENS), expected) > 1e-3
    ours = perturb(make(params), scale=0.3)
    peft_jax.save_adapter(tmp_path / "ours", ours)
    back = peft.PeftModel.from_pretrained(torch_model(FAMILIES[family]()), tmp_path / "ours").eval()
    same(model, run, ours, back, tasks)
    same(model, run, peft_jax.load_adapter(params, tmp_path / "ours", name="again"), back, tasks)


@pytest.mark.parametrize("family", GEMMAS)
@pytest.mark.parametrize("method", AT_THE_EMBEDDING)
@pytest.mark.filterwarnings("ignore")
def test_exchange_where_embeddings_are_scaled(bases, method, family, tmp_path):
    model, params, run = bases[family]
    tasks = np.asarray([2, 0]) if method == "multitask" else None
    theirs = theirs_of(family, method, tmp_path / "theirs")
    loaded = peft_jax.load_adapter(params, tmp_path / "theirs")
    assert (
        relative_error(run(loaded, TOKENS, adapter_ids=tasks), their_logits(theirs, TOKENS, tasks))
        < 1e-5
    )
    more = (model,) if method in ("prompt_tuning", "cpt") else ()
    ours = perturb(METHODS[method][1](params, *more), scale=0.3)
    peft_jax.save_adapter(tmp_path / "ours", ours)
    back = peft.PeftModel.from_pretrained(torch_model(FAMILIES[family]()), tmp_path / "ours").eval()
    expected = their_logits(back, TOKENS, tasks)
    assert relative_error(run(ours, TOKENS, adapter_ids=tasks), expected) < 1e-5
    again = peft_jax.load_adapter(params, tmp_path / "ours")
    assert relative_error(run(again, TOKENS, adapter_ids=tasks), expected) < 1e-5
    if method == "cpt":
        assert peft_jax.generate(
            model, ours, TOKENS.tolist(), max_tokens=6, eos_token_id=[]
        ) == their_tokens(back, TOKENS)


@pytest.mark.filterwarnings("ignore")
def test_prompts_start_from_scaled_rows(bases):
    model, params, run = bases["gemma3"]
    theirs = peft.get_peft_model(torch_model(FAMILIES["gemma3"]()), METHODS["cpt"][0]()).eval()
    expected = their_logits(theirs, TOKENS)
    assert relative_error(run(METHODS["cpt"][1](params, model), TOKENS), expected) < 1e-5
    text = {"num_virtual_tokens": P, "init": "text", "token_ids": [5, 6, 7, 8]}
    key = jax.random.key(0)
    assert (
        relative_error(run(prompt_tuning(params, key, **text, model=model), TOKENS), expected)
        < 1e-5
    )
    drawn = prompt_tuning(params, key, num_virtual_tokens=P, init="vocabulary", model=model)
    rows = (
        theirs.get_input_embeddings()(torch.arange(FAMILIES["gemma3"]().vocab_size))
        .detach()
        .numpy()
    )
    found = np.asarray(drawn["model"]["embed_tokens"]["tokens_default"].embeddings)
    assert np.abs(found[:, None] - rows[None]).max(-1).min(-1).max() < 1e-5
    with pytest.raises(
        ValueError,
        match=r"times 1, and this model multiplies them by 5.65685; give the method model=model",
    ):
        run(prompt_tuning(params, key, **text), TOKENS)


def test_what_is_added_at_a_scaled_embedding_is_not_scaled(bases):
    from peft_jax.knowledge.inputs import entity_fusion, reads_knowledge

    model, params, _ = bases["gemma3"]
    fused = perturb(entity_fusion(params, np.eye(2, 3)))
    entities = np.random.default_rng(0).integers(0, 3, TOKENS.shape)
    node = fused["model"]["embed_tokens"]["entities_default"]
    vectors = np.concatenate([np.zeros((1, 32)), np.asarray(node.table @ node.weight)])[entities]
    theirs = torch_model(FAMILIES["gemma3"]())
    with torch.no_grad():
        embedded = theirs.get_input_embeddings()(torch.tensor(TOKENS)) + torch.tensor(
            vectors, dtype=torch.float32
        )
        expected = theirs(inputs_embeds=embedded).logits.numpy()
    assert (
        relative_error(
            reads_knowledge(peft_jax.bind(model))(fused, TOKENS, entities=entities), expected
        )
        < 1e-5
    )
