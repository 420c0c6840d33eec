"""Two real processes on loopback: the same losses and files as one process.

Run as a program, this file is one of the processes that write adapters and models of a sharded
tree.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import load_file

import peft_jax
from peft_jax.adapters import p_tuning
from peft_jax.core.mesh import make_mesh
from peft_jax.core.sharding import shard
from peft_jax.core.stage import State
from peft_jax.low_rank import vera
from peft_jax.quantization import NF4
from peft_jax.recipes.export import export
from peft_jax.recipes.run_config import RunConfig
from peft_jax.recipes.setup import Setup, start_distributed
from tests.reference import perturb

ROOT = Path(__file__).parents[2]
ADAPTERS = {  # by method: PEFT's formats by module, with shared arrays and for the whole model
    "lora": functools.partial(peft_jax.lora, rank=2, bias="all"),
    "vera": functools.partial(vera, rank=4),
    "p_tuning": functools.partial(p_tuning, num_virtual_tokens=3, hidden_size=4),
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_processes(arguments, processes, devices):
    """The processes of one program together, on `devices` of their own each, once they have ended
    well.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
    }
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    each = [
        subprocess.Popen(
            [sys.executable, *arguments], env={**environment, "JAX_PROCESS_ID": str(i)}, **pipes
        )
        for i in range(processes)
    ]
    outputs = [p.communicate(timeout=400)[0] for p in each]
    assert [p.returncode for p in each] == [0] * processes, outputs


def train(folder, tiny_folder, processes):
    options = [
        f"output={folder}",
        f"model.path={tiny_folder}",
        "method.rank=2",
        "data.train.path=builtin:countries",
        "data.train.limit=64",
        "data.kind=completion",
        "data.validation.path=builtin:countries",
        "data.validation.limit=16",
        "data.sequence_length=32",
        "train.steps=4",
        "train.batch_size=8",
        "train.log_every=1",
        "train.checkpoint_every=2",
        "mesh={data: 2, fsdp: 4}",
        "train.tensorboard=false",
    ]
    run_processes(["-m", "peft_jax", "train", *options], processes, 8 // processes)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows]


def test_two_hosts_equal_one(tiny_folder, tmp_path):
    train(tmp_path / "two", tiny_folder, 2)
    train(tmp_path / "one", tiny_folder, 1)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "two" / "checkpoints" / "4").is_dir()


def write_all(folder, tiny_folder, mesh=None):
    """Adapters, a quantized model and a merged one; the bytes gathered from several hosts for each,
    and of the trees.
    """
    model, base = peft_jax.load(tiny_folder)
    placed = (lambda tree: shard(tree, mesh)) if mesh is not None else lambda tree: tree
    trees = {name: placed(perturb(add(base, jax.random.key(0)))) for name, add in ADAPTERS.items()}
    config = RunConfig(output=str(folder))
    setup = Setup(State(model, None), None, mesh, tiny_folder)
    writers = {
        name: functools.partial(peft_jax.save_adapter, folder / name, tree)
        for name, tree in trees.items()
    }
    writers["native"] = lambda: peft_jax.save_adapter(
        folder / "native", trees["lora"], format="native"
    )
    writers["adapter"] = lambda: export(config, setup, trees["lora"], folder)
    writers["model"] = lambda: export(config, setup, trees["lora"], folder, merged=True)
    nf4 = placed(peft_jax.quantize(base, NF4(block_size=16, double=False), targets="q_proj"))
    writers["nf4"] = lambda: peft_jax.save(folder / "nf4", model, nf4)
    gathered: list[int] = []
    gather = multihost_utils.process_allgather

    def counted(x, **options):
        gathered.append(x.nbytes)
        return gather(x, **options)

    multihost_utils.process_allgather = counted
    found = {}
    for name, write in writers.items():
        gathered.clear()
        write()
        found[name] = sum(gathered)
    multihost_utils.process_allgather = gather
    sizes = {
        name: sum(x.nbytes for x in jax.tree.leaves(tree))
        for name, tree in {**trees, "nf4": nf4, "base": base}.items()
    }
    return {"gathered": found, "sizes": sizes}


def test_what_is_written_is_gathered_and_no_base_of_an_adapter(tiny_folder, tmp_path):
    run_processes([__file__, str(tmp_path / "two"), str(tiny_folder)], 2, 2)
    numbers = json.loads((tmp_path / "two" / "numbers.json").read_text())
    gathered, sizes = numbers["gathered"], numbers["sizes"]
    write_all(tmp_path / "one", tiny_folder)
    for name in gathered:
        one, two = (tmp_path / n / name for n in ("one", "two"))
        assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
        for file in one.glob("*.safetensors"):
            a, b = load_file(file), load_file(two / file.name)
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_allclose(
                    a[key].astype(np.float32), b[key].astype(np.float32), rtol=1e-6, err_msg=key
                )
    for name in (*ADAPTERS, "native", "adapter"):
        assert gathered[name] <= sizes[name if name in ADAPTERS else "lora"] - sizes["base"], name
    assert gathered["native"] > 0  # some of it is spread over the two
    assert gathered["adapter"] > 0
    assert sizes["base"] / 2 < gathered["model"] <= sizes["base"]


if __name__ == "__main__":
    start_distributed()
    out = Path(sys.argv[1])
    numbers = write_all(out, Path(sys.argv[2]), make_mesh({"data": 1, "fsdp": 4}))
    if jax.process_index() == 0:
        (out / "numbers.json").write_text(json.dumps(numbers))
