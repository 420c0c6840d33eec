"""The order of a run: stages that the user lists, or those that its sections ask for."""

from pathlib import Path

import pytest

from peft_jax.core.options import ConfigError, option
from peft_jax.core.stage import Stage
from peft_jax.recipes.config import load_config, parse_config
from peft_jax.recipes.plan import planned
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.stages import ORDER, STAGES

ROOT = Path(__file__).parents[2]
FLAT = {  # what each of these shipped files means
    "prune": ["prune", "train"],
    "qlora": ["quantize", "train"],
    "distill": ["prune", "train"],
    "quickstart": ["train"],
    "chain": ["prune", "train", "merge", "quantize", "train"],
}


def names(config):
    return [entry.stage.name for entry in planned(config)]


@pytest.mark.parametrize("name", FLAT)
def test_shipped_files_mean_these_stages(name):
    assert names(load_config(str(ROOT / "configs" / f"{name}.yaml"))) == FLAT[name]


def test_sections_ask_for_stages_in_one_order():
    every = {"prune": {"sparsity": 0.5}, "model": {"adapter": "x"}}
    assert names(parse_config(every | {"quantize": {"format": "nf4"}})) == [
        "prune",
        "quantize",
        "adapter",
        "train",
    ]
    assert names(parse_config(every | {"factorize": {"keep": 0.5}})) == [
        "prune",
        "factorize",
        "adapter",
        "train",
    ]
    loftq = {"method": {"name": "lora", "init": "loftq"}, "quantize": {"format": "nf4"}}
    assert names(parse_config(loftq)) == ["train"]


def test_every_stage_is_found_and_has_its_section():
    assert set(STAGES) == {*ORDER, "merge", "edit"}
    config = RunConfig()
    for stage in STAGES.values():
        section = stage.section_of(config)
        assert isinstance(section, stage.section or type(None))
        assert all(name.partition(".")[0] in stage.places() for name in stage.settings(section))


def test_a_listed_stage_changes_options_of_its_own():
    config = parse_config(
        {
            "quantize": {"format": "nf4", "options": {"block_size": 64}},
            "optimizer": {"learning_rate": 0.5, "b1": 0.8},
            "stages": [
                {"quantize": {"options": {"double": True}}},
                "train",
                {"name": "train", "method": {"name": "bottleneck"}, "optimizer": {"b1": 0.1}},
                {"train": {"steps": 7}, "data": {"sequence_length": 16}},
            ],
        }
    )
    first, second, third, fourth = planned(config)
    assert (first.section.format, first.section.options) == ("nf4", {"double": True})
    assert (second.section.method, second.section.optimizer.b1) == ({"name": "lora"}, 0.8)
    assert (third.section.method, third.section.optimizer.b1) == ({"name": "bottleneck"}, 0.1)
    assert third.section.optimizer.learning_rate == 0.5
    assert (fourth.section.train.steps, fourth.config.data.sequence_length) == (7, 16)
    assert [entry.label for entry in (first, fourth)] == ["1-quantize", "4-train"]
    assert config.data.sequence_length == 256


def test_overrides_reach_into_the_list():
    base = str(ROOT / "configs" / "chain.yaml")
    changes = ["stages.1.train.steps=5", "stages.4.method={name: dora, rank: 2}"]
    entries = planned(load_config(base, changes))
    assert [e.section.train.steps for e in (entries[1], entries[4])] == [5, 100]
    assert entries[4].section.method == {"name": "dora", "rank": 2}
    assert names(load_config(base, ["stages=[prune,merge]"])) == ["prune", "merge"]
    with pytest.raises(ConfigError, match="'7' is none of the 5 numbers from 0"):
        load_config(base, ["stages.7.train.steps=5"])


BAD = {
    "unknown stage": (["trian"], r"stages.0: unknown stage 'trian'. Did you mean 'train'\?"),
    "nothing asked": (["train", "prune"], r"stages.1: prune needs prune.sparsity, prune.pattern"),
    "no format": (["quantize"], r"stages.0: quantize needs quantize.format"),
    "unknown section": (
        [{"name": "train", "metod": {}}],
        r"unknown option 'stages.0.metod'. Did you mean 'method'\? Options of the stage train",
    ),
    "another stage's section": (
        [{"name": "merge", "prune": {}}],
        r"unknown option 'stages.0.prune'.* Options of the stage merge: data",
    ),
    "unknown option": (
        [{"train": {"stpes": 3}}],
        r"stages.0: unknown option 'train.stpes'. Did you mean 'steps'\?",
    ),
    "wrong type": (
        ["train", {"train": {"steps": "many"}}],
        r"stages.1: option 'train.steps': input should be a valid integer.*got 'many'",
    ),
    "method's option": (
        [{"name": "train", "method": {"rnak": 3}}],
        r"stages.0: unknown option 'method.rnak' of lora. Did you mean 'rank'\?",
    ),
    "what nothing reads": (
        [{"name": "train", "quantize": {"format": "nf4"}}],
        r"stages.0.quantize: this stage train has no use for it",
    ),
    "no name": ([{"method": {}}], r"stages.0 does not say which stage it is"),
    "two names": ([{"train": {}, "quantize": {}}], r"stages.0 does not say which stage it is"),
    "no list": ("prune", r"option 'stages': input should be a valid list"),
    "loftq over codes": (
        [
            {"quantize": {"format": "nf4"}},
            {"name": "train", "method": {"init": "loftq"}, "quantize": {"format": "nf4"}},
        ],
        r"stages.1: method.init=loftq quantizes the base itself",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_list_that_cannot_be_is_one_sentence(name):
    stages, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config({"stages": stages})
    assert "\n" not in str(caught.value)


def test_an_adapter_to_start_from_has_its_place_in_the_list():
    with pytest.raises(ConfigError, match=r"model.adapter is put into the model by the stage"):
        parse_config({"model": {"adapter": "x"}, "stages": ["train"]})
    listed = {"model": {"adapter": "x"}, "stages": ["adapter", "merge", "train"]}
    assert names(parse_config(listed)) == ["adapter", "merge", "train"]


def test_a_stage_tells_what_it_needs_of_the_data():
    config = parse_config(
        {
            "prune": {"sparsity": 0.5, "score": "sparsegpt", "calibration_batches": 3},
            "quantize": {"format": "int4", "rounding": "gptq"},
        }
    )
    needs = {name: STAGES[name].needs(STAGES[name].section_of(config)) for name in STAGES}
    assert (needs["prune"].batches, needs["prune"].statistics) == (3, ("covariance",))
    assert needs["quantize"].batches == 8
    assert needs["merge"].batches == needs["train"].batches == 0
    nearest = parse_config({"quantize": {"format": "int4"}})
    assert STAGES["quantize"].needs(nearest.quantize).batches == 0


def test_what_alters_nothing_is_no_part_of_a_stages_identity():
    def of(name, **tree):
        config = parse_config(tree)
        return STAGES[name].settings(STAGES[name].section_of(config))

    assert of("prune", prune={"sensitivity": []}) == of("prune")
    assert of("prune", prune={"targets": ["q_proj"]}) != of("prune")
    assert of("train", train={"log_every": 3}) == of("train", quantize={"format": "nf4"})
    assert of("train", train={"steps": 3}) != of("train")
    assert of("merge") == {}


def test_options_say_once_whether_they_alter():
    assert option(1, "help").metadata["alters"]
    assert not option([], "help", alters=False).metadata["alters"]
    assert isinstance(STAGES["train"], Stage)
