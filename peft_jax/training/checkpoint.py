"""Training checkpoints with Orbax: what training changes and where the data stands; the base is
named, not copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from peft_jax.core.tree import path_str
from peft_jax.training.resume import refusal
from peft_jax.training.step import TrainState

_SAMPLE = 2**20


def fingerprint(folder: Path) -> str:
    """A hash of a model folder's config and weights: whole files up to 1 GB, else size, first and
    last megabyte.
    """
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
    """The state as a flat dict of arrays, which any Orbax reader understands; keys are tree paths.

    Arrays that hold nothing, as GaLore's projections of vectors, are left out: Orbax stores none.
    """
    state = state._replace(rng=jax.random.key_data(state.rng))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {_key(path): leaf for path, leaf in leaves if leaf.size}


def weights_of(state: TrainState) -> TrainState:
    """The state without the optimizer's, which only a run that goes on reads."""
    return state._replace(opt_state=None)


def _key(path: Any) -> str:
    return path_str(path).replace("/", ".")


def _unflat(flat: dict[str, Any], like: TrainState) -> TrainState:
    like = like._replace(rng=jax.random.key_data(like.rng))
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: flat.get(_key(path), leaf), like)
    return state._replace(rng=jax.random.wrap_key_data(state.rng))


def _shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    """name -> shape of a checkpoint's arrays."""
    return {name: tuple(x.shape) for name, x in getattr(metadata, "tree", metadata).items()}


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class Checkpoints:
    """The checkpoints of a run: the newest few under `folder`. Saving is asynchronous."""

    def __init__(
        self, folder: Path, *, keep: int, identity: dict[str, Any], resume_with: Sequence[str] = ()
    ) -> None:
        self.folder, self._identity, self._resume_with = folder, identity, resume_with
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Start saving; raises OSError where an earlier save failed."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        flat = _flat(state)
        if (
            jax.default_backend() == "cpu"
        ):  # here host memory is device memory, which the next step may overwrite
            flat = _copy(flat)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(flat),
            position=ocp.args.JsonSave({"identity": self._identity, **position}),
        )
        self._manager.save(step, args=items, force=True)

    def position(self) -> dict[str, Any]:
        """What the newest checkpoint says beside its arrays."""
        return self._manager.restore(
            self.newest(), args=ocp.args.Composite(position=ocp.args.JsonRestore())
        )["position"]

    def check(self) -> None:
        """Raise ValueError where the newest checkpoint, if there is one, was made by another run
        than this one.
        """
        if self.newest() is None:
            return
        if why := refusal(
            self.position()["identity"],
            self._identity,
            self._resume_with,
            f"the checkpoint in {self.folder}",
        ):
            raise ValueError(why)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, position) of the newest checkpoint, with the shardings of `like`; see `check` for
        what is to be alike.

        The optimizer's part is not read where `like` has none (`weights_of`).
        Raises ValueError where it holds other arrays, as those of another optimizer.
        """
        step, position = self.newest(), self.position()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        stored = _shapes(self._manager.item_metadata(cast("int", step))["state"])
        if like.opt_state is None:
            stored = {n: shape for n, shape in stored.items() if not n.startswith("opt_state.")}
        wanted = {name: tuple(x.shape) for name, x in abstract.items()}
        if wrong := sorted(
            n for n in stored.keys() | wanted.keys() if stored.get(n) != wanted.get(n)
        ):
            raise ValueError(
                f"the checkpoint in {self.folder} holds another state, as {wrong[0]}: of another "
                "optimizer, method or model, "
                "which no resume_with can make up for; use another output or resume=false"
            )
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        part = ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)
        flat = self._manager.restore(step, args=ocp.args.Composite(state=part))["state"]
        return _unflat(flat, like), position

    def wait(self) -> None:
        """Until all saving is done."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish saving and free the files."""
        self._manager.close()
