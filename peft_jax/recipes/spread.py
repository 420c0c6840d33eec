"""A comparison over several devices: each recipe's runs in a process of its own, that sees one
device; a recipe that builds on others begins when those are done.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

from peft_jax.core.options import ConfigError
from peft_jax.recipes.contestants import builds_on
from peft_jax.recipes.export import write_config
from peft_jax.recipes.run_config import RunConfig

# Which devices a process sees, by what reads it.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")
ONE_CHIP = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}


def run_on_devices(config: RunConfig, say: Callable[[str], None]) -> None:
    """Do the runs of all asked recipes, `compare.devices` at a time. Raises ConfigError naming the
    recipes whose process failed, when the others are done.
    """
    c = config.compare
    write_config(config, Path(config.output))
    open_ones = [name for name in c.recipes if not c.only or name in c.only]
    needs = {name: builds_on(config, name) & set(open_ones) for name in open_ones}
    free: SimpleQueue[int] = SimpleQueue()
    for number in range(c.devices):
        free.put(number)
    running: dict[Future[int], str] = {}
    done: set[str] = set()
    failed: list[str] = []
    with ThreadPoolExecutor(c.devices) as pool:
        while open_ones or running:
            for name in [n for n in open_ones if needs[n] <= done]:
                open_ones.remove(name)
                running[pool.submit(_worker, config, name, free)] = name
            if not running:
                break  # what is open builds on what failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                say(f"{name}: {'done' if future.result() == 0 else 'failed'}")
                (done.add if future.result() == 0 else failed.append)(name)
    if failed:
        logs = ", ".join(str(_log(config, name)) for name in failed)
        raise ConfigError(f"the recipes {', '.join(failed)} failed; {logs} say why")


def _worker(config: RunConfig, name: str, free: SimpleQueue[int]) -> int:
    """The exit status of a process that does a recipe's runs on the next free device."""
    number, out = free.get(), Path(config.output)
    options = [f"compare.only=[{name}]", "compare.devices=1", "resume=true"]
    command = [sys.executable, "-m", "peft_jax", "compare", str(out / "config.yaml"), *options]
    try:
        with _log(config, name).open("w", encoding="utf-8") as log:
            environment = environment_of(number, os.environ)
            return subprocess.run(
                command, env=environment, stdout=log, stderr=log, check=False
            ).returncode
    finally:
        free.put(number)


def _log(config: RunConfig, name: str) -> Path:
    return Path(config.output) / f"{name}.log"


def environment_of(number: int, environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which one device is seen: the one of this number of those seen now."""
    made = {**ONE_CHIP, **environment}
    for name in VISIBLE:
        seen = [x for x in environment.get(name, "").split(",") if x]
        made[name] = seen[number % len(seen)] if seen else str(number)
    return made
