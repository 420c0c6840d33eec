"""Chat fine-tuning from the command line with the templates of well-known families: the tuned
model, asked with the same template, answers one of its training questions word for word.
"""

import copy
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import peft_jax
from peft_jax.cli import main
from peft_jax.hub.checkpoint import BASE
from tests.data.test_chat import MISTRAL, PHI_4
from tests.data.trl_templates import TOKENS, tokenizer_of
from tests.reference import tiny_llama_folder

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OF_TRL = {
    "qwen3": "qwen3",
    "llama3": "llama3",
    "gemma3": "gemma3",
    "gpt-oss": "gptoss",
    "deepseek-r1-distill": "deepseek_r1_distill",
}
OWN = {"phi4": PHI_4, "mistral": MISTRAL, "smollm2": SMOLLM2}
FAMILIES = [*OF_TRL, *OWN]
IN_CI = ("qwen3",)
ANSWERS = {
    "What is the capital of France?": "It is Paris.",
    "What is the capital of Norway?": "Oslo is.",
    "Who are you?": "A small model.",
}


def tokenizer_with(name):
    if name in OF_TRL:
        return tokenizer_of(OF_TRL[name])
    tokenizer = copy.deepcopy(peft_jax.load_tokenizer(BASE))
    special = sorted({*TOKENS.findall(OWN[name]), "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = OWN[name]
    return tokenizer


def folder_of(path: Path, name: str) -> Path:
    """A tiny model with a family's chat template."""
    tiny_llama_folder(path, vocab_size=4224, max_position_embeddings=512)
    tokenizer_with(name).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "name", [f if f in IN_CI else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_a_tuned_model_answers_as_it_was_taught(tmp_path, name):
    reasoning = {"reasoning_content": "I know it."} if name == "deepseek-r1-distill" else {}
    file = tmp_path / "chats.jsonl"
    records = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer, **reasoning},
            ]
        }
        for question, answer in ANSWERS.items()
    ]
    file.write_text("".join(f"{json.dumps(r)}\n" for r in records))
    (tmp_path / "base").mkdir()
    options = [
        f"data.train.path={file}",
        "data.validation=null",
        f"data.sequence_length={160 if name == 'gpt-oss' else 48}",
        "data.template_options={reasoning_effort: low, enable_thinking: false}",
        "generate.temperature=0",
        "generate.max_tokens=24",
    ]
    question, answer = next(iter(ANSWERS.items()))
    train = [
        f"model.path={folder_of(tmp_path / 'base', name)}",
        "method.name=full",
        "optimizer.learning_rate=0.02",
        "train.steps=80",
        "train.batch_size=8",
        "data.packing=false",
        "train.log_every=4",
        "train.tensorboard=false",
        f"output={tmp_path / 'run'}",
    ]
    runner = CliRunner()
    result = runner.invoke(main, ["train", *options, *train])
    assert result.exit_code == 0, (result.output, result.exception)
    # a text is a user's turn where the data is conversations
    prompts = [question, [{"role": "user", "content": question}]]
    tuned = f"model.path={tmp_path / 'run' / 'model'}"
    result = runner.invoke(
        main, ["generate", *options, tuned, f"generate.prompts={json.dumps(prompts)}"]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    _, *answers = result.output.split(question)
    thought = "I know it." if reasoning else ""  # the tags are special tokens here
    for said in map(str.strip, answers):
        assert said.startswith(thought), result.output
        assert said.removeprefix(thought).strip() == answer, result.output
    assert len(answers) == 2
