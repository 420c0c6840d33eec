"""The options that methods share: declared once, refused by the nearest name, one grammar of
targets.
"""

import inspect
from typing import Annotated, Unpack

import jax
import jax.numpy as jnp
import pytest

import peft_jax
from peft_jax.adapters import reft
from peft_jax.core import places
from peft_jax.core.placing import find_modules
from peft_jax.core.where import REQUIRED, Option, Selection, Where, options_of
from peft_jax.low_rank import LoRA, boft
from peft_jax.methods import METHODS

TREE = {
    "embed": {"embedding": jnp.zeros((8, 4))},
    "layers": {
        "up_proj": {"kernel": jnp.zeros((2, 4, 4))},
        "down_proj": {"kernel": jnp.zeros((2, 4, 4))},
    },
    "lm_head": {"kernel": jnp.zeros((4, 8))},
}
KEY = jax.random.key(0)


def some(params, key, *, size: Annotated[int, "its size"], plain: int = 3, **where: Unpack[Where]):
    """A method's function."""
    return Selection.of(some, where)


def test_options_of_a_function_and_of_its_group():
    found = options_of(some)
    assert found["size"] == Option(int, REQUIRED, "its size")
    assert found["plain"] == Option(int, 3, "")
    assert found["targets"].default == "all-linear"
    assert "all-linear" in found["targets"].help
    assert list(found)[2:] == [
        *("targets", "exclude", "layers", "layout"),
        *("modules_to_save", "adapter"),
    ]


def test_a_selection_has_what_was_given_and_the_defaults():
    at = some(None, None, size=1, layers=[1], exclude="up_proj")
    assert (at.layers, at.exclude, at.targets, at.adapter) == (
        [1],
        "up_proj",
        "all-linear",
        "default",
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_option_is_refused_by_the_nearest_name(name):
    method = METHODS[name]
    required = {n: [1] for n, o in method.options.items() if o.default is REQUIRED}
    option = next(n for n in method.options if n not in required)
    said = rf"{method.function.__name__}\(\) has no option '{option}x'. Did you mean '{option}"
    with pytest.raises(TypeError, match=said):
        method(TREE, KEY, **required, **{f"{option}x": 1})


def test_the_message_names_own_options_too():
    with pytest.raises(TypeError, match=r"lora\(\) has no option 'rnak'. Did you mean 'rank'\?"):
        peft_jax.lora(TREE, KEY, rnak=4)
    with pytest.raises(TypeError, match=r"boft\(\) has no option 'bias'"):
        boft(TREE, KEY, bias="all")


@pytest.mark.parametrize("name", METHODS)
def test_what_a_record_says_of_its_function_is_so(name):
    method = METHODS[name]
    assert method.takes_model == ("model" in method.options)
    assert (method.needs is not None) == ("statistics" in method.options)
    taken = {n for o in method.variants for n in o} | set(method.example)
    assert taken <= set(method.options)
    parameters = list(inspect.signature(method.function).parameters)
    assert parameters[:2] == ["params", "key"]


@pytest.mark.parametrize(
    "where",
    [
        {"targets": "all-linear"},
        {"targets": ["up_proj", "down_proj"], "exclude": "up_proj"},
        {"targets": "re:.*(up|down)_proj", "layers": [1]},
        {"targets": "layers.1.*_proj"},
    ],
    ids=str,
)
def test_one_grammar_for_weights_and_modules(where):
    def gate(x):
        return None if x.gate is None else x.gate.tolist()

    weights = places(peft_jax.lora(TREE, KEY, rank=1, **where))
    found = {p: gate(w) for p, w in weights.items() if isinstance(w, LoRA)}
    assert found == {f"{m.path}/kernel": gate(m) for m in find_modules(TREE, **where)}
    assert found


@pytest.mark.parametrize("call", [peft_jax.lora, reft], ids=["weights", "modules"])
def test_wrong_targets_are_refused_by_the_nearest_name(call):
    with pytest.raises(ValueError, match=r"'up_porj' matches no\w*.*Did you mean 'up_proj'\?"):
        call(TREE, KEY, targets="up_porj", rank=1)
    with pytest.raises(ValueError, match="there is no layer 2; layers here: 0 to 1"):
        call(TREE, KEY, targets="up_proj", layers=[2], rank=1)


@pytest.mark.parametrize("name", METHODS)
def test_each_option_has_help(name):
    assert [n for n, o in METHODS[name].options.items() if not o.help.strip()] == []
