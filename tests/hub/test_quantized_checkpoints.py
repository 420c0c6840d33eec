"""Quantized folders from other tools, and ours in those tools.

The packers for GPTQ, AWQ and compressed-tensors are written from their published layouts, in NumPy.
"""

import copy
import json
import logging

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import peft_jax
from peft_jax.core import places, select
from peft_jax.core.mesh import make_mesh
from peft_jax.hub.checkpoint import linear_modules
from peft_jax.hub.quantized import TOOLS
from peft_jax.models.blocks import abstract_params
from peft_jax.models.families import FAMILIES as OURS
from peft_jax.models.families import hf_config_of
from peft_jax.quantization import FP4, FP8, MXFP4, NF4, Int, Quantized, quantize_weight
from tests.reference import FAMILIES, random_tokens, relative_error, torch_logits, torch_model

logging.getLogger("transformers").setLevel(logging.ERROR)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(2, 12)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """(folder, PyTorch model) of a dense Llama."""
    config = FAMILIES["llama2"]()
    config.update(SIZES)
    model = torch_model(config)
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    return folder, model


def dequantized(model):
    """Weights [out, in] of a PyTorch model's 4-bit layers, by bitsandbytes."""
    layers = {n: m.weight for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    return {n: bnb.dequantize_4bit(w.data, w.quant_state) for n, w in layers.items()}


def linear_names(model):
    return [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]


# --------------------------------------------------------------------------------------------------
# bitsandbytes


@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", False)])
def test_bitsandbytes_folders_give_the_same_logits(dense, tokens, tmp_path, kind, double):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        dense[0], quantization_config=config, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path)
    model, params = peft_jax.load(tmp_path)
    nodes = [w for w in places(params).values() if isinstance(w, Quantized)]
    assert len(nodes) == 7
    assert nodes[0].format == (NF4(double=double) if kind == "nf4" else FP4(double=double))
    assert (
        relative_error(
            peft_jax.bind(model)(params, tokens), logits_with(dense[0], dequantized(theirs), tokens)
        )
        < 1e-5
    )
    # ... which is what quantizing here gives, code by code
    ours = peft_jax.quantize(peft_jax.load(dense[0])[1], nodes[0].format)
    for path, w in places(ours).items():
        if isinstance(w, Quantized):
            found = places(params)[path]
            np.testing.assert_array_equal(w.codes, found.codes)
            # Doubled scales that lie between two values fall on either side: bitsandbytes is off
            # the nearest by up to 2e-5.
            differing = np.abs(w.materialize() - found.materialize()) > 1e-6
            assert differing.mean() < 0.01


def test_llm_int8_folders_give_the_logits_of_their_weights(dense, tokens, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(dense[0], quantization_config=config).save_pretrained(
        tmp_path
    )
    stored = load_file(tmp_path / "model.safetensors")
    weights = {
        n: stored[f"{n}.weight"] * stored[f"{n}.SCB"][:, None] / 127 for n in linear_names(dense[1])
    }
    model, params = peft_jax.load(tmp_path)
    assert (
        relative_error(peft_jax.bind(model)(params, tokens), logits_with(dense[0], weights, tokens))
        < 1e-5
    )


@pytest.mark.parametrize("format", [NF4(), NF4(block_size=32, double=False), FP4()], ids=str)
@pytest.mark.parametrize("scan", [True, False])
def test_bitsandbytes_folders_written_here_load_there(dense, tokens, tmp_path, format, scan):
    model, params = peft_jax.load(dense[0], scan_layers=scan)
    params = peft_jax.quantize(params, format, exclude="down_proj")
    peft_jax.save(tmp_path / "q", model, params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert sum(type(m).__name__ == "Linear4bit" for m in theirs.modules()) == 12
    ours = peft_jax.bind(model)(params, tokens)
    assert relative_error(ours, logits_with(dense[0], dequantized(theirs), tokens)) < 1e-5
    assert (
        relative_error(ours, torch_logits(theirs, tokens)) < 0.03
    )  # bitsandbytes' own product is in bfloat16
    again = peft_jax.load(tmp_path / "q", scan_layers=scan)
    np.testing.assert_array_equal(peft_jax.bind(again[0])(again[1], tokens), ours)


# ------------------------------------------------------------------------------------- packers of
# published layouts


def logits_with(folder, weights, tokens):
    """PyTorch's logits with some linear weights [out, in] replaced: dequantize, then run."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, w in weights.items():
            model.get_submodule(name).weight.copy_(torch.as_tensor(np.asarray(w)))
    return torch_logits(model, tokens)


def write_folder(dense, folder, replace, config):
    """The dense folder with each linear module's weight replaced by `replace(weight [out, in])` ->
    (tensors, dequantized).
    """
    tensors, weights = load_file(dense[0] / "model.safetensors"), {}
    for name in linear_names(dense[1]):
        packed, weights[name] = replace(tensors.pop(f"{name}.weight").numpy())
        tensors |= {
            f"{name}.{suffix}": torch.as_tensor(np.ascontiguousarray(value))
            for suffix, value in packed.items()
        }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    hf = json.loads((dense[0] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "quantization_config": config}))
    return weights


def grouped(w, bits, group, symmetric, g_idx=None):
    """(codes, scales, zeros, dequantized) of w [out, in] by groups of inputs; codes [out, in],
    others [out, groups].
    """
    n_out, n_in = w.shape
    levels = 2**bits - 1
    g_idx = np.arange(n_in) // group if g_idx is None else g_idx
    groups = g_idx.max() + 1
    scales, zeros = np.zeros((n_out, groups), np.float16), np.zeros((n_out, groups), np.int64)
    codes, back = np.zeros((n_out, n_in), np.int64), np.zeros_like(w)
    for g in range(groups):
        part = w[:, g_idx == g]
        low, high = part.min(1).clip(max=0), part.max(1).clip(min=0)
        scale = (2 * np.maximum(-low, high) if symmetric else high - low) / levels
        scales[:, g] = scale
        scale = scales[:, g].astype(np.float32)
        zeros[:, g] = (levels + 1) // 2 if symmetric else np.round(-low / scale)
        codes[:, g_idx == g] = np.clip(
            np.round(part / scale[:, None]) + zeros[:, g, None], 0, levels
        )
        back[:, g_idx == g] = (codes[:, g_idx == g] - zeros[:, g, None]) * scale[:, None]
    return codes, scales, zeros, back


def words(codes, bits, axis):
    """Codes as int32 words along `axis`: a dense little-endian bit stream, as GPTQ and
    compressed-tensors pack them.
    """
    stream = np.moveaxis(codes, axis, -1)
    bits_of = (stream[..., None] >> np.arange(bits)) & 1
    flat = bits_of.reshape(*stream.shape[:-1], -1)
    flat = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % 32)])
    packed = (
        flat.reshape(*flat.shape[:-1], -1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    ).sum(-1, dtype=np.uint32)
    return np.moveaxis(packed.view(np.int32), -1, axis)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "act_order"),
    [(4, True, False), (4, False, True), (8, True, True), (3, False, False), (2, False, False)],
)
def test_gptq_folders(dense, tokens, tmp_path, bits, symmetric, act_order, version):
    def pack(w):
        g_idx = np.arange(w.shape[1]) // 32
        g_idx = np.random.default_rng(1).permutation(g_idx) if act_order else g_idx
        codes, scales, zeros, back = grouped(w, bits, 32, symmetric, g_idx)
        stored = (zeros - 1) % 2**bits if version == "gptq" else zeros
        return {
            "qweight": words(codes.T, bits, 0),
            "qzeros": words(stored.T, bits, 1),
            "scales": scales.T,
            "g_idx": g_idx.astype(np.int32),
        }, back

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "desc_act": act_order,
    }
    weights = write_folder(dense, tmp_path / "q", pack, {**config, "checkpoint_format": version})
    model, params = peft_jax.load(tmp_path / "q")
    node = params["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert node.format == Int(bits=bits, block_size=32, symmetric=symmetric)
    assert (node.order is not None) == act_order
    assert (
        relative_error(peft_jax.bind(model)(params, tokens), logits_with(dense[0], weights, tokens))
        < 1e-5
    )


@pytest.mark.parametrize(("said", "held"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_symmetric_gptq_folders_that_say_the_other_version(
    dense, tokens, tmp_path, caplog, said, held
):
    def pack(w):
        codes, scales, zeros, back = grouped(w, 4, 32, True)
        stored = zeros - 1 if held == "gptq" else zeros
        return {
            "qweight": words(codes.T, 4, 0),
            "qzeros": words(stored.T, 4, 1),
            "scales": scales.T,
        }, back

    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "checkpoint_format": said,
    }
    weights = write_folder(dense, tmp_path / "q", pack, config)
    model, params = peft_jax.load(tmp_path / "q")
    assert f"checkpoint_format says {said}, and" in caplog.text
    assert f"it is read as {held}" in caplog.text
    assert (
        relative_error(peft_jax.bind(model)(params, tokens), logits_with(dense[0], weights, tokens))
        < 1e-5
    )


def test_awq_folders(dense, tokens, tmp_path):
    def words_of(codes):  # AutoAWQ's gemm layout: nibble i of a word holds column ORDER[i]
        rows, columns = codes.shape
        out = np.zeros((rows, columns // 8), np.uint32)
        for i, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= codes[:, source::8].astype(np.uint32) << np.uint32(4 * i)
        return out.view(np.int32)

    def pack(w):
        codes, scales, zeros, back = grouped(w, 4, 64, False)
        return {"qweight": words_of(codes.T), "qzeros": words_of(zeros.T), "scales": scales.T}, back

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "version": "gemm",
        "zero_point": True,
    }
    weights = write_folder(dense, tmp_path / "q", pack, config)
    model, params = peft_jax.load(tmp_path / "q")
    assert params["model"]["layers"]["mlp"]["up_proj"]["kernel"].format == Int(
        bits=4, block_size=64, symmetric=False
    )
    assert (
        relative_error(peft_jax.bind(model)(params, tokens), logits_with(dense[0], weights, tokens))
        < 1e-5
    )


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"),
    [(4, True, 32), (4, False, 32), (8, True, None), (3, True, 64), (2, False, 16)],
)
def test_compressed_tensors_folders(dense, tokens, tmp_path, bits, symmetric, group):
    def pack(w):
        codes, scales, zeros, back = grouped(w, bits, group or w.shape[1], symmetric)
        tensors = {
            "weight_packed": words(codes, bits, 1),
            "weight_scale": scales,
            "weight_shape": np.asarray(w.shape, np.int64),
        }
        return tensors | ({} if symmetric else {"weight_zero_point": words(zeros, bits, 0)}), back

    scheme = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": group,
        "strategy": "group" if group else "channel",
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}
        },
    }
    weights = write_folder(dense, tmp_path / "q", pack, config)
    model, params = peft_jax.load(tmp_path / "q")
    assert params["model"]["layers"]["mlp"]["up_proj"]["kernel"].format == Int(
        bits=bits, block_size=group, symmetric=symmetric
    )
    assert (
        relative_error(peft_jax.bind(model)(params, tokens), logits_with(dense[0], weights, tokens))
        < 1e-5
    )


def int8_folder(dense, folder, **changes):
    """Int8 weights that are not packed, with zero points; `changes` are of the scheme."""

    def pack(w):
        codes, scales, zeros, back = grouped(w, 8, w.shape[1], False)

        def signed(a):
            return (np.asarray(a).astype(np.int16) - 128).astype(np.int8)

        return {
            "weight": signed(codes),
            "weight_scale": scales,
            "weight_zero_point": signed(zeros),
        }, back

    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": "channel",
    } | changes.pop("weights", {})
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "format": "int-quantized",
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | changes},
        "quantization_status": "compressed",
    }
    return write_folder(dense, folder, pack, config)


@pytest.mark.filterwarnings("ignore")
def test_zero_points_of_unpacked_weights(dense, tokens, tmp_path):
    weights = int8_folder(dense, tmp_path / "q")
    model, params = peft_jax.load(tmp_path / "q")
    ours = peft_jax.bind(model)(params, tokens)
    assert relative_error(ours, logits_with(dense[0], weights, tokens)) < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert relative_error(ours, torch_logits(theirs, tokens)) < 1e-5


_ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_activations": _ACTIVATIONS | {"symmetric": False}},
            "input_activations.symmetric=False",
        ),
        (
            {"input_activations": _ACTIVATIONS | {"strategy": "tensor"}},
            "input_activations.strategy='tensor'",
        ),
        (
            {"input_activations": _ACTIVATIONS | {"dynamic": "local"}},
            "input_activations.dynamic='local'",
        ),
        ({"input_activations": _ACTIVATIONS | {"type": "float"}}, "input_activations.type='float'"),
        ({"input_activations": _ACTIVATIONS | {"num_bits": 4}}, "input_activations.num_bits=4"),
        ({"output_activations": _ACTIVATIONS}, "output_activations"),
        (
            {"weights": {"strategy": "block", "block_structure": [128, 128]}},
            "weights.strategy='block'",
        ),
        ({"weights": {"dynamic": True}}, "weights.dynamic=True"),
        ({"weights": {"actorder": "group"}}, "weight_g_idx is not there"),
    ],
)
def test_what_a_scheme_says_and_is_not_computed_is_refused(dense, tmp_path, changes, message):
    int8_folder(dense, tmp_path / "q", **changes)
    with pytest.raises(ValueError, match=message):
        peft_jax.load(tmp_path / "q")


WRITTEN = {
    "int4": Int(bits=4, block_size=32),
    "int4 zero points": Int(bits=4, block_size=16, symmetric=False),
    "int8": Int(bits=8),
    "int8 with activations": Int(bits=8, activations="dynamic"),
    "fp8": FP8(),
    "fp8 per tensor": FP8(per="tensor"),
    "mxfp4": MXFP4(),
    "mixed": {"self_attn.*_proj": Int(bits=8), "mlp.*_proj": Int(bits=4, block_size=32)},
}


@pytest.mark.parametrize("format", WRITTEN.values(), ids=WRITTEN.keys())
def test_compressed_tensors_folders_written_here_load_there(dense, tokens, tmp_path, format):
    model, params = peft_jax.load(dense[0])
    formats = (
        {"*/self_attn/*": Int(bits=8), "*/mlp/*": Int(bits=4, block_size=32)}
        if isinstance(format, dict)
        else format
    )
    params = peft_jax.quantize(params, formats)
    peft_jax.save(tmp_path / "q", model, params)
    ours = peft_jax.bind(model)(params, tokens)
    again = peft_jax.load(tmp_path / "q")
    np.testing.assert_array_equal(peft_jax.bind(again[0])(again[1], tokens), ours)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    # Quantized activations on the edge between two codes fall either way, and later layers see the
    # difference.
    found = torch_logits(theirs, tokens)
    assert relative_error(ours, found) < (0.03 if getattr(format, "activations", None) else 1e-4)


# --------------------------------------------------------------------------------- families, as
# transformers has them

_BERT = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_DECODER = dict(_BERT, num_key_value_heads=2, head_dim=16)
_MOE = dict(_DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_GPT2 = dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
_T5 = dict(
    vocab_size=96,
    d_model=64,
    d_ff=128,
    num_layers=2,
    num_heads=4,
    d_kv=16,
    decoder_start_token_id=0,
)
_TINY = {
    "gpt2": _GPT2,
    "t5": _T5,
    "distilbert": dict(vocab_size=96, dim=64, hidden_dim=128, n_layers=2, n_heads=4),
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "deberta-v2": dict(
        _BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm"
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "modernbert"), _BERT),
}


def tiny_config(family, tied=True):
    return CONFIG_MAPPING[family](**_TINY.get(family, _DECODER), tie_word_embeddings=tied)


@pytest.mark.parametrize("family", OURS)
def test_the_linear_modules_are_those_of_the_class_in_transformers(family):
    seen = 0
    for task in OURS[family].tasks:
        for tied in (
            (True, False)
            if OURS[family].prefix in ("model", "transformer") and family != "modernbert"
            else (True,)
        ):
            config = tiny_config(family, tied)
            model = OURS[family].module(OURS[family].config(config), task=task)
            kind = getattr(transformers, hf_config_of(model)["architectures"][0], None)
            if kind is None:  # transformers has no such class: Gemma 3 and OLMo 2 for tokens
                continue
            with torch.device("meta"):
                theirs = {
                    n
                    for n, m in kind(config).named_modules()
                    if isinstance(m, (torch.nn.Linear, Conv1D))
                }
            assert set(linear_modules(model, abstract_params(model))) == theirs, (task, tied)
            seen += 1
    assert seen


# family, end of the class's name, whether the head is the embedding
CLASSES = {
    "qwen3 tied": ("qwen3", "ForCausalLM", True),
    "qwen3": ("qwen3", "ForCausalLM", False),
    "gemma3 tied": ("gemma3_text", "ForCausalLM", True),
    "gemma3": ("gemma3_text", "ForCausalLM", False),
    "gpt2 tied": ("gpt2", "ForCausalLM", True),
    "gpt2": ("gpt2", "ForCausalLM", False),
    "t5 tied": ("t5", "ForSeq2SeqLM", True),
    "t5": ("t5", "ForSeq2SeqLM", False),
    "bert tied": ("bert", "ForMaskedLM", True),
    "bert classifier": ("bert", "ForSequenceClassification", True),
    "bert trunk": ("bert", "", True),
}
STORED = {
    "int4": Int(bits=4, block_size=32),
    "int4 zero points": Int(bits=4, block_size=32, symmetric=False),
    "int3": Int(bits=3, block_size=32),
    "int2": Int(bits=2, block_size=16),
    "int8": Int(bits=8),
    "int8 activations": Int(bits=8, activations="dynamic"),
    "fp8": FP8(),
    "fp8 per tensor": FP8(per="tensor"),
    "fp8 activations": FP8(activations="dynamic"),
    "mxfp4": MXFP4(),
    "nf4": NF4(),
    "fp4": FP4(),
}
QUICK = [
    ("qwen3 tied", "int4 zero points"),
    ("qwen3 tied", "int8 activations"),
    ("qwen3 tied", "fp8"),
    ("qwen3 tied", "nf4"),
    ("gemma3 tied", "mxfp4"),
    ("gpt2 tied", "nf4"),
    ("t5 tied", "int4"),
    ("t5 tied", "nf4"),
    ("bert tied", "fp8"),
    ("bert tied", "nf4"),
    ("bert trunk", "fp4"),
]
MATRIX = [
    pytest.param(c, f, id=f"{c}-{f}", marks=() if (c, f) in QUICK else pytest.mark.slow)
    for c in CLASSES
    for f in STORED
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function from a name of CLASSES to (model, params, function of params, function of a
    PyTorch model).
    """
    made, tokens = {}, random_tokens(2, 12)

    def build(name):
        family, end, tied = CLASSES[name]
        kind = getattr(transformers, f"AutoModel{end}")
        torch.manual_seed(0)
        dense = kind.from_config(tiny_config(family, tied))
        if family == "t5" and not tied:
            dense.lm_head.weight = torch.nn.Parameter(torch.randn(96, 64))
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp("tiny") / "dense"
        dense.save_pretrained(folder)
        model, params = peft_jax.load(folder)
        twice = end == "ForSeq2SeqLM"

        def theirs(model):
            inputs = {"decoder_input_ids": torch.tensor(tokens)} if twice else {}
            with torch.no_grad():
                out = model.eval()(torch.tensor(tokens), **inputs)
            return (out.logits if "logits" in out else out.last_hidden_state).numpy()

        ours = jax.jit(peft_jax.bind(model))
        return (
            kind,
            model,
            params,
            lambda p: np.asarray(ours(p, *[tokens] * (2 if twice else 1))),
            theirs,
        )

    def get(name):
        if name not in made:
            made[name] = build(name)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "stored"), MATRIX)
def test_transformers_reads_what_is_written(tiny, tmp_path, name, stored):
    kind, model, params, ours, theirs = tiny(name)
    format = STORED[stored]
    bitsandbytes = isinstance(format, (NF4, FP4))
    # T5's `wo` stays in float32 there.
    exclude = "wo" if name.startswith("t5") and bitsandbytes else ()
    params = peft_jax.quantize(params, format, exclude=exclude)
    if name.startswith("gpt2") and not bitsandbytes:
        with pytest.raises(
            ValueError,
            match="c_attn is a Conv1D in transformers, which reads no compressed-tensors there",
        ):
            peft_jax.save(tmp_path / "q", model, params)
        return
    peft_jax.save(tmp_path / "q", model, params)
    read, said = kind.from_pretrained(tmp_path / "q", dtype=torch.float32, output_loading_info=True)
    assert not said["unexpected_keys"]
    assert {key.partition(".")[0] for key in said["missing_keys"]} <= (
        {"pooler"} if name == "bert trunk" else set()
    )
    if bitsandbytes:  # its own product is in bfloat16, and lays the weights out anew
        assert (
            relative_error(
                ours(params), theirs(copy.deepcopy(read).dequantize(dtype=torch.float32))
            )
            < 1e-5
        )
    # Activations on the edge between two codes fall either way.
    activations = getattr(format, "activations", None)
    assert relative_error(ours(params), theirs(read)) < (
        0.1 if activations else 0.05 if bitsandbytes else 1e-4
    )


def test_a_head_quantized_on_purpose(tiny, tmp_path):
    kind, model, params, ours, theirs = tiny("qwen3")
    params = peft_jax.quantize(params, FP8(), targets=("q_proj", "lm_head"))
    peft_jax.save(tmp_path / "q", model, params)
    read = kind.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert relative_error(ours(params), theirs(read)) < 1e-4


def test_what_transformers_would_pass_over_is_refused():
    weight = quantize_weight("w", jnp.ones((64, 64)), NF4())
    config = TOOLS["bitsandbytes"].config
    with pytest.raises(
        ValueError,
        match=r"layer.1.wo: transformers keeps it in float32; quantize with exclude='wo'",
    ):
        config({"layer.1.wo": weight}, [], ("wo",))
    with pytest.raises(
        ValueError,
        match="pre_classifier: transformers passes over it with classifier, which is not quantized",
    ):
        config({"pre_classifier": weight}, ["classifier"], ())
    skipped = config({"layers.11.q": weight}, ["layers.1", "k"], ())["llm_int8_skip_modules"]
    assert skipped == ["layers.1", "k"]


def test_a_sharded_load_and_a_quantizing_load(dense, tokens, tmp_path):
    model, params = peft_jax.load(dense[0])
    quantized = peft_jax.quantize(params, NF4())
    peft_jax.save(tmp_path / "q", model, quantized)
    expected = peft_jax.bind(model)(quantized, tokens)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, placed = peft_jax.load(tmp_path / "q", mesh=mesh)
    codes = placed["model"]["layers"]["mlp"]["up_proj"]["kernel"].codes
    assert codes.addressable_shards[0].data.size < codes.size
    with jax.set_mesh(mesh):
        assert (
            relative_error(
                np.asarray(jax.jit(peft_jax.bind(model))(placed, jnp.asarray(tokens))), expected
            )
            < 1e-5
        )
    paths = set(select(params))

    def each(path, w):
        return quantize_weight(path, w, NF4()) if path in paths else w

    _, direct = peft_jax.load(dense[0], each=each)
    np.testing.assert_array_equal(peft_jax.bind(model)(direct, tokens), expected)


# --------------------------------------------------------------------------------------------------
# refusals


@pytest.fixture(scope="module")
def nf4_folder(dense, tmp_path_factory):
    model, params = peft_jax.load(dense[0])
    folder = tmp_path_factory.mktemp("nf4") / "q"
    peft_jax.save(folder, model, peft_jax.quantize(params, NF4()))
    return folder


Q0 = "model.layers.0.self_attn.q_proj"


def broken(folder, out, change, config=None):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"].update(config or {})
    (out / "config.json").write_text(json.dumps(raw))
    return out


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda t: t.update({f"{Q0}.weight": t[f"{Q0}.weight"][:-8]}),
            {},
            f"{Q0}: weight has shape",
        ),
        (
            lambda t: t.update({f"{Q0}.weight.absmax": t[f"{Q0}.weight.absmax"][:-1]}),
            {},
            f"{Q0}: weight.absmax has shape",
        ),
        (
            lambda t: t.update({f"{Q0}.weight.quant_map": t[f"{Q0}.weight.quant_map"] * 2}),
            {},
            "is not the nf4 table",
        ),
        (lambda t: t.pop(f"{Q0}.weight.absmax"), {}, f"lacks {Q0}.weight.absmax"),
        (
            lambda t: None,
            {"quant_method": "hqq"},
            "quant_method 'hqq' is not supported; supported: awq, bitsandbytes, compressed-tensors",
        ),
        (
            lambda t: t.update(
                {f"{Q0}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}
            ),
            {},
            "is not the JSON that bitsandbytes writes",
        ),
        (
            lambda t: (
                [t.pop(k) for k in list(t) if k.startswith(f"{Q0}.")]
                and t.update({f"{Q0}.weight": torch.zeros(64, 64)})
            ),
            {},
            "some layers of model.layers.0.self_attn.q_proj are quantized and others not",
        ),
    ],
)
def test_broken_folders_are_refused_by_name(nf4_folder, tmp_path, change, config, message):
    with pytest.raises(ValueError, match=message):
        peft_jax.load(broken(nf4_folder, tmp_path / "b", change, config))


def test_blocks_that_straddle_outputs_and_odd_bits_are_refused(dense, tmp_path):
    def bnb(w):
        return (
            {
                "weight": np.zeros((w.size // 2, 1), np.uint8),
                "weight.quant_state.bitsandbytes__nf4": np.frombuffer(
                    json.dumps({"blocksize": 256, "shape": list(w.shape)}).encode(), np.uint8
                ),
            },
            w,
        )

    write_folder(dense, tmp_path / "a", bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(
        ValueError, match="blocks of 256 do not divide its 128 inputs and would straddle outputs"
    ):
        peft_jax.load(tmp_path / "a")

    def gptq(w):
        return ({"qweight": np.zeros((4, 4), np.int32)}, w)

    write_folder(dense, tmp_path / "b", gptq, {"quant_method": "gptq", "bits": 5, "group_size": 32})
    with pytest.raises(ValueError, match="5 bits are not supported; supported: 2, 3, 4, 8"):
        peft_jax.load(tmp_path / "b")
    write_folder(dense, tmp_path / "c", gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ValueError, match=r"down_proj: qweight has shape \(4, 4\)"):
        peft_jax.load(tmp_path / "c")


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(dense, tmp_path):
    model, params = peft_jax.load(dense[0])
    cases = [
        (
            peft_jax.quantize(params, Int(bits=4, block_size=32), targets="embed_tokens"),
            "no quantized embeddings",
        ),
        (peft_jax.quantize(params, FP8(type="e5m2")), "has no e5m2"),
        (
            peft_jax.quantize(params, Int(bits=4, symmetric=False), rounding="hqq"),
            "fractional zero points",
        ),
        (
            peft_jax.quantize(params, {"*/q_proj/*": NF4(), "*/k_proj/*": Int(bits=8)}),
            "fits no checkpoint format",
        ),
    ]
    for tree, message in cases:
        with pytest.raises(ValueError, match=message):
            peft_jax.save(tmp_path / "q", model, tree)
        assert not (tmp_path / "q").exists()
