"""Train the embedded base model on public-domain English (Project Gutenberg novels, Shakespeare).

    python scripts/pretrain_base.py --data ../shared/data --out peft_jax/assets/base

makes a byte-level BPE tokenizer of 4,096 tokens and a Llama-shaped model of 5.5 million parameters,
and writes both as an ordinary Hugging Face folder (bfloat16). About 75 minutes on two CPU cores,
minutes on an accelerator.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from peft_jax.models.config import decoder_config
from peft_jax.models.decoder import Decoder

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '### ' + m['role'] | capitalize + ':\\n' + "
    "m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
PHASES = ((256, 16, 0.9), (512, 8, 0.1))  # sequence length, rows, share of the steps


def paragraphs(data: Path) -> list[list[str]]:
    """Each book as a list of paragraphs: prose with its lines joined, verse as it stands."""
    books = []
    for path in sorted((data / "gutenberg").glob("*.txt")):
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("_", "")
        parts = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
        books.append([part for part in parts if part])
    play = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    return [*books, [part for part in play.split("\n\n") if part]]


def documents(book: list[str], rng: random.Random) -> Iterator[str]:
    """Runs of one to twenty paragraphs, so that the model sees texts of many lengths begin and
    end.
    """
    start = 0
    while start < len(book):
        count = rng.randint(1, 20)
        yield "\n\n".join(book[start : start + count])
        start += count


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <s>, </s>, <pad> and a plain-text chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def token_streams(
    books: list[list[str]], tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) token streams; the last 3% of each book's paragraphs are held out."""
    rng = random.Random(seed)
    parts: dict[str, list[int]] = {"train": [], "held": []}
    train_docs: list[str] = []
    for book in books:
        cut = math.floor(len(book) * 0.97)
        train_docs += documents(book[:cut], rng)
        for text in documents(book[cut:], rng):
            parts["held"] += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    rng.shuffle(train_docs)
    for text in train_docs:
        parts["train"] += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return np.asarray(parts["train"], np.int32), np.asarray(parts["held"], np.int32)


def batches(stream: np.ndarray, length: int, rows: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches [rows, length + 1]; each epoch starts at a new offset and in a new order."""
    for epoch in range(10**9):
        rng = np.random.default_rng((seed, epoch))
        shifted = stream[rng.integers(length) :]
        count = (len(shifted) - 1) // length
        starts = rng.permutation(count) * length
        for i in range(0, count - rows + 1, rows):
            yield np.stack([shifted[s : s + length + 1] for s in starts[i : i + rows]])


def make_optimizer(params, steps: int, peak: float) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the layers' matrices, AdamW for the rest; warm-up, then linear decay
    to zero.
    """
    schedule = optax.join_schedules(
        [optax.linear_schedule(0, peak, 100), optax.linear_schedule(peak, 0.0, steps - 100)], [100]
    )
    spec = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    numbers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            spec if "layer" in jax.tree_util.keystr(path) and leaf.ndim == 3 else None
        ),
        params,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule,
            weight_decay=0.1,
            adam_weight_decay=0.0,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=numbers,
        ),
    )


def loss_fn(model: Decoder, params, batch: jax.Array) -> jax.Array:
    logits = model.apply({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def pretrain(args: argparse.Namespace) -> None:
    data, out = Path(args.data), Path(args.out)
    books = paragraphs(data)
    tokenizer = train_tokenizer([p for book in books for p in book], args.vocab)
    train, held = token_streams(books, tokenizer, args.seed)
    print(
        f"{len(train):,} training tokens, {len(held):,} held out, {len(tokenizer)} tokens in the "
        "vocabulary",
        flush=True,
    )
    hf_config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    model = Decoder(decoder_config(hf_config))
    params = model.init(jax.random.key(args.seed), jnp.zeros((1, 8), jnp.int32))["params"]
    optimizer = make_optimizer(params, args.steps, args.lr)
    state = optimizer.init(params)
    loss = functools.partial(loss_fn, model)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    evaluate = jax.jit(loss)
    held_rows = held[: (len(held) - 1) // 256 * 256 + 1]
    held_rows = np.stack([held_rows[i : i + 257] for i in range(0, len(held_rows) - 256, 256)])
    held_rows = held_rows[: len(held_rows) // 16 * 16].reshape(-1, 16, 257)
    done, start = 0, time.monotonic()
    for length, rows, share in PHASES:
        stop = args.steps if share == PHASES[-1][2] else done + round(args.steps * share)
        for batch in batches(train, length, rows, args.seed):
            if done >= stop:
                break
            params, state, value = step(params, state, batch)
            done += 1
            if done % 50 == 0 or done in (1, 10):
                print(
                    f"step {done} loss {float(value):.4f} {time.monotonic() - start:.0f} s",
                    flush=True,
                )
            if done % 300 == 0 or done == args.steps:
                held_loss = float(np.mean([evaluate(params, b) for b in held_rows]))
                print(f"step {done} held-out {held_loss:.4f} nats/token", flush=True)
                snapshot(args.snapshot, params)
    from peft_jax.hub import save

    save(out, model, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    tokenizer.save_pretrained(out)
    record = {
        "steps": args.steps,
        "seed": args.seed,
        "training_tokens": len(train),
        "held_out_nats_per_token": held_loss,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def snapshot(path: str | None, params) -> None:
    """Keep the newest weights as one .npz file, so that an interrupted run is not lost."""
    if path:
        flat = {
            jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v)
            for k, v in _leaves(params)
        }
        np.savez(path, **flat)


def _leaves(params):
    return jax.tree_util.tree_flatten_with_path(params)[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with gutenberg/ and tinyshakespeare/")
    parser.add_argument("--out", required=True, help="Hugging Face folder to write")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--snapshot", help="an .npz file that receives the weights every 300 steps")
    pretrain(parser.parse_args())
