"""Tests run on the CPU with 8 virtual devices; PyTorch (for references) is kept to one thread a
worker.
"""

import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jaxlib.version
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if jaxlib.version.__version_info__ < (
    0,
    12,
):  # XLA ends a process that names a flag which it no longer has
    FLAGS.append(
        "--xla_cpu_use_fusion_emitters=false"
    )  # the older emitters compile in less than half the time
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers and the programs that tests start compile the same things: they share what they have
# compiled in this session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="peft_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

gc.set_threshold(
    100_000, 20, 20
)  # tracing makes millions of small objects, which would be gone through again and again

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_unconfigure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        skip = pytest.mark.skip(reason="slow; run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data beside the repository; tests that need it are skipped where it is
    absent.
    """
    if not SHARED.is_dir():
        pytest.skip("the folder shared/data beside the repository is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny Llama checkpoint with the embedded model's tokenizer, in a Hugging Face folder."""
    from tests.reference import tiny_llama_folder

    return tiny_llama_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer_of(request, tiny_folder):
    """kind -> the embedded model's tokenizer, or a real byte-level, WordPiece or SentencePiece one
    of the shared data.
    """
    import transformers

    import peft_jax

    kinds = {
        "gpt2": transformers.GPT2TokenizerFast,
        "bert_uncased": transformers.BertTokenizerFast,
        "mistral_v1": transformers.LlamaTokenizerFast,
    }

    @functools.cache
    def load(kind):
        if kind == "embedded":
            return peft_jax.load_tokenizer(tiny_folder)
        return kinds[kind].from_pretrained(
            request.getfixturevalue("shared_data") / "tokenizers" / kind
        )

    return load


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Programs compiled for one module's tests are of no use to the next; keeping all would take
    gigabytes.
    """
    yield
    import jax

    jax.clear_caches()
    gc.collect()
