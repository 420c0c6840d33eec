"""Two real processes on loopback, four devices each: the same losses as one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def start(folder, tiny_folder, processes, index, port):
    options = [
        f"output={folder}", f"model.path={tiny_folder}", "method.rank=2", "data.train.path=builtin:countries",
        "data.train.limit=64", "data.kind=completion", "data.validation.path=builtin:countries", "data.validation.limit=16",
        "data.sequence_length=32", "train.steps=4", "train.batch_size=8", "train.log_every=1", "train.checkpoint_every=2",
        "mesh={data: 2, fsdp: 4}", "train.tensorboard=false",
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes} --xla_backend_optimization_level=0",
    }  # fmt: skip
    if processes > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index),
        }  # fmt: skip
    command = [sys.executable, "-m", "peft_jax", "train", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows]


def test_two_hosts_equal_one(tiny_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = [start(tmp_path / "two", tiny_folder, 2, i, port) for i in range(2)]
    outputs = [p.communicate(timeout=400)[0] for p in two]
    assert [p.returncode for p in two] == [0, 0], outputs
    one = start(tmp_path / "one", tiny_folder, 1, 0, port)
    output, _ = one.communicate(timeout=400)
    assert one.returncode == 0, output
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "two" / "checkpoints" / "4").is_dir()
