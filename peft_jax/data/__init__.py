"""Data: records from files and datasets, templates, packing, batches whose position can be resumed."""

from peft_jax.data.batches import batch_at, evaluation_batches
from peft_jax.data.encode import Example, Rows, encode, fit, pack
from peft_jax.data.records import MalformedRecordError, Record, read_records

__all__ = [
    "Example", "MalformedRecordError", "Record", "Rows", "batch_at", "encode", "evaluation_batches", "fit", "pack",
    "read_records",
]  # fmt: skip
