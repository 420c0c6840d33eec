"""Facts written into the weights that a feed-forward writes with: ROME, MEMIT, AlphaEdit and
fine-tuning to compare with.

The weight W [F, D] of a layer maps keys k [F] to values k W [D]. A method finds the key of a fact's
subject and the value that makes the model say its target, and changes W by a product of low rank,
which stands in the tree as a LoRA of its own name: it can be left out (`drop_adapters`), merged,
and written as a PEFT folder. Letters: L layers, N facts, F units, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.core.attachment import attach
from peft_jax.core.bind import Bound, bind
from peft_jax.core.capture import Place, capture, input_of, output_of
from peft_jax.core.select import nearest
from peft_jax.core.sharding import fetch
from peft_jax.core.tree import map_places, places
from peft_jax.core.weight import materialize
from peft_jax.data import evaluation_batches
from peft_jax.data.spans import fill
from peft_jax.knowledge.evaluation import answer_nll
from peft_jax.knowledge.hooks import KEY, AddAt, FeedForward, feed_forward
from peft_jax.knowledge.requests import Edit, EditRows, check_edits, edit_rows
from peft_jax.low_rank.lora import LoRA

logger = logging.getLogger("peft_jax")

Method = Literal["rome", "memit", "alphaedit", "ft", "ft_l", "lora"]
Delta = tuple[np.ndarray, np.ndarray]  # [F, r] and [r, D], whose product is added to W


class Search(NamedTuple):
    """How values are searched for (Meng et al. 2022, arXiv:2202.05262, equation 4 and appendix
    E.5): Adam's steps and learning rate, the weights of the divergence that keeps the subject what
    it is and of the decay, and the largest change as a multiple of the value's norm.
    """

    steps: float = 25
    learning_rate: float = 0.5
    kl: float = 0.0625
    decay: float = 0.5
    clamp: float = 4.0


def edit(
    model: Any,
    params: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    *,
    method: Method = "memit",
    layers: Sequence[int] = (),
    covariances: Mapping[str, jax.Array] | None = None,
    prefixes: Sequence[str] = ("",),
    search: Search = Search(),  # noqa: B008 - immutable
    weight: float = 15_000.0,
    threshold: float = 2e-2,
    learning_rate: float = 5e-4,
    steps: int = 25,
    limit: float = 5e-4,
    rank: int = 8,
    batch: int = 32,
    name: str = "edit",
) -> Any:
    """`params` with the facts in them: a LoRA called `name` over the weights of the chosen
    `layers`.

    rome (Meng et al. 2022, equation 2): one fact after the other into one layer. memit (Meng et al.
    2022b, arXiv:2210.07229, equations 14 and 20): all at once, spread over layers; `weight` is that
    of what is known already. alphaedit (Fang et al. 2024, arXiv:2410.02355, equation 14): as memit,
    in the null space of keys of what is known, directions whose mean square is below `threshold`.
    ft: Adam on one layer's weight for `steps` at `learning_rate`; ft_l: the same with no entry
    changed by more than `limit` (Zhu et al. 2020, arXiv:2012.00363). lora: the same for products of
    `rank` (Hu et al. 2021).

    `covariances` are those of `calibrate` over texts, for the weights that are edited (not for ft,
    ft_l and lora). `prefixes` are texts before the prompts, over which keys are averaged and values
    searched for. Values of `batch` facts are searched for at a time. Layers are numbered from 0; by
    default the middle one, and the two before it where a method takes several.

    Warns (logger `peft_jax`) where the values found do not bring the model to say their targets.
    Raises ValueError for contradicting edits, an unknown method, layers that are not there, or
    missing covariances.
    """
    check_edits(edits)
    if method not in METHODS:
        raise ValueError(
            f"unknown way of editing {method!r}.{nearest(method, METHODS)} There are: "
            f"{', '.join(METHODS)}"
        )
    if not model.scan_layers:
        raise ValueError("knowledge is edited in stacked layers; load with scan_layers=True")
    place = feed_forward(params)
    way = METHODS[method]
    middle = place.layers // 2
    layers = sorted(layers) or list(
        range(max(0, middle - 2) if way.several else middle, middle + 1)
    )
    if wrong := [n for n in layers if not 0 <= n < place.layers]:
        raise ValueError(f"there is no layer {wrong[0]}; layers here: 0 to {place.layers - 1}")
    if len(layers) > 1 and not way.several:
        raise ValueError(f"{method} edits one layer, got {list(layers)}")
    covariance = None
    if way.reads_covariances:
        if covariances is None or place.weight not in covariances:
            raise ValueError(
                f"{method} needs covariances of {place.weight}: calibrate(bind(model), params, "
                "batches, targets=...)"
            )
        covariance = fetch(covariances[place.weight]).astype(np.float64)
        for layer in layers:
            if not (np.isfinite(covariance[layer]).all() and covariance[layer].any()):
                raise ValueError(
                    f"{method} needs covariances of {place.weight}, and those of layer {layer} are "
                    "of no tokens or not finite: "
                    "calibrate on rows of text"
                )
    work = _Work(model, params, tokenizer, place, tuple(prefixes), search, batch)
    given = {
        "weight": weight,
        "threshold": threshold,
        "learning_rate": learning_rate,
        "steps": steps,
        "limit": limit,
        "rank": rank,
    }
    deltas = way.run(work, edits, layers, covariance, **{n: given[n] for n in way.options})
    if unsaid := sum(p < 0.5 for p in work.likelihoods):
        logger.warning(
            "the values found for %d of %d facts give their targets less than half the "
            "probability: with more steps or a "
            "higher learning rate of the search they may say them",
            unsaid,
            len(work.likelihoods),
        )
    return with_deltas(params, place.weight, deltas, name)


def with_deltas(params: Any, path: str, deltas: Mapping[int, Delta], name: str) -> Any:
    """The tree with the products `deltas` (layer -> factors) over the stacked weight at `path`, as
    a frozen LoRA.
    """
    w = places(params)[path]
    L, F, D = w.shape
    small = {layer: _smallest(*delta) for layer, delta in deltas.items()}
    r = max(a.shape[1] for a, _ in small.values())
    a, b, gate = (
        np.zeros((L, F, r), np.float32),
        np.zeros((L, r, D), np.float32),
        np.zeros(L, np.float32),
    )
    for layer, (x, y) in small.items():
        a[layer, :, : x.shape[1]], b[layer, : x.shape[1]], gate[layer] = x, y, 1.0
    lora = LoRA(
        base=w,
        a=jnp.asarray(a),
        b=jnp.asarray(b),
        scale=jnp.ones(L),
        gate=jnp.asarray(gate),
        name=name,
        frozen=True,
    )
    return map_places(lambda p, x: lora if p == path else x, params)


def _smallest(a: np.ndarray, b: np.ndarray) -> Delta:
    """Factors of the same product, of no more terms than it can need, both of the same size."""
    if a.shape[1] > min(len(a), b.shape[1]):
        u, s, v = np.linalg.svd(a @ b, full_matrices=False)
        return u * np.sqrt(s), np.sqrt(s)[:, None] * v
    size = np.sqrt(
        np.maximum(np.linalg.norm(b, axis=1), 1e-12) / np.maximum(np.linalg.norm(a, axis=0), 1e-12)
    )
    return a * size, b / size[:, None]


# --------------------------------------------------------------------------------------------------
# the equations


def rome_update(key: np.ndarray, residual: np.ndarray, direction: np.ndarray) -> Delta:
    """The change that gives `key` [F] its residual [D] and changes other keys' values least (Meng
    et al. 2022, equation 2); `direction` [F] is the key times the covariance's inverse.
    """
    return direction[:, None], (residual / (direction @ key))[None]


def memit_update(
    keys: np.ndarray, residuals: np.ndarray, covariance: np.ndarray, weight: float
) -> Delta:
    """The change that gives keys [N, F] their residuals [N, D] in least squares, with what is known
    counted `weight` times (Meng et al. 2022b, equation 14).
    """
    return np.linalg.solve(weight * covariance + keys.T @ keys, keys.T), residuals


def alphaedit_update(
    keys: np.ndarray, residuals: np.ndarray, covariance: np.ndarray, threshold: float, decay: float
) -> Delta:
    """As `memit_update`, only where keys of what is known have next to no part (Fang et al. 2024,
    equation 14).
    """
    values, vectors = np.linalg.eigh(covariance)
    free = vectors[:, values < threshold]
    projection = free @ free.T
    return np.linalg.solve(
        projection @ (keys.T @ keys) + decay * np.eye(len(covariance)), projection @ keys.T
    ), residuals


def output_change(out: np.ndarray, added: np.ndarray, change: np.ndarray) -> np.ndarray:
    """[N, D] what has to be added to outputs `out` [N, D] for what a layer adds of them, `added`
    [N, D], to change by `change`.

    A layer adds the output itself, or its RMSNorm: s * out / rms(out), on an ellipsoid whatever the
    output's length. The output of the point there that is nearest to added + change = t is g t /
    (g^2 + m), g being the features' gains s / rms(out) and m the number that leaves the output as
    long as it was.
    """
    if np.array_equal(out, added):
        return change
    gain = _gains(out, added)
    wanted, length = added + change, np.linalg.norm(out, axis=-1, keepdims=True)
    square, product = np.square(gain), gain * wanted

    def of(m):
        return np.divide(product, square + m, out=np.zeros_like(product), where=gain != 0)

    low = -(1 - 1e-9) * np.where(gain == 0, np.inf, square).min(-1, keepdims=True)
    high = np.linalg.norm(product, axis=-1, keepdims=True) / np.maximum(length, 1e-30)
    for _ in range(100):  # the output's length falls in m
        middle = (low + high) / 2
        longer = np.linalg.norm(of(middle), axis=-1, keepdims=True) > length
        low, high = np.where(longer, middle, low), np.where(longer, high, middle)
    return of(high) - out


def _gains(out: np.ndarray, added: np.ndarray) -> np.ndarray:
    """What each feature of outputs [N, D] is multiplied with; without an output, the mean of the
    others'.
    """
    known = out != 0
    gain = np.divide(added, out, out=np.zeros_like(out), where=known)
    mean = gain.sum(-1, keepdims=True) / np.maximum(known.sum(-1, keepdims=True), 1)
    return np.where(known, gain, mean)


# --------------------------------------------------------------------------------------------------
# the methods


def _ridged(covariance: np.ndarray) -> np.ndarray:
    """A covariance that can be inverted where some units never fired."""
    return covariance + 1e-5 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))


def _rome(
    work: _Work, edits: Sequence[Edit], layers: Sequence[int], covariance: Any
) -> dict[int, Delta]:
    (layer,) = layers
    keys = work.keys(edits, [layer])[
        0
    ]  # of all facts at once: what a weight reads is not changed by what it writes
    directions = np.linalg.solve(_ridged(covariance[layer]), keys.T).T
    found: list[Delta] = []
    for fact, key, direction in zip(edits, keys, directions, strict=True):
        a, b = rome_update(key, work.values([fact], layer)[0], direction)
        work.set_weight(layer, work.weight(layer) + a @ b)
        found.append((a, b))
    return {
        layer: (np.concatenate([a for a, _ in found], 1), np.concatenate([b for _, b in found]))
    }


def _spread(
    work: _Work,
    edits: Sequence[Edit],
    layers: Sequence[int],
    update: Callable[[int, Any, Any], Delta],
) -> dict[int, Delta]:
    """What MEMIT's layers do in turn: each takes its share of what the last one's states still
    lack.
    """
    last = layers[-1]
    wanted = work.states_with(edits, last, work.values(edits, last))
    deltas: dict[int, Delta] = {}
    for n, layer in enumerate(layers):
        keys = work.keys(edits, [layer])[0]
        share = (wanted - work.states(edits, last)) / (len(layers) - n)
        deltas[layer] = update(layer, keys, work.outputs_for(edits, layer, share))
        work.set_weight(layer, work.weight(layer) + deltas[layer][0] @ deltas[layer][1])
    return deltas


def _memit(
    work: _Work, edits: Sequence[Edit], layers: Sequence[int], covariance: Any, weight: float
) -> dict[int, Delta]:
    def of(layer, keys, residuals):
        return memit_update(keys, residuals, _ridged(covariance[layer]), weight)

    return _spread(work, edits, layers, of)


def _alphaedit(
    work: _Work, edits: Sequence[Edit], layers: Sequence[int], covariance: Any, threshold: float
) -> dict[int, Delta]:
    for layer in layers:
        if not (np.linalg.eigvalsh(covariance[layer]) < threshold).any():
            raise ValueError(
                f"no direction of layer {layer}'s keys has a mean square below "
                f"threshold={threshold}; raise it"
            )

    def of(layer, keys, residuals):
        return alphaedit_update(keys, residuals, covariance[layer], threshold, 10.0)

    return _spread(work, edits, layers, of)


def _tuned(
    work: _Work,
    edits: Sequence[Edit],
    layers: Sequence[int],
    _: Any,
    learning_rate: float,
    steps: int,
    limit: float = np.inf,
) -> dict[int, Delta]:
    (layer,) = layers
    start = jnp.asarray(work.weight(layer), jnp.float32)

    def put(array, w):
        return array.at[layer].set(w.astype(array.dtype))

    after = work.descend(
        edits, start, put, learning_rate, steps, lambda w: jnp.clip(w, start - limit, start + limit)
    )
    change = fetch(after).astype(np.float64) - work.weight(layer)
    return {layer: (np.eye(len(change)), change)}


def _low_rank(
    work: _Work,
    edits: Sequence[Edit],
    layers: Sequence[int],
    _: Any,
    learning_rate: float,
    steps: int,
    rank: int,
) -> dict[int, Delta]:
    L, (F, D) = len(layers), work.weight(layers[0]).shape
    bound = F**-0.5  # as PEFT starts LoRA's first factor
    start = (
        jax.random.uniform(jax.random.key(0), (L, F, int(rank)), minval=-bound, maxval=bound),
        jnp.zeros((L, int(rank), D)),
    )

    def put(array, ab):
        return array.at[np.asarray(layers)].add((ab[0] @ ab[1]).astype(array.dtype))

    a, b = work.descend(edits, start, put, learning_rate, steps)
    return {
        layer: (fetch(a[n]).astype(np.float64), fetch(b[n]).astype(np.float64))
        for n, layer in enumerate(layers)
    }


class Way(NamedTuple):
    """A way of editing: what finds its changes, the options of `edit` that are its own, whether it
    edits several layers, and whether it reads covariances.
    """

    run: Callable[..., dict[int, Delta]]
    options: tuple[str, ...] = ()
    several: bool = False
    reads_covariances: bool = True


METHODS: dict[str, Way] = {
    "rome": Way(_rome),
    "memit": Way(_memit, ("weight",), several=True),
    "alphaedit": Way(_alphaedit, ("threshold",), several=True),
    "ft": Way(_tuned, ("learning_rate", "steps"), reads_covariances=False),
    "ft_l": Way(_tuned, ("learning_rate", "steps", "limit"), reads_covariances=False),
    "lora": Way(
        _low_rank, ("learning_rate", "steps", "rank"), several=True, reads_covariances=False
    ),
}


class _Work:
    """A model whose weights are being edited, and what is read of it. The weight's own array is
    float32 [L, F, D].
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: Any,
        place: FeedForward,
        prefixes: tuple[str, ...],
        search: Search,
        batch: int,
    ) -> None:
        self.apply, self.tokenizer, self.place = bind(model), tokenizer, place
        self.prefixes, self.search, self.batch = prefixes, search, batch
        self.array = fetch(materialize(places(params)[place.weight])).astype(np.float64)
        self.rest = map_places(lambda p, x: jnp.zeros(()) if p == place.weight else x, params)
        self.dtype = places(params)[place.weight].dtype
        self.likelihoods: list[
            float
        ] = []  # of each searched target, the geometric mean over its tokens

    def weight(self, layer: int) -> np.ndarray:
        return self.array[layer]

    def set_weight(self, layer: int, w: np.ndarray) -> None:
        self.array = self.array.copy()
        self.array[layer] = w

    @property
    def params(self) -> Any:
        now = jnp.asarray(self.array, self.dtype)
        return map_places(lambda p, x: now if p == self.place.weight else x, self.rest)

    def rows(self, edits: Sequence[Edit], *, answers: bool) -> EditRows:
        """[N P, T] rows: each fact after each of the P prefixes."""
        before = [f"{p} " if p else "" for p in self.prefixes]
        prompts = [f"{p}{e.question}" for e in edits for p in before]
        places = [(len(p) + e.place[0], len(p) + e.place[1]) for e in edits for p in before]
        targets = [e.target if answers else "" for e in edits for _ in before]
        return edit_rows(self.tokenizer, prompts, targets, places)

    def keys(self, edits: Sequence[Edit], layers: Sequence[int]) -> np.ndarray:
        """[len(layers), N, F] what goes into the weight at the subject's last token, averaged over
        prefixes.
        """
        rows = self.rows(edits, answers=False)
        name = self.place.weight.removesuffix("/kernel")
        (found,) = _read(self.apply, self.params, rows, input_of(name))
        found = found[np.asarray(layers)].astype(np.float64)
        return found.reshape(len(layers), len(edits), len(self.prefixes), -1).mean(2)

    def states(self, edits: Sequence[Edit], layer: int) -> np.ndarray:
        """[N, D] hidden states after a layer at the subject's last token, without prefixes."""
        return self._at_subjects(edits, layer, output_of(self.place.stack))[0]

    def states_with(self, edits: Sequence[Edit], layer: int, values: np.ndarray) -> np.ndarray:
        """`states` with values [N, D] added to the layer's feed-forward's output there."""
        rows, params, found = self._questions(edits), self.params, []
        moved = self.apply.program(_moved, static_argnames="place")
        for i in range(0, len(edits), self.batch):
            part = EditRows(*(x[i : i + self.batch] for x in rows))
            added = jnp.asarray(values[i : i + self.batch], jnp.float32)
            found.append(
                fetch(moved(self.apply, params, jnp.int32(layer), part, added, place=self.place))
            )
        return np.concatenate(found).astype(np.float64)

    def outputs_for(self, edits: Sequence[Edit], layer: int, change: np.ndarray) -> np.ndarray:
        """[N, D] what changes a layer's states by `change` [N, D] when it is added to its
        feed-forward's output there.
        """
        out, added = self._at_subjects(
            edits, layer, output_of(self.place.module), input_of(self.place.residual, 1)
        )
        return output_change(out, added, change)

    def values(self, edits: Sequence[Edit], layer: int) -> np.ndarray:
        """[N, D] what has to be added to the feed-forward's output there for the model to say the
        targets.
        """
        order = np.argsort(
            [len(e.question) + len(e.target) for e in edits], kind="stable"
        )  # alike in length: little padding
        some = [
            [edits[n] for n in order[i : i + self.batch]] for i in range(0, len(edits), self.batch)
        ]
        return np.concatenate([self._search(batch, layer) for batch in some])[np.argsort(order)]

    def _search(self, edits: Sequence[Edit], layer: int) -> np.ndarray:
        rows, P = self.rows(edits, answers=True), len(self.prefixes)
        essences, places = zip(*(fill("{} is a", e.subject) for e in edits), strict=True)
        essence = edit_rows(self.tokenizer, essences, [""] * len(edits), places)
        norms = np.linalg.norm(
            self._at_subjects(edits, layer, output_of(self.place.module))[0], axis=-1
        )
        run = self.apply.program(_searched, static_argnames=("place", "prefixes", "search"))
        delta, nll = run(
            self.apply,
            self.params,
            jnp.int32(layer),
            rows,
            essence,
            jnp.asarray(norms, jnp.float32),
            place=self.place,
            prefixes=P,
            search=self.search,
        )
        self.likelihoods += np.exp(-fetch(nll)).tolist()
        return fetch(delta).astype(np.float64)

    def _at_subjects(self, edits: Sequence[Edit], layer: int, *wanted: Place) -> list[np.ndarray]:
        """[N, D] for each place of a layer that is wanted: what is there at the subject's last
        token, without prefixes.
        """
        return [
            x[layer].astype(np.float64)
            for x in _read(self.apply, self.params, self._questions(edits), *wanted)
        ]

    def _questions(self, edits: Sequence[Edit]) -> EditRows:
        return edit_rows(
            self.tokenizer, [e.question for e in edits], [""] * len(edits), [e.place for e in edits]
        )

    def descend(
        self,
        edits: Sequence[Edit],
        start: Any,
        put: Callable[[jax.Array, Any], jax.Array],
        learning_rate: float,
        steps: int,
        within: Callable[[Any], Any] = lambda x: x,
    ) -> Any:
        """What Adam on the facts' targets makes of `start`, kept `within` bounds; `put` sets it
        into the weight [L, F, D].
        """
        rows = edit_rows(self.tokenizer, [e.question for e in edits], [e.target for e in edits])
        optimizer = optax.adam(learning_rate)

        def loss(x: Any, params: Any) -> jax.Array:
            changed = map_places(lambda p, w: put(w, x) if p == self.place.weight else w, params)
            return answer_nll(self.apply, changed, rows).mean()

        @jax.jit
        def step(x: Any, state: Any, params: Any) -> Any:
            updates, state = optimizer.update(jax.grad(loss)(x, params), state)
            return within(optax.apply_updates(x, updates)), state

        x, state, params = start, optimizer.init(start), self.params
        for _ in range(int(steps)):
            x, state = step(x, state, params)
        return x


def _picked(
    apply: Bound,
    params: Any,
    tokens: jax.Array | np.ndarray,
    segment_ids: jax.Array | np.ndarray,
    at: jax.Array | np.ndarray,
    wanted: tuple[Place, ...],
) -> list[jax.Array]:
    named = {str(i): place for i, place in enumerate(wanted)}
    found = capture(apply, named)(params, tokens, segment_ids=segment_ids)[1]
    return [
        jnp.take_along_axis(found[name], at[None, :, None, None], axis=2)[:, :, 0] for name in named
    ]


def _read(
    apply: Bound, params: Any, rows: EditRows, *wanted: Place, size: int = 64
) -> list[np.ndarray]:
    """[L, N, ...] for each place that is wanted: what is there of each layer, at each row's
    subject, of one pass.
    """
    picked = apply.program(_picked, static_argnames="wanted")

    def of(b):
        rows = (b["tokens"], b["segment_ids"], b["subject_at"])
        return picked(apply, params, *rows, wanted=wanted)

    batches = [of(batch) for batch in evaluation_batches(rows, min(size, len(rows.tokens)))]
    return [
        np.concatenate(list(map(fetch, parts)), axis=1)[:, : len(rows.tokens)]
        for parts in zip(*batches, strict=True)
    ]


def _changed(
    params: Any,
    place: FeedForward,
    layer: jax.Array,
    delta: jax.Array,
    at: jax.Array | np.ndarray,
) -> Any:
    """The tree with delta [N, D] added to a layer's feed-forward's output at tokens `at` [N] of the
    rows.
    """
    here = (jnp.arange(place.layers) == layer)[:, None, None]
    where = jnp.broadcast_to(jnp.asarray(at), (place.layers, len(at)))
    return attach(params, {place.module: {KEY: AddAt(delta=here * delta[None], at=where)}})


def _moved(
    apply: Bound,
    params: Any,
    layer: jax.Array,
    rows: EditRows,
    delta: jax.Array,
    *,
    place: FeedForward,
) -> jax.Array:
    """[N, D] float32 states after a layer with delta [N, D] added to its feed-forward's output, at
    the rows' subjects.
    """
    changed = _changed(params, place, layer, delta, rows.subject_at)
    (states,) = _picked(
        apply, changed, rows.tokens, rows.segment_ids, rows.subject_at, (output_of(place.stack),)
    )
    return states[layer].astype(jnp.float32)


def _searched(
    apply: Bound,
    params: Any,
    layer: jax.Array,
    rows: EditRows,
    essence: EditRows,
    norms: jax.Array,
    *,
    place: FeedForward,
    prefixes: int,
    search: Search,
) -> tuple[jax.Array, jax.Array]:
    """The changes [N, D] of values that are searched for, all facts of a batch at once and each for
    itself; and the loss [N] of their targets in the last step.
    """
    optimizer, start = optax.adam(search.learning_rate), _essences(apply, params, essence)

    def changed(delta: jax.Array, at: jax.Array | np.ndarray) -> Any:
        return _changed(params, place, layer, delta, at)

    def loss(delta: jax.Array) -> Any:
        repeated = changed(jnp.repeat(delta, prefixes, axis=0), rows.subject_at)
        nll = answer_nll(apply, repeated, rows).reshape(-1, prefixes).mean(1)
        now = _essences(apply, changed(delta, essence.subject_at), essence)
        kl = (jnp.exp(now) * (now - start)).sum(-1)
        decay = jnp.linalg.norm(delta, axis=-1) / jnp.square(norms)
        return (nll + search.kl * kl + search.decay * decay).sum(), nll

    def step(carry: Any, _: Any) -> Any:
        delta, state = carry
        slope, nll = jax.grad(loss, has_aux=True)(delta)
        updates, state = optimizer.update(slope, state)
        delta = jnp.asarray(optax.apply_updates(delta, updates))
        size = jnp.linalg.norm(delta, axis=-1)
        within = jnp.minimum(1.0, search.clamp * norms / jnp.maximum(size, 1e-9))
        return (delta * within[:, None], state), nll

    width = jax.eval_shape(lambda: apply(params, rows.tokens[:1], method="hidden")).shape[-1]
    delta = jnp.full((len(norms), width), 1e-8, jnp.float32)  # the norm's gradient at 0 is none
    carry = (delta, optimizer.init(delta))
    (delta, _), nll = jax.lax.scan(step, carry, None, length=int(search.steps))
    return delta, nll[-1]


def _essences(apply: Any, params: Any, rows: EditRows) -> jax.Array:
    """[N, V] log-probabilities of what follows each row."""
    logits = apply(params, rows.tokens, segment_ids=rows.segment_ids)
    last = jnp.asarray(rows.segment_ids).sum(-1) - 1
    return jax.nn.log_softmax(jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0])
