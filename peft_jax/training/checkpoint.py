"""Training checkpoints with Orbax: what training changes and where the data stands; the base is named, not copied."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from peft_jax.core.tree import path_str
from peft_jax.training.step import TrainState

_SAMPLE = 2**20


def fingerprint(folder: Path) -> str:
    """A hash of a model folder's config and weights: whole files up to 1 GB, else size, first and last megabyte."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            if size <= 2**30:
                while part := handle.read(_SAMPLE):
                    digest.update(part)
            else:
                digest.update(handle.read(_SAMPLE))
                handle.seek(-_SAMPLE, 2)
                digest.update(handle.read())
    return digest.hexdigest()[:32]


def _flat(state: TrainState) -> dict[str, Any]:
    """The state as a flat dict of arrays, which any Orbax reader understands; keys are tree paths."""
    state = state._replace(rng=jax.random.key_data(state.rng))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {path_str(path).replace("/", "."): leaf for path, leaf in leaves}


def _unflat(flat: dict[str, Any], like: TrainState) -> TrainState:
    leaves = [flat[key] for key in _flat(like)]
    state = jax.tree.unflatten(jax.tree.structure(like._replace(rng=jax.random.key_data(like.rng))), leaves)
    return state._replace(rng=jax.random.wrap_key_data(state.rng))


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class Checkpoints:
    """The checkpoints of a run: the newest few under `folder`. Saving is asynchronous."""

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Start saving; raises OSError where an earlier save failed."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        flat = _flat(state)
        if jax.default_backend() == "cpu":  # here host memory is device memory, which the next step may overwrite
            flat = _copy(flat)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(flat),
            position=ocp.args.JsonSave({"identity": self._identity, **position}),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, position) of the newest checkpoint, with the shardings of `like`.

        Raises ValueError where the checkpoint was made from another base, data or set of trained arrays.
        """
        step = self.newest()
        position = self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
        for key, value in self._identity.items():
            if position["identity"].get(key) != value:
                raise ValueError(
                    f"the checkpoint in {self.folder} was made with another {key} "
                    f"({position['identity'].get(key)!r}, now {value!r}); use another output or resume=false"
                )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        flat = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
        return _unflat(flat, like), position

    def wait(self) -> None:
        """Until all saving is done."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish saving and free the files."""
        self._manager.close()
