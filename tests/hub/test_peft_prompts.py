"""PEFT's prompts, prefixes, adaption prompts and norms: exchanged both ways, logits and greedy generation."""

import jax
import numpy as np
import peft
import pytest
import torch

import peft_jax
from tests.reference import FAMILIES, perturb, random_tokens, relative_error, torch_model

TOKENS = random_tokens(2, 9)
P = 4
COMMON = {"task_type": "CAUSAL_LM"}
# method -> (PEFT's configuration, ours from the start)
METHODS = {
    "prompt_tuning": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=P, **COMMON),
        lambda p: peft_jax.prompt_tuning(p, jax.random.key(0), num_virtual_tokens=P),
    ),
    "p_tuning": (
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=12, **COMMON),
        lambda p: peft_jax.p_tuning(p, jax.random.key(0), num_virtual_tokens=P, hidden_size=12),
    ),
    "p_tuning_lstm": (
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=P, encoder_hidden_size=6, encoder_reparameterization_type="LSTM", encoder_num_layers=2, **COMMON
        ),
        lambda p: peft_jax.p_tuning(p, jax.random.key(0), num_virtual_tokens=P, hidden_size=6, encoder="lstm"),
    ),
    "cpt": (
        lambda: peft.CPTConfig(
            cpt_token_ids=[5, 6, 7, 8],
            cpt_mask=[1] * 4,
            cpt_tokens_type_mask=[1, 2, 3, 4],
            opt_projection_epsilon=9.0,
            **COMMON,
        ),
        lambda p: peft_jax.cpt(p, jax.random.key(0), token_ids=[5, 6, 7, 8], token_types=[1, 2, 3, 4], epsilon=9.0),
    ),
    "multitask": (
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=3, num_ranks=2, **COMMON),
        lambda p: peft_jax.multitask_prompt_tuning(p, jax.random.key(0), num_virtual_tokens=P, num_tasks=3, num_ranks=2),
    ),
    "prefix": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=P, **COMMON),
        lambda p: peft_jax.prefix_tuning(p, jax.random.key(0), num_virtual_tokens=P),
    ),
    "prefix_projection": (
        None,  # PEFT's own is not made for grouped queries
        lambda p: peft_jax.prefix_tuning(p, jax.random.key(0), num_virtual_tokens=P, projection=True, hidden_size=5),
    ),
    "adaption_prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=2, **COMMON),
        lambda p: peft_jax.adaption_prompt(p, jax.random.key(0), adapter_len=P, adapter_layers=2),
    ),
    "ln_tuning": (lambda: peft.LNTuningConfig(**COMMON), lambda p: peft_jax.ln_tuning(p)),
    "ia3": (lambda: peft.IA3Config(**COMMON), lambda p: peft_jax.ia3(p, jax.random.key(0))),
}
FAMILY = {"ia3": "qwen2_sliding"}  # its biases are scaled too
SLIDING = ("prompt_tuning", "prefix")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    loaded = {}
    for family in ("llama2", "qwen2_sliding", "mistral_sliding", "gpt2"):
        folder = tmp_path_factory.mktemp(family)
        torch_model(FAMILIES[family]()).save_pretrained(folder)
        model, params = peft_jax.load(folder)
        loaded[family] = model, params, jax.jit(peft_jax.bind(model))
    return loaded


def their_logits(model, tokens, tasks=None):
    more = {} if tasks is None else {"task_ids": torch.tensor(tasks)}
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=torch.ones(tokens.shape, dtype=torch.long), **more).logits
    return logits[:, -tokens.shape[1] :].numpy()


def their_tokens(model, tokens, tasks=None):
    """Greedy continuations by PEFT's forward pass. (Its `generate` departs from it for prompts under transformers 5.)"""
    rows = np.asarray(tokens)
    for _ in range(6):
        rows = np.concatenate([rows, their_logits(model, rows, tasks)[:, -1].argmax(-1)[:, None]], axis=1)
    return rows[:, -6:].tolist()


def same(model, run, params, theirs, tasks):
    ids = {} if tasks is None else {"adapter_ids": np.asarray(tasks)}
    expected = their_logits(theirs, TOKENS, tasks)
    assert relative_error(run(params, TOKENS, **ids), expected) < 1e-4
    ours = peft_jax.generate(model, params, TOKENS.tolist(), max_tokens=6, adapter_ids=tasks)
    assert ours == their_tokens(theirs, TOKENS, tasks)
    return expected


CASES = [(m, FAMILY.get(m, "llama2")) for m in METHODS] + [(m, "mistral_sliding") for m in SLIDING]
CASES += [("adaption_prompt", "gpt2")]  # one projection for queries, keys and values


@pytest.mark.parametrize(("method", "family"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_exchange(bases, method, family, tmp_path):
    model, params, run = bases[family]
    configure, make = METHODS[method]
    tasks = [2, 0] if method == "multitask" else None
    if configure is not None:
        torch.manual_seed(0)
        theirs = peft.get_peft_model(torch_model(FAMILIES[family]()), configure())
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        loaded = peft_jax.load_adapter(params, tmp_path / "theirs")
        expected = same(model, run, loaded, theirs, tasks)
        assert relative_error(run(params, TOKENS), expected) > 1e-3
    ours = perturb(make(params), scale=0.3)
    peft_jax.save_adapter(tmp_path / "ours", ours)
    back = peft.PeftModel.from_pretrained(torch_model(FAMILIES[family]()), tmp_path / "ours").eval()
    same(model, run, ours, back, tasks)
    same(model, run, peft_jax.load_adapter(params, tmp_path / "ours", name="again"), back, tasks)
