"""Train a small ModernBERT on public-domain English (Project Gutenberg novels, Shakespeare), for
the benchmarks of encoders.

    python scripts/pretrain_encoder.py --data ../shared/data --out runs/encoder

makes an uncased WordPiece tokenizer of 4,096 tokens and an encoder of 2.3 million parameters (4
layers of 192 features), trained on masked tokens, and writes both as an ordinary Hugging Face
folder. About 25 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ModernBertConfig, PreTrainedTokenizerFast

from peft_jax.core.bind import bind
from peft_jax.data import Record, batch_at, encode_masked, evaluation_batches
from peft_jax.hub import save
from peft_jax.models.blocks import fresh_params
from peft_jax.models.modernbert import ModernBert, modernbert_config
from peft_jax.objectives.reading import cross_entropy
from peft_jax.objectives.tokens import masked_reading

sys.path.insert(0, str(Path(__file__).parent))
from pretrain_base import make_optimizer, paragraphs

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """BERT's tokenizer, uncased."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    ends = [(name, pieces.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


def pretrain(args: argparse.Namespace) -> None:
    books = paragraphs(Path(args.data))
    tokenizer = train_tokenizer([p for book in books for p in book], args.vocab)

    def cut(book):
        return int(len(book) * 0.98)

    texts = {
        "train": ["\n".join(book[i : i + 20]) for book in books for i in range(0, cut(book), 20)],
        "held": ["\n".join(book[cut(book) :]) for book in books],
    }
    rows = {
        k: encode_masked([Record({"text": t}, k) for t in v], tokenizer, args.length)
        for k, v in texts.items()
    }
    print({k: r.tokens.shape for k, r in rows.items()}, flush=True)
    hf_config = ModernBertConfig(
        vocab_size=args.vocab,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        global_attn_every_n_layers=2,
        local_attention=32,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        classifier_pooling="mean",
        architectures=["ModernBertForMaskedLM"],
        pad_token_id=0,
        bos_token_id=2,
        cls_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
    )
    model = ModernBert(modernbert_config(hf_config))
    params = fresh_params(model, args.seed)
    optimizer = make_optimizer(params, args.steps, args.lr)
    apply, state = bind(model), optimizer.init(params)
    reading = masked_reading(
        mask_token=tokenizer.mask_token_id, vocab_size=args.vocab, share=args.share
    )
    loss = functools.partial(cross_entropy, reading, apply)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, key):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    evaluate, start = jax.jit(lambda params, batch: loss(params, batch, None)), time.monotonic()
    for number in range(args.steps):
        batch = batch_at(rows["train"], number, args.rows, seed=args.seed)
        params, state, value = step(
            params, state, batch, jax.random.fold_in(jax.random.key(args.seed), number)
        )
        if (number + 1) % 100 == 0 or number == 9:
            print(
                f"step {number + 1} loss {float(value):.3f} {time.monotonic() - start:.0f} s",
                flush=True,
            )
        if (number + 1) % 500 == 0 or number + 1 == args.steps:
            held = [evaluate(params, b) for b in evaluation_batches(rows["held"], args.rows)]
            nats = float(np.average([v for v, _ in held], weights=[m["weight"] for _, m in held]))
            hits = float(
                np.average([m["accuracy"] for _, m in held], weights=[m["weight"] for _, m in held])
            )
            print(
                f"step {number + 1} held-out {nats:.4f} nats, {hits:.4f} of masked tokens right",
                flush=True,
            )
            save(args.out, model, params, tokenizer=tokenizer)
    record = {
        "steps": args.steps,
        "seed": args.seed,
        "held_out_nats": nats,
        "held_out_accuracy": hits,
    }
    (Path(args.out) / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with gutenberg/ and tinyshakespeare/")
    parser.add_argument("--out", required=True, help="Hugging Face folder to write")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--share", type=float, default=0.3, help="share of the tokens to guess")
    parser.add_argument("--seed", type=int, default=0)
    pretrain(parser.parse_args())
