"""How tokens meet their experts, on one device and on a mesh.

On one device (`mixture`) pairs of a token and an expert are sorted by expert and multiplied in
groups. On a mesh each device routes the n tokens that it holds, and its experts' weights are
gathered over `fsdp` as they are stored (codes, where they are quantized). Where tokens are so few
that moving them is less (`few`), as when one token is generated after the other, the weights stay
and the compiler splits the products over `fsdp`. Over the axis `expert`, of e devices with E/e
experts each, there are three ways (`ROUTES`); `cheapest` takes the one that moves the fewest bytes
in a pass:

    tokens    each device gathers the others' tokens, and its experts' sums are scattered back:
              2 (e - 1) n D
    pairs     each pair goes to its expert's device and back, all-to-all:  2 (e - 1) / e n k D
    experts   each device gathers all experts:  (e - 1) / e of their bytes

Rows that the axis does not divide are on all of its devices, and sums of what their experts say are
all that moves (`by_replicas`).

Letters: N tokens, D model, F feed-forward, E experts, k experts a token, P pairs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from peft_jax.core.mesh import ROWS, automatic, row_axes
from peft_jax.core.weight import Weight, ragged_matmul
from peft_jax.models.blocks import ACTIVATIONS


class Pairs(NamedTuple):
    """Pairs of N tokens and k experts each, sorted by expert; those of no expert come last.

    `order` [P] numbers the pairs in their sorted order, `places` [N, k] says where each is, `sizes`
    [E] how many each expert has. Of the last ones P may leave some out.
    """

    order: jax.Array
    places: jax.Array
    sizes: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """The token [P] of each sorted pair."""
        return self.order // self.places.shape[1]

    @property
    def inside(self) -> jax.Array:
        """Which of the sorted pairs [P, 1] are an expert's."""
        return (jnp.arange(len(self.order)) < self.sizes.sum())[:, None]


def sort_pairs(ids: jax.Array, experts: int) -> Pairs:
    """The pairs of tokens and their experts `ids` [N, k]; an id outside of 0 to E is no expert's.

    A token's experts differ, so that at most N min(k, E) pairs are some expert's.
    """
    N, k = ids.shape
    flat = ids.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    order = jnp.argsort(flat, stable=True)
    ends = jnp.searchsorted(flat[order], jnp.arange(experts + 1))  # of a sum, a TPU makes a loop
    sizes = jnp.diff(ends)
    places = jnp.argsort(order).reshape(N, k)
    return Pairs(order[: N * min(k, experts)], places, sizes)


@jax.custom_vjp
def spread(x: jax.Array, pairs: Pairs) -> jax.Array:
    """The token [P, D] of each sorted pair, of tokens x [N, D].

    The gradient is gathered too, as `joined` does it: a scatter of rows is slow on a TPU.
    """
    return x[pairs.tokens]


def _spread_backward(pairs: Pairs, grad: jax.Array) -> Any:
    grad = jnp.where(pairs.inside, grad, 0)
    return _placed(grad, pairs).sum(1), None


spread.defvjp(lambda x, pairs: (spread(x, pairs), pairs), _spread_backward)


@jax.custom_vjp
def joined(y: jax.Array, weights: jax.Array, pairs: Pairs) -> jax.Array:
    """What each token's experts say, [N, D]: the sum of its sorted pairs y [P, D], by `weights`
    [N, k].
    """
    y = jnp.where(pairs.inside, y, 0)
    return (_placed(y, pairs) * weights[..., None].astype(y.dtype)).sum(1)


def _placed(rows: jax.Array, pairs: Pairs) -> jax.Array:
    """Sorted pairs [P, D] by token, [N, k, D]; zeros where a pair was left out."""
    return rows.at[pairs.places].get(mode="fill", fill_value=0)


def _joined_forward(y: jax.Array, weights: jax.Array, pairs: Pairs) -> Any:
    return joined(y, weights, pairs), (y, weights, pairs)


def _joined_backward(saved: Any, grad: jax.Array) -> Any:
    y, weights, pairs = saved
    own = weights.reshape(-1)[pairs.order][:, None].astype(grad.dtype)
    d_y = jnp.where(pairs.inside, grad[pairs.tokens] * own, 0)
    y = _placed(jnp.where(pairs.inside, y, 0), pairs)
    d_weights = jnp.einsum("nkd,nd->nk", y, grad, preferred_element_type=jnp.float32)
    return d_y, d_weights.astype(weights.dtype), None


joined.defvjp(_joined_forward, _joined_backward)


def mixture(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: Any,
    down: Any,
    *,
    activation: str,
    first: Any = 0,
) -> jax.Array:
    """The experts' outputs [N, D] for tokens x [N, D], summed by `weights` [N, k] over the experts
    `ids` [N, k]; an id that is no expert's adds nothing.

    gate_up [E, D, 2F] and down [E, F, D] are arrays or Weights. They are the experts from the
    number `first` on; what other experts would add is left out.
    """
    pairs = sort_pairs(ids - first, down.shape[0])
    gate, up = jnp.split(ragged_matmul(spread(x, pairs), gate_up, pairs.sizes), 2, axis=-1)
    y = ragged_matmul(ACTIVATIONS[activation](gate) * up, down, pairs.sizes)
    return joined(y, weights, pairs)


Route = Callable[..., jax.Array]  # as `mixture`, within a device


def by_tokens(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: Any, down: Any, *, activation: str
) -> jax.Array:
    """`mixture` of the tokens of all devices of the axis `expert` by this device's experts."""
    x, ids, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, ids, weights))
    y = _own_experts(x, ids, weights, gate_up, down, activation=activation)
    return jax.lax.psum_scatter(y, "expert", tiled=True)


def _own_experts(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: Any, down: Any, *, activation: str
) -> jax.Array:
    """What this device's experts add."""
    first = jax.lax.axis_index("expert") * down.shape[0]
    return mixture(x, ids, weights, gate_up, down, activation=activation, first=first)


def by_replicas(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: Any, down: Any, *, activation: str
) -> jax.Array:
    """`mixture` of tokens that all devices of the axis `expert` have, as in a small batch."""
    y = _own_experts(x, ids, weights, gate_up, down, activation=activation)
    return jax.lax.psum(y, "expert")


def by_pairs(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: Any, down: Any, *, activation: str
) -> jax.Array:
    """`mixture` where each pair goes to the device of its expert and back."""
    (n, k), ways, own = ids.shape, jax.lax.axis_size("expert"), down.shape[0]
    pairs = sort_pairs(ids, ways * own)
    counts = jax.lax.all_gather(pairs.sizes, "expert").reshape(ways, ways, own)
    traffic = Traffic(counts.sum(-1), jax.lax.axis_index("expert"))
    room = ways * n * min(k, own)  # if all tokens chose experts of one device
    arrived = send(spread(x, pairs), room, traffic)
    experts = jnp.where(
        jnp.arange(room) < traffic.coming.sum(),
        jnp.repeat(
            jnp.tile(jnp.arange(own), ways),
            counts[:, traffic.here].reshape(-1),
            total_repeat_length=room,
        ),
        own,
    )
    ones = jnp.ones((room, 1), x.dtype)
    y = mixture(arrived, experts[:, None], ones, gate_up, down, activation=activation)
    return joined(send(y, len(pairs.order), traffic.back()), weights, pairs)


class Traffic(NamedTuple):
    """How many rows [e, e] each device has for each other, sorted by where they go, and this
    device's number. `back` is the way back; what arrives is sorted by where it is from.
    """

    rows: jax.Array
    here: jax.Array

    def back(self) -> Traffic:
        return Traffic(self.rows.T, self.here)

    @property
    def coming(self) -> jax.Array:
        """How many rows [e] each device has for this one."""
        return self.rows[:, self.here]

    @property
    def starts(self) -> jax.Array:
        """Where each device's rows [e, e] for each other begin, on the sender."""
        return jnp.cumsum(self.rows, 1) - self.rows

    @property
    def ends_up(self) -> jax.Array:
        """Where each device's rows [e, e] for each other begin, on the receiver."""
        return jnp.cumsum(self.rows, 0) - self.rows


def send(rows: jax.Array, room: int, traffic: Traffic) -> jax.Array:
    """This device's rows [n, D] to where they go, and what comes here in an array [room, D].

    One ragged all-to-all where the platform has it, else all devices see all rows.
    """
    return jax.lax.platform_dependent(
        rows,
        traffic,
        tpu=functools.partial(_all_to_all, room),
        cuda=functools.partial(_all_to_all, room),
        default=functools.partial(_seen_by_all, room),
    )


def _all_to_all(room: int, rows: jax.Array, t: Traffic) -> jax.Array:
    empty = jnp.zeros((room, rows.shape[-1]), rows.dtype)
    plan = (t.starts[t.here], t.rows[t.here], t.ends_up[t.here], t.coming)
    plan = (a.astype(jnp.int32) for a in plan)
    return jax.lax.ragged_all_to_all(rows, empty, *plan, axis_name="expert")


def _seen_by_all(room: int, rows: jax.Array, t: Traffic) -> jax.Array:
    begin = t.ends_up[:, t.here]
    place = jnp.arange(room)
    source = jnp.searchsorted(begin, place, side="right") - 1
    inside = place < t.coming.sum()
    number = t.starts[source, t.here] + place - begin[source]
    everything = jax.lax.all_gather(rows, "expert")
    return jnp.where(inside[:, None], everything[source, number], 0)


ROUTES: Mapping[str, Route] = {
    "tokens": by_tokens,
    "pairs": by_pairs,
    "experts": mixture,
    "replicas": by_replicas,
}


def cheapest(ways: int, tokens: int, chosen: int, row: int, experts: int) -> str:
    """The route that moves the fewest bytes over `ways` devices: of `tokens` on each, of `row`
    bytes, with `chosen` experts each, or of the `experts` themselves.
    """
    moved = {
        "tokens": 2 * (ways - 1) * tokens * row,
        "pairs": 2 * (ways - 1) * tokens * row * chosen / ways,
        "experts": (ways - 1) * experts / ways,
    }
    return min(moved, key=lambda route: moved[route])


def few(tokens: int, chosen: int, item: int, hidden: int, features: int, experts: float) -> bool:
    """Whether it moves fewer bytes to leave `experts` bytes of weights split over `fsdp`.

    Then the tokens [N, D], of `item` bytes a number, are gathered, the first products [N k, 2F] are
    summed over the devices, which moves them twice, and the outputs [N, D] are gathered.
    """
    return tokens * item * (2 * hidden + 4 * chosen * features) < experts


def parallel_mixture(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: Any, down: Any, *, activation: str
) -> jax.Array:
    """`mixture` of x [B, T, D] by ids and weights [B, T, k], on the program's mesh where there is
    one. Rows and tokens that the axes do not divide are the same on their devices.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), _axes(x, ids, gate_up, down)
    if all(automatic(axis) == 1 for axis in axes):
        return _flat(mixture, x, ids, weights, gate_up, down, activation=activation)
    rows = tuple(axis for axis in row_axes(x.shape[0]) if axis in axes)
    across = "sequence" if x.shape[1] % automatic("sequence") == 0 and "sequence" in axes else None
    over = (*rows, across) if across else rows
    route = _route(x, ids, gate_up, down, over)
    spec, held = P(rows or None, across), P(None if route == "experts" else "expert")
    return jax.shard_map(
        functools.partial(_on_device, ROUTES[route], over, activation),
        mesh=mesh,
        in_specs=(spec, spec, spec, held, held),
        out_specs=spec,
        axis_names=axes,
        check_vma=False,
    )(x, ids, weights, gate_up, down)


def _axes(x: jax.Array, ids: jax.Array, gate_up: Any, down: Any) -> set[str]:
    """The axes of the program's mesh over which each device routes what it holds itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if _all_rows(gate_up) or _all_rows(down):
        return set()
    axes = {*ROWS, "sequence"} & set(mesh.axis_names) - set(mesh.manual_axes)
    ways = automatic("expert") if down.shape[0] % automatic("expert") == 0 else 1
    tokens = math.prod(x.shape[:2]) // automatic("data")
    sizes = (ids.shape[-1], x.dtype.itemsize, x.shape[-1], down.shape[1])
    return axes - {"fsdp"} if few(tokens, *sizes, _stored(gate_up, down) / ways) else axes


def _stored(gate_up: Any, down: Any) -> int:
    """The bytes of all experts."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((gate_up, down)))


def _route(x: jax.Array, ids: jax.Array, gate_up: Any, down: Any, over: tuple[str, ...]) -> str:
    """The route of tokens x [B, T, D] that lie over these axes."""
    ways = automatic("expert")
    if ways == 1 or down.shape[0] % ways:
        return "experts"
    if "expert" not in over:
        return "replicas"
    tokens = math.prod(x.shape[:2]) // math.prod(automatic(axis) for axis in over)
    row = x.shape[-1] * x.dtype.itemsize
    return cheapest(ways, tokens, ids.shape[-1], row, _stored(gate_up, down))


def _on_device(
    route: Route,
    over: tuple[str, ...],
    activation: str,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: Any,
    down: Any,
) -> jax.Array:
    """A route of what one device holds, with draws of its own."""
    number = jax.lax.axis_index(over) if over else 0

    def drawn(a: jax.Array) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(a)

    gate_up, down = jax.tree.map(drawn, (gate_up, down))
    return _flat(route, x, ids, weights, gate_up, down, activation=activation)


def _flat(
    route: Route,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: Any,
    down: Any,
    *,
    activation: str,
) -> jax.Array:
    """A route of x [B, T, D] as one list of tokens."""
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, ids, weights))
    return route(*flat, gate_up, down, activation=activation).reshape(x.shape)


def _all_rows(w: Any) -> bool:
    """Whether a weight, or one inside of it, asks for all rows at once."""
    nodes = jax.tree.leaves(w, is_leaf=lambda x: isinstance(x, Weight) and x.all_rows)
    return any(isinstance(x, Weight) for x in nodes)
