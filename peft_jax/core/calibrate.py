"""Calibration: statistics of what goes into each weight, collected in one pass over some batches.

A `Probe` stands in the weight's place and passes its input on; the statistic is the "gradient" of
an array of zeros beside it. So it works wherever gradients do: in scanned, rematerialised and
third-party models, and sharded ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from peft_jax.core.bind import Bound, bound_of
from peft_jax.core.coverage import Calibrated, record_tokens
from peft_jax.core.partition import combine, partition
from peft_jax.core.reparametrised import (
    Product,
    Reparametrised,
    Site,
    find_sites,
    node,
    place_nodes,
)
from peft_jax.core.roles import is_expert
from peft_jax.core.select import Targets
from peft_jax.core.tree import map_places, places
from peft_jax.core.weight import (
    Layout,
    Trainable,
    ragged_matmul,
    row_groups,
    static,
    take,
    to_matrix,
)
from peft_jax.core.where import Selection

Statistic = Literal[
    "covariance", "centred_covariance", "second_moment", "mean", "mean_abs", "max_abs"
]


class Uses:
    """How often one trace met each weight. No two are equal, so that no trace stands in for
    another.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def next(self, name: str) -> int:
        """The number of one more use, from 0 on."""
        self.counts[name] = self.counts.get(name, 0) + 1
        return self.counts[name] - 1


Sinks = tuple[
    jax.Array, jax.Array, jax.Array
]  # of the statistic, the number of tokens and that of products


@node
class Probe(Reparametrised):
    """`base`, unchanged; sink [*lead, in, in] or [*lead, in] receives the statistic of its inputs
    as a gradient, tokens [*lead] their number and calls [*lead] that of the products. `probing`
    fills `seen` (see `seen_of`) and `uses`. For `token_cap` see `calibrate`. For a centred
    covariance inputs have a one after them, so that the sink is [*lead, in + 1, in + 1].

    What several uses of a weight let flow into a sink is added up, which makes no maximum. So a
    sink of maxima is [*lead, slots, in] in a pass, calls are [*lead, slots], and each use that a
    trace meets has a slot to itself.
    """

    trainable: ClassVar[tuple[str, ...]] = ("sink", "tokens", "calls")
    stochastic: ClassVar[bool] = False
    all_rows: ClassVar[bool] = True  # a maximum or a median is not a sum of the devices' own
    sink: jax.Array
    tokens: jax.Array
    calls: jax.Array
    seen: tuple[jax.Array, ...] = ()
    uses: Uses | None = static(default=None)
    statistic: str = static(default="covariance")
    token_cap: float | None = static(default=None)

    def product(self, x: jax.Array, base: Product) -> jax.Array:
        seen = seen_of(self.seen, x.shape[:-1])
        return base(_tap((self.statistic, self.token_cap), x, seen, self.sinks()))

    def ragged_matmul(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        what = (self.statistic, self.token_cap)
        return ragged_matmul(_ragged_tap(what, x, sizes, self.sinks()), self.base, sizes)

    def take(self, ids: jax.Array, dtype: Any = None) -> jax.Array:
        return take(self.base, ids, dtype)  # ids are no inputs that have a statistic

    def sinks(self) -> Sinks:
        """Where one more use of this weight writes."""
        if not self.slotted or self.uses is None:
            return self.sink, self.tokens, self.calls
        slot = min(self.uses.next(self.name), self.calls.shape[-1] - 1)
        return self.sink[..., slot, :], self.tokens, self.calls[..., slot]

    @property
    def slotted(self) -> bool:
        return self.statistic == "max_abs"

    def widened(self, slots: int) -> Probe:
        """With so many slots, where uses do not add up."""
        if not self.slotted:
            return self
        lead = self.tokens.shape
        sink, calls = jnp.zeros((*lead, slots, self.sink.shape[-1])), jnp.zeros((*lead, slots))
        return self.replace(sink=sink, calls=calls)

    def narrowed(self) -> Probe:
        """The inverse: the largest of all slots."""
        return (
            self.replace(sink=self.sink.max(-2), calls=self.calls.max(-1)) if self.slotted else self
        )

    def unrounded(self) -> jax.Array:
        raise ValueError(
            "a weight that its module materialises cannot be calibrated; register a rule or "
            "exclude it"
        )


def seen_of(seen: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """1 for tokens that count and 0 for padding, of this `shape` (rows may lie in one axis): the
    call's mask of so many tokens, else all count. Of two sequences `collect` sees to it that their
    numbers differ.
    """
    found = next((mask for mask in seen if mask.size == math.prod(shape)), jnp.ones(shape))
    return found.reshape(shape)


def capped(rows: jax.Array, cap: float | None, inside: jax.Array) -> jax.Array:
    """Rows [N, in], the longer ones made shorter: a squared norm is at most `cap` times the median
    of those `inside` [N].
    """
    if cap is None:
        return rows
    energy = jnp.square(rows).sum(-1)
    limit = cap * jnp.nanmedian(jnp.where(inside, energy, jnp.nan))
    return rows * jnp.where((energy > limit) & (limit > 0), jnp.sqrt(limit / energy), 1.0)[:, None]


What = tuple[str, float | None]  # the statistic, and the cap on what one token adds to it


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(what: What, x: jax.Array, seen: jax.Array, sinks: Sinks) -> jax.Array:
    return x


def _tap_forward(what: What, x: jax.Array, seen: jax.Array, sinks: Sinks) -> Any:
    return x, (x, seen)


def _tap_backward(what: What, saved: Any, grad: jax.Array) -> Any:
    (x, seen), (statistic, cap) = saved, what
    rows = jnp.where(seen[..., None] > 0, _rows(statistic, x), 0.0)
    rows = capped(rows.reshape(-1, rows.shape[-1]), cap, seen.reshape(-1) > 0)
    value = {
        "covariance": lambda: jnp.matmul(rows.T, rows),
        "centred_covariance": lambda: jnp.matmul(rows.T, rows),
        "second_moment": lambda: jnp.square(rows).sum(0),
        "mean": lambda: rows.sum(0),
        "mean_abs": lambda: jnp.abs(rows).sum(0),
        "max_abs": lambda: jnp.abs(rows).max(0),
    }[statistic]()
    # Nothing flows further back: the statistic is all that is asked for.
    return jnp.zeros_like(x), None, (value, seen.sum(), jnp.ones(()))


_tap.defvjp(_tap_forward, _tap_backward)


def _rows(statistic: str, x: jax.Array) -> jax.Array:
    """Inputs [..., in] in float32; with a one after them, whose products are their sum and number,
    to be centred.
    """
    x = x.astype(jnp.float32)
    return (
        jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1)
        if statistic == "centred_covariance"
        else x
    )


def _centred(products: jax.Array) -> jax.Array:
    """The sum of (x - m)(x - m)^T [*lead, in, in] about the mean m, of products [*lead, in + 1, in
    + 1] of x with a one.
    """
    sums, count = products[..., :-1, -1], jnp.maximum(products[..., -1:, -1:], 1.0)
    return products[..., :-1, :-1] - sums[..., :, None] * sums[..., None, :] / count


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_tap(what: What, x: jax.Array, sizes: jax.Array, sinks: Sinks) -> jax.Array:
    return x


def _ragged_forward(what: What, x: jax.Array, sizes: jax.Array, sinks: Sinks) -> Any:
    return x, (x, sizes)


def _ragged_backward(what: What, saved: Any, grad: jax.Array) -> Any:
    """The statistic of each group's rows."""
    (x, sizes), E, (statistic, cap) = saved, saved[1].shape[0], what
    group = row_groups(len(x), sizes)
    rows = capped(_rows(statistic, x), cap, group < E)
    if statistic.endswith(
        "covariance"
    ):  # what the gradient of a product with each group's weight is
        _, back = jax.vjp(
            lambda w: jax.lax.ragged_dot(rows, w, sizes),
            jnp.zeros((E, rows.shape[-1], rows.shape[-1])),
        )
        inside = (group < E)[:, None]
        value = back(jnp.where(inside, rows, 0.0))[0]
    elif statistic == "max_abs":
        value = jnp.maximum(jax.ops.segment_max(jnp.abs(rows), group, E), 0.0)
    else:
        of = {"second_moment": jnp.square, "mean": lambda r: r, "mean_abs": jnp.abs}[statistic]
        value = jax.ops.segment_sum(of(rows), group, E)
    return jnp.zeros_like(x), None, (value, sizes.astype(jnp.float32), jnp.ones(E))


_ragged_tap.defvjp(_ragged_forward, _ragged_backward)


def calibrate(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    statistic: Statistic = "covariance",
    token_cap: float | None = None,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    within: str = "",
    compiled: Pass | None = None,
) -> Calibrated:
    """path -> mean over tokens of x x^T ("covariance", [*lead, in, in]), the same about the mean
    ("centred_covariance"), x^2 ("second_moment", [*lead, in]), x ("mean") or |x| ("mean_abs"), or
    the largest |x| ("max_abs"), float32.

    Of stacked experts each has the tokens that it gets, over the number of all tokens; how many
    those were is in the result's `tokens`, path -> [*lead]. See `collect` for the `batches`. Of a
    part of a tree, paths begin `within` it; `compiled`, the `probing` of `apply`, shares programs
    between calls.

    Language models write some tokens, the first of each row above all, hundreds of times larger
    than others (Sun et al. 2024, arXiv:2402.17762), and a sum of squares is then theirs alone. With
    `token_cap` the squared norm of a token counts for at most so many times the median token's of
    its batch, in "covariance" and "second_moment"; the others are as they are.

    Raises ValueError where there is no batch, a target matches nothing, the cap is not positive, or
    uses of a weight cannot be told apart whose largest inputs are asked for.
    """
    if token_cap is not None and not token_cap > 0:
        raise ValueError(f"token_cap must be positive, or None for no cap, got {token_cap}")
    cap = token_cap if statistic in ("covariance", "second_moment") else None

    def make(site: Site, key: jax.Array) -> Probe:
        lead, n_in, _ = site.sizes
        square = {"covariance": n_in, "centred_covariance": n_in + 1}.get(statistic)
        shape = (*lead, n_in) if square is None else (*lead, square, square)
        return Probe(
            **site.common(name=site.path),
            sink=jnp.zeros(shape),
            tokens=jnp.zeros(lead),
            calls=jnp.zeros(lead),
            statistic=statistic,
            token_cap=cap,
        )

    at = Selection(targets=targets, exclude=exclude, layout=layout)
    probed = place_nodes(params, jax.random.key(0), make, at)
    inside = {p for p, w in places(probed).items() if isinstance(w, Probe)}
    sinks, rest = partition(map_places(lambda p, w: w if p in inside else _frozen(w), probed))
    largest = statistic == "max_abs"
    run = probing(apply) if compiled is None else compiled
    total, count = collect(run, sinks, rest, batches, add=functools.partial(_add_probes, largest))
    probes = {path: places(total)[path] for path in sorted(inside)}
    if largest:
        _check_apart(probes, within)

    def mean(path: str, probe: Probe) -> jax.Array:
        n = count if is_expert(path) else jnp.maximum(probe.tokens, 1.0)
        sink = _centred(probe.sink) if statistic == "centred_covariance" else probe.sink
        return sink / jnp.reshape(n, (*jnp.shape(n), *[1] * (sink.ndim - jnp.ndim(n))))

    def whole(path):
        return f"{within}/{path}" if within else path

    tokens = {whole(path): probe.tokens for path, probe in probes.items()}
    record_tokens(tokens)
    return Calibrated(
        {
            whole(path): probe.sink if largest else mean(path, probe)
            for path, probe in probes.items()
        },
        tokens,
    )


def _check_apart(probes: Mapping[str, Probe], within: str) -> None:
    """Raise ValueError where maxima of several uses were added up in one slot."""
    for path, probe in probes.items():
        if float(probe.calls.max()) > 1:
            raise ValueError(
                f"{f'{within}/' if within else ''}{path} is used several times by one loop or "
                "compiled function (a scan, vmap "
                "or jit), where the largest inputs of its uses cannot be told apart; calibrate "
                "without that, or exclude it"
            )


def _add_probes(largest: bool, total: Any, found: Any) -> Any:
    """Two trees of what probes received as one."""

    def add(a: Probe, b: Probe) -> Probe:
        sink = (jnp.maximum if largest else jnp.add)(a.sink, b.sink)
        return a.replace(sink=sink, tokens=a.tokens + b.tokens, calls=jnp.maximum(a.calls, b.calls))

    return jax.tree.map(add, total, found, is_leaf=lambda x: isinstance(x, Probe))


def _add(total: Any, found: Any) -> Any:
    return jax.tree.map(jnp.add, total, found)


Pass = Callable[..., Any]


def probing(apply: Callable[..., Any]) -> Pass:
    """The compiled pass that gives what flows into the probes of a tree: one program for all trees
    of like structure.
    """

    def run(apply: Bound, sinks: Any, rest: Any, sequences: Any, inputs: Any, seen: Any) -> Any:
        def output(sinks: Any, uses: Uses) -> jax.Array:
            told = map_places(functools.partial(_told, seen, uses), combine(sinks, rest))
            return jnp.sum(
                jax.tree.leaves(apply(told, *sequences, **inputs))[0].astype(jnp.float32)
            )

        uses = Uses()
        if any(isinstance(x, Probe) and x.slotted for x in places(sinks).values()):
            jax.eval_shape(
                functools.partial(output, uses=uses),
                _each_probe(lambda probe: probe.widened(1), sinks),
            )
        wide = _each_probe(lambda probe: probe.widened(uses.counts.get(probe.name, 1)), sinks)
        return _each_probe(Probe.narrowed, jax.grad(output)(wide, Uses()))

    return functools.partial(jax.jit(run), bound_of(apply))


def collect(
    run: Pass,
    sinks: Any,
    rest: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    add: Callable[..., Any] = _add,
) -> tuple[Any, int]:
    """(what the probes of a tree let flow into `sinks`, like `sinks`, joined over the batches by
    `add`; the number of tokens).

    `run` is the model's `probing`; `sinks` and `rest` are the parts of the tree that `partition`
    gives. `batches` hold `tokens` [B, T] (of a layer alone its hidden states [B, T, D]) and what
    else the model's call takes (`positions`, `segment_ids`); an encoder-decoder's `decoder_tokens`
    and `weights` [B, U] too. What has the segment 0, or as a target the weight 0, is padding and
    does not count. Raises ValueError where there is no batch.
    """
    total, count = None, 0
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k in ("positions", "segment_ids")}
        sequences, seen = _sequences(batch)
        found = run(sinks, rest, sequences, inputs, seen)
        total = found if total is None else add(total, found)
        count += int(seen[0].sum())
    if total is None:
        raise ValueError("there is no batch to calibrate on")
    return total, count


def _sequences(batch: Mapping[str, Any]) -> tuple[list[Any], tuple[jax.Array, ...]]:
    """(the sequences of tokens that a model's call takes, which of them count, float32).

    An encoder-decoder's targets get a column of padding where they are as long as the source, so
    that they differ in number.
    """
    tokens = batch["tokens"]
    segments = batch.get("segment_ids")
    seen = jnp.ones(jnp.shape(tokens)[:2]) if segments is None else jnp.asarray(segments) > 0
    if "decoder_tokens" not in batch:
        return [tokens], (seen.astype(jnp.float32),)
    targets, counts = (jnp.asarray(batch[name]) for name in ("decoder_tokens", "weights"))
    if targets.shape == jnp.shape(tokens):
        targets, counts = (jnp.pad(x, ((0, 0), (0, 1))) for x in (targets, counts))
    return [tokens, targets], tuple((x > 0).astype(jnp.float32) for x in (seen, counts))


def _each_probe(change: Callable[[Probe], Probe], tree: Any) -> Any:
    return map_places(lambda _, x: change(x) if isinstance(x, Probe) else x, tree)


def _told(seen: tuple[jax.Array, ...], uses: Uses, path: str, x: Any) -> Any:
    """A probe that knows which tokens count, and where its uses are counted."""
    if not hasattr(x, "seen"):
        return x
    x = x.replace(uses=uses) if isinstance(x, Probe) else x
    return x.replace(seen=tuple(jnp.broadcast_to(mask, (*x.lead, *mask.shape)) for mask in seen))


def calibrate_all(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    statistics: Iterable[Statistic],
    **options: Any,
) -> dict[str, Calibrated]:
    """statistic -> what `calibrate` gives for it; `options` are its others."""
    return {
        name: calibrate(apply, params, batches, statistic=name, **options) for name in statistics
    }


def gradients(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    targets: Targets = "all-linear",
    exclude: Targets = (),
    layout: Layout | None = None,
    square: bool = False,
) -> dict[str, jax.Array]:
    """path -> mean gradient [*lead, in, out], float32, of `loss(params, batch)` with respect to
    each whole weight; with `square` the mean over batches of the squared gradient.

    Each batch's gradient is in the weight's dtype; they are added up in float32. All of the
    targets' gradients are held at once. Raises ValueError where there is no batch.
    """
    sites = find_sites(params, targets=targets, exclude=exclude, layout=layout)
    chosen = map_places(lambda p, w: Trainable(w) if p in sites else _frozen(w), params)
    trainable, frozen = partition(chosen)
    gradient = jax.jit(jax.grad(lambda t, f, batch: loss(combine(t, f), batch)))
    total, count = None, 0
    for batch in batches:
        found = jax.tree.map(lambda g: g.astype(jnp.float32), gradient(trainable, frozen, batch))
        found = jax.tree.map(jnp.square, found) if square else found
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += 1
    if total is None:
        raise ValueError("there is no batch to calibrate on")
    known = places(total)
    return {p: to_matrix(known[p].value, s.in_axes, s.out_axes) / count for p, s in sites.items()}


def _frozen(w: Any) -> Any:
    return w.replace(frozen=True) if hasattr(w, "frozen") and hasattr(w, "replace") else w
