"""Divergences against float64 references in NumPy and PyTorch, and against TRL's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from peft_jax.distillation.divergence import (
    DIVERGENCES,
    log_probabilities,
    make_divergence,
    top_k,
    with_tail,
)
from peft_jax.distillation.match import uld
from tests.reference import relative_error

CASES = {  # name -> (scale of the logits, temperature)
    "plain": (1.0, 1.0),
    "warm": (3.0, 2.5),
    "sharp": (60.0, 1.0),
    "sharp_and_close": (40.0, 1.0),
}
SHARES = {"beta": (0.0, 0.1, 0.5, 0.9, 1.0), "alpha": (0.1, 0.7)}
EVERY = [(n, {o: v}) for n, (_, o) in DIVERGENCES.items() if o for v in SHARES[o]] + [
    (n, {}) for n, (_, o) in DIVERGENCES.items() if not o
]


def logits(case, padded=0, seed=0):
    scale, _ = CASES[case]
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 5, 23)) * scale
    if case == "sharp_and_close":
        teacher = student + rng.normal(size=student.shape) * 0.01
    rubbish = np.full((5, padded), 50.0)
    return tuple(np.concatenate([x, rubbish], -1).astype(np.float32) for x in (student, teacher))


def reference(name, options, student, teacher, temperature):
    """The definitions in PyTorch, float64; [5], with its gradient in the student's logits."""
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    log_q = torch.log_softmax(z / temperature, -1)
    log_p = torch.log_softmax(torch.tensor(teacher, dtype=torch.float64) / temperature, -1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    def mix(a, b, share):
        return torch.log(share * a.exp() + (1 - share) * b.exp())

    beta, alpha = options.get("beta", 0.5), options.get("alpha", 0.1)
    if name == "jensen_shannon" and beta in (0.0, 1.0):
        name = "reverse_kl" if beta else "forward_kl"
    value = {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jensen_shannon": lambda: (
            beta * kl(log_p, mix(log_p, log_q, beta))
            + (1 - beta) * kl(log_q, mix(log_p, log_q, beta))
        ),
        "skewed_forward_kl": lambda: kl(log_p, mix(log_p, log_q, alpha)),
        "skewed_reverse_kl": lambda: kl(log_q, mix(log_q, log_p, alpha)),
        "total_variation": lambda: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    }[name]()
    value.sum().backward()
    return value.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "options"), EVERY, ids=lambda x: str(x))
def test_values_and_gradients_equal_float64(name, options, case):
    temperature = CASES[case][1]
    student, teacher = logits(case, padded=3)
    divergence = make_divergence(name, **options)

    def value(z):
        of = {"temperature": temperature, "vocabulary": 23}
        return divergence(log_probabilities(z, **of), log_probabilities(teacher, **of))

    found, grad = value(student), jax.grad(lambda z: value(z).sum())(student)
    expected, expected_grad = reference(
        name, options, student[:, :23], teacher[:, :23], temperature
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(
        grad[:, :23], expected_grad, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected_grad).max())
    )
    assert not np.asarray(grad[:, 23:]).any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jensen_shannon_is_trls(beta):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits("warm")
    labels = torch.tensor([[3, -100, 5, 6, -100]])
    theirs = GKDTrainer.generalized_jsd_loss(
        torch.tensor(student)[None],
        torch.tensor(teacher)[None],
        labels,
        beta=beta,
        temperature=2.0,
        reduction="batchmean",
    )

    def of(x):
        return log_probabilities(x, temperature=2.0)

    ours = make_divergence("jensen_shannon", beta=beta)(of(student), of(teacher))
    counted = np.asarray([1, 0, 1, 1, 0])
    assert relative_error((ours * counted).sum() / counted.sum(), theirs.item()) < 1e-5


def test_impossible_tokens_are_no_trouble():
    """Logits of minus infinity in either or both."""
    student, teacher = (
        np.random.default_rng(i).normal(size=(2, 6)).astype(np.float32) for i in range(2)
    )
    student[:, 4], teacher[:, 4:] = -np.inf, -np.inf
    for name in DIVERGENCES:

        def of(z, name=name):
            return make_divergence(name)(log_probabilities(z), log_probabilities(teacher)).sum()

        value, grad = jax.value_and_grad(of)(student)
        assert np.isfinite(value), name
        assert np.isfinite(grad).all(), name


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_tail_makes_a_lower_bound_and_all_tokens_the_whole(name):
    student, teacher = logits("warm")
    divergence = make_divergence(name)
    whole = divergence(log_probabilities(student), log_probabilities(teacher))
    before = np.zeros(5)
    for k in (1, 4, 12, 23):
        ids, kept = top_k(jnp.asarray(teacher), k)
        np.testing.assert_allclose(np.exp(kept).sum(-1), 1.0, rtol=1e-5)
        part = divergence(with_tail(jnp.asarray(student), ids), kept)
        assert (part >= before - 1e-6).all()
        assert (part <= whole + 1e-5).all()
        before = part
    np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-6)

    def grad(f):
        return jax.grad(lambda z: f(z).sum())(jnp.asarray(student))

    exact = grad(lambda z: divergence(log_probabilities(z), log_probabilities(teacher)))
    np.testing.assert_allclose(
        grad(lambda z: divergence(with_tail(z, ids), kept)), exact, rtol=1e-4, atol=1e-6
    )


def test_uld_is_the_papers():
    student, teacher = (
        np.random.default_rng(i).normal(size=(4, n)).astype(np.float32)
        for i, n in ((0, 9), (1, 14))
    )

    def sort(x):
        return np.sort(np.exp(x) / np.exp(x).sum(-1, keepdims=True))[:, ::-1]

    expected = np.abs(
        np.pad(sort(student.astype(np.float64)), ((0, 0), (0, 5)))
        - sort(teacher.astype(np.float64))
    ).sum(-1)
    assert (
        relative_error(uld(log_probabilities(student), log_probabilities(teacher)), expected) < 1e-5
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown divergence 'forward'. Did you mean 'forward_kl'\?"
    ):
        make_divergence("forward")
    with pytest.raises(ValueError, match=r"beta of jensen_shannon must lie in \[0, 1\], got 2"):
        make_divergence("jensen_shannon", beta=2)
    with pytest.raises(ValueError, match="forward_kl has no option 'beta'"):
        make_divergence("forward_kl", beta=0.5)
