"""Data: records from files and datasets, templates, packing, labels, batches whose position can be
resumed.
"""

from peft_jax.data.batches import batch_at, evaluation_batches, unpadded
from peft_jax.data.chat import encode_chat
from peft_jax.data.encode import Example, Rows, encode, fingerprint, fit, pack, with_fields
from peft_jax.data.labelled import (
    LabelledRows,
    MaskedRows,
    PairRows,
    Question,
    SourceRows,
    encode_classification,
    encode_masked,
    encode_pairs,
    encode_questions,
    encode_sources,
    encode_tagging,
    label_ids,
    label_names,
)
from peft_jax.data.readers import Record
from peft_jax.data.records import read_records
from peft_jax.data.skipped import MalformedRecordError

__all__ = [
    "Example",
    "LabelledRows",
    "MalformedRecordError",
    "MaskedRows",
    "PairRows",
    "Question",
    "Record",
    "Rows",
    "SourceRows",
    "batch_at",
    "encode",
    "encode_chat",
    "encode_classification",
    "encode_masked",
    "encode_pairs",
    "encode_questions",
    "encode_sources",
    "encode_tagging",
    "evaluation_batches",
    "fingerprint",
    "fit",
    "label_ids",
    "label_names",
    "pack",
    "read_records",
    "unpadded",
    "with_fields",
]
