"""Losses against formulas.py, and the defects that other implementations have had."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.distill import losses
from moe_jax.distill.chunked import LazyLogits, divergence, vocabulary_chunks
from moe_jax.distill.divergences import Divergence
from tests.distill import formulas

# Sizes are no powers of two, and the last chunk of 16 tokens overlaps with the one before.
N = 7
D = 9
V = 53
KINDS = [
    ("forward", 0.5),
    ("reverse", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 0.9),
    ("skew_forward", 0.1),
    ("skew_reverse", 0.1),
    ("total_variation", 0.5),
]


def lazy_logits(seed, width=D, rows=V, spread=1.0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(N, width))
    table = rng.normal(size=(rows, width))
    return LazyLogits(*(jnp.asarray(spread * a, jnp.float32) for a in (hidden, table)))


def logits(of, temperature=1.0):
    return np.asarray(of.hidden, np.float64) @ np.asarray(of.table, np.float64).T / temperature


def from_logits(z):
    """A lazy_logits whose hidden state is the logits, so that its gradient is theirs."""
    z = jnp.asarray(z, jnp.float32)
    return LazyLogits(z, jnp.eye(z.shape[-1]))


STUDENT = lazy_logits(0)
TEACHER = lazy_logits(1, width=5)
TARGETS = jnp.asarray(np.random.default_rng(2).integers(0, V, N))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_value_and_gradient_are_the_formula(kind, mix, temperature):
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=16, temperature=temperature)
    p, q = (formulas.softmax(logits(of, temperature)) for of in (TEACHER, STUDENT))
    upstream = np.linspace(0.5, 2, N)

    def loss(student):
        values = divergence(student, [TEACHER], chunks, Divergence(kind, mix))
        return jnp.sum(values * upstream), values

    (_, values), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(STUDENT)
    # float32 sums over the vocabulary of terms of size one; JSD divides them by b.
    np.testing.assert_allclose(values, formulas.value(kind, p, q, mix), rtol=2e-4, atol=2e-5)
    dz = formulas.slope(kind, p, q, mix) * upstream[:, None] / temperature
    np.testing.assert_allclose(gradient.hidden, dz @ STUDENT.table, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(gradient.table, dz.T @ STUDENT.hidden, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("chunk", [1, 16, 53, 4096])
def test_chunks_do_not_show(chunk):
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=chunk)
    actual = jax.jit(lambda s: divergence(s, [TEACHER], chunks, Divergence()))(STUDENT)
    p, q = (formulas.softmax(logits(of)) for of in (TEACHER, STUDENT))
    np.testing.assert_allclose(actual, formulas.kl(p, q), rtol=1e-4)


@pytest.mark.parametrize(("near", "end"), [(0.0, "forward"), (1.0, "reverse")])
@pytest.mark.parametrize("step", [0.0, 1e-7, 1e-5])
def test_generalised_jsd_is_continuous_at_its_ends(near, end, step):
    """Value and gradient; unscaled, both vanish at the ends while KL does not."""
    p_z = logits(TEACHER) / 3
    q_z = logits(STUDENT) / 3
    chunks = vocabulary_chunks([from_logits(p_z)], size=16)

    def loss(z, kind):
        return divergence(from_logits(z), [from_logits(p_z)], chunks, kind).sum()

    mix = abs(near - step)
    if near and step == 1e-7:
        mix = float(np.nextafter(np.float32(1), np.float32(0)))
    z = jnp.asarray(q_z, jnp.float32)
    actual = jax.value_and_grad(loss)(z, Divergence("jsd", mix))
    expected = jax.value_and_grad(loss)(z, Divergence(end))
    # It differs from its limit by a factor 1 + O(b · largest p/q), here 1e-5 · 1e3.
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-2)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("kind", "mix"), KINDS)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_identical_models_give_zero_and_no_gradient(kind, mix, spread):
    same = lazy_logits(3, spread=spread)
    chunks = vocabulary_chunks([same], size=16)

    def loss(student):
        return divergence(student, [same], chunks, Divergence(kind, mix)).sum()

    actual, gradient = jax.value_and_grad(loss)(same)
    assert abs(float(actual)) < 1e-4
    largest = max(float(jnp.abs(leaf).max()) for leaf in gradient)
    assert largest < 1e-3 * spread


@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_extreme_logits_stay_finite(kind, mix):
    """Probabilities that underflow float32 on either side."""
    z = np.zeros((2, 6), np.float32)
    z[0, 0] = 200
    z[1, 1] = 200
    teacher = from_logits(z)
    student = from_logits(z[::-1].copy())
    chunks = vocabulary_chunks([teacher])

    def loss(student):
        return divergence(student, [teacher], chunks, Divergence(kind, mix)).sum()

    actual, gradient = jax.value_and_grad(loss)(student)
    assert np.isfinite(actual)
    assert actual > 0.9
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_skew_gradient_is_bounded_where_forward_kl_is_a_cliff():
    teacher = from_logits([[0.0, 50.0]])
    student = from_logits([[50.0, 0.0]])
    chunks = vocabulary_chunks([teacher])
    value = divergence(student, [teacher], chunks, Divergence("skew_forward", 0.1))
    assert float(value[0]) <= np.log(10) + 1e-4
    assert float(divergence(student, [teacher], chunks, Divergence())[0]) > 49


def test_mixture_with_cross_entropy_and_temperature():
    """(1-a)·CE at temperature 1 + a·t²·KL at t."""
    t = 2.0
    alpha = 0.7
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=16, temperature=t)
    actual = losses.distillation(
        STUDENT, [TEACHER], TARGETS, chunks, kind=Divergence(), alpha=alpha
    )
    ce = -np.log(formulas.softmax(logits(STUDENT))[np.arange(N), TARGETS])
    from_teacher = formulas.kl(*(formulas.softmax(logits(of, t)) for of in (TEACHER, STUDENT)))
    np.testing.assert_allclose(actual, (1 - alpha) * ce + alpha * t * t * from_teacher, rtol=1e-4)


def test_cross_entropy_gradient_is_q_minus_one_hot():
    chunks = vocabulary_chunks([STUDENT], size=16)
    gradient = jax.grad(lambda s: losses.cross_entropy(s, TARGETS, chunks).sum())(STUDENT)
    dz = formulas.softmax(logits(STUDENT)) - np.eye(V)[TARGETS]
    np.testing.assert_allclose(gradient.hidden, dz @ STUDENT.table, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradient.table, dz.T @ STUDENT.hidden, rtol=1e-3, atol=1e-4)


def test_several_teachers_are_the_mixture_of_their_probabilities():
    other = lazy_logits(4, width=3)
    weights = [0.25, 0.75]
    chunks = vocabulary_chunks([STUDENT, TEACHER, other], size=16)
    actual = divergence(STUDENT, [TEACHER, other], chunks, Divergence("reverse"), weights)
    one, two, q = (formulas.softmax(logits(of)) for of in (TEACHER, other, STUDENT))
    np.testing.assert_allclose(actual, formulas.kl(q, 0.25 * one + 0.75 * two), rtol=1e-4)


def test_the_teacher_is_not_dropped():
    """KD that lost its teacher's data would be a silent no-op: another teacher must give another
    gradient, and the teacher itself must get none."""
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=16)

    def loss(student, teacher, alpha=1.0):
        values = losses.distillation(
            student, [teacher], TARGETS, chunks, kind=Divergence(), alpha=alpha
        )
        return values.sum()

    to_student, to_teacher = jax.grad(loss, argnums=(0, 1))(STUDENT, TEACHER)
    elsewhere = jax.grad(loss)(STUDENT, lazy_logits(9, width=5))
    assert float(jnp.linalg.norm(to_student.hidden)) > 0.1
    assert float(jnp.linalg.norm(to_student.hidden - elsewhere.hidden)) > 0.1
    assert not any(leaf.any() for leaf in to_teacher)
    without = jax.grad(partial(loss, alpha=0.0))(STUDENT, TEACHER)
    assert float(jnp.linalg.norm(to_student.hidden - without.hidden)) > 0.1


def test_positions_are_compared_without_a_shift():
    """A student equal to its teacher has no loss; one that is a position late or early has."""
    chunks = vocabulary_chunks([STUDENT], size=16)
    for shift, zero in ((0, True), (1, False), (-1, False)):
        late = LazyLogits(jnp.roll(STUDENT.hidden, shift, axis=0), STUDENT.table)
        actual = divergence(late, [STUDENT], chunks, Divergence())
        assert bool(jnp.all(actual < 1e-4)) == zero


def test_masked_positions_have_neither_value_nor_gradient():
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=16)
    mask = jnp.arange(N) % 3 != 0

    def loss(student, mask):
        values = divergence(student, [TEACHER], chunks, Divergence())
        return losses.total(values, mask, mask.sum())

    actual, gradient = jax.value_and_grad(loss)(STUDENT, mask)
    unmasked = [
        TEACHER._replace(hidden=TEACHER.hidden[mask]),
        STUDENT._replace(hidden=STUDENT.hidden[mask]),
    ]
    expected = formulas.kl(*(formulas.softmax(logits(of)) for of in unmasked)).mean()
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert not gradient.hidden[~mask].any()


def test_micro_batches_of_uneven_masks_add_up():
    """With the whole batch's count as normaliser; averaging the parts' means gives another loss."""
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=16)
    values = divergence(STUDENT, [TEACHER], chunks, Divergence())
    mask = jnp.asarray([True, True, True, True, False, False, True])
    whole = losses.total(values, mask, mask.sum())
    parts = [losses.total(values[s], mask[s], mask.sum()) for s in (slice(0, 4), slice(4, 7))]
    means = [losses.total(values[s], mask[s], mask[s].sum()) for s in (slice(0, 4), slice(4, 7))]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
    assert abs(float(sum(means)) / 2 - float(whole)) > 1e-2


def test_the_loss_does_not_grow_with_the_vocabulary_or_the_batch():
    """`batchmean` over [B, T, V] would multiply it by T."""
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=16)
    twice = [LazyLogits(jnp.tile(of.hidden, (2, 1)), of.table) for of in (STUDENT, TEACHER)]
    once = divergence(STUDENT, [TEACHER], chunks, Divergence())
    again = divergence(twice[0], twice[1:], chunks, Divergence())
    mean, mean_again = (losses.total(x, jnp.ones(len(x), bool), len(x)) for x in (once, again))
    np.testing.assert_allclose(mean, mean_again, rtol=1e-5)


def renormalised_top_k(student, tokens, log_p):
    """The defect: both distributions normalised over the teacher's K tokens."""
    z = jnp.take_along_axis(student @ jnp.eye(student.shape[-1]), tokens, axis=-1)
    log_p = jax.nn.log_softmax(log_p)
    log_q = jax.nn.log_softmax(z)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def test_top_k_without_the_tail_lets_the_student_waste_its_mass():
    """The student's mass outside the K tokens costs nothing when renormalised; with the tail, it
    costs what it must, and the gradient takes it back."""
    p = jnp.asarray([[0.5, 0.3, 0.1, 0.06, 0.04]])
    log_p = jnp.log(p[:, :2])
    tokens = jnp.asarray([[0, 1]])
    wasteful = jnp.log(jnp.asarray([[0.05, 0.03, 0.9, 0.01, 0.01]]))
    chunks = vocabulary_chunks([from_logits(wasteful)])

    def with_tail(z):
        return losses.top_k_tail(from_logits(z), tokens, log_p, chunks).sum()

    def renormalised(z):
        return renormalised_top_k(z, tokens, log_p).sum()

    assert float(renormalised(wasteful)) < 1e-6
    assert float(jnp.abs(jax.grad(renormalised)(wasteful)).max()) < 1e-6
    assert float(with_tail(wasteful)) > 1
    assert float(jax.grad(with_tail)(wasteful)[0, 2]) > 0.5


def test_top_k_with_tail_is_kl_of_the_merged_distributions():
    k = 6
    chunks = vocabulary_chunks([STUDENT, TEACHER], size=16)
    p, q = (formulas.softmax(logits(of)) for of in (TEACHER, STUDENT))
    tokens = np.argsort(-p, axis=-1)[:, :k]

    def merged(x):
        head = np.take_along_axis(x, tokens, -1)
        return np.concatenate([head, 1 - head.sum(-1, keepdims=True)], -1)

    log_p = jnp.asarray(np.log(merged(p)[:, :k]), jnp.float32)
    loss = lambda s: losses.top_k_tail(s, jnp.asarray(tokens), log_p, chunks)  # noqa: E731
    np.testing.assert_allclose(loss(STUDENT), formulas.kl(merged(p), merged(q)), rtol=1e-3)
    np.testing.assert_allclose(loss(TEACHER), 0, atol=1e-4)
    # dz = q - p on the K tokens, q · (1 - p_tail / q_tail) on each of the others.
    mp = merged(p)
    mq = merged(q)
    dz = q * (1 - mp[:, -1:] / mq[:, -1:])
    np.put_along_axis(dz, tokens, np.take_along_axis(q - p, tokens, -1), -1)
    gradient = jax.grad(lambda s: loss(s).sum())(STUDENT)
    np.testing.assert_allclose(gradient.hidden, dz @ STUDENT.table, rtol=2e-3, atol=2e-3)


def test_top_k_of_a_student_that_lost_its_tail_still_has_a_gradient():
    """float32 has 1 - sum q_k = 0 here, whose logarithm gives nothing back."""
    teacher = jnp.asarray([[0.4, 0.3, 0.3]])
    z = jnp.asarray([[30.0, 30.0, 0.0]])
    log_p = jnp.log(teacher[:, :2])
    tokens = jnp.asarray([[0, 1]])
    chunks = vocabulary_chunks([from_logits(z)])

    def loss(z):
        return losses.top_k_tail(from_logits(z), tokens, log_p, chunks).sum()

    np.testing.assert_allclose(jax.grad(loss)(z), formulas.softmax(z) - teacher, atol=1e-5)


def test_sampled_loss_is_unbiased():
    """Over every pair of samples with its probability, its mean gradient is exactly q - p."""
    p = np.array([0.6, 0.3, 0.1])
    student = from_logits([[0.2, -0.4, 1.0]])
    chunks = vocabulary_chunks([student])
    mean = np.zeros(3)
    for one in range(3):
        for two in range(3):
            gradient = jax.grad(lambda s, pair: losses.sampled(s, pair, chunks).sum())(
                student, jnp.asarray([[one, two]])
            )
            mean += p[one] * p[two] * np.asarray(gradient.hidden[0])
    np.testing.assert_allclose(mean, formulas.softmax(student.hidden)[0] - p, atol=1e-6)


@pytest.mark.parametrize("part", ["dense", "sampled", "top_k"])
def test_the_logits_are_never_materialised(part):
    """Neither forward nor backward: the compiled program's temporary memory stays below one
    [N, V] array, of which a plain implementation needs several."""
    n = 2048
    width = 32
    rows = 16384
    shape = jax.ShapeDtypeStruct
    student = LazyLogits(shape((n, width), jnp.float32), shape((rows, width), jnp.float32))
    ids = shape((n, 12), jnp.int32)
    chunks = vocabulary_chunks([student], size=512)

    def loss(student, teacher, ids):
        if part == "sampled":
            return losses.sampled(student, ids, chunks).sum()
        if part == "top_k":
            return losses.top_k_tail(student, ids, jnp.full(ids.shape, -3.0), chunks).sum()
        kind = Divergence("jsd", 0.3)
        values = losses.distillation(student, [teacher], ids[:, 0], chunks, kind=kind, alpha=0.5)
        return values.sum()

    compiled = jax.jit(jax.grad(loss)).lower(student, student, ids).compile()
    logits_bytes = n * rows * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 3


def test_padding_rows_of_either_table_do_not_count():
    padded = LazyLogits(STUDENT.hidden, jnp.concatenate([STUDENT.table, 9 * jnp.ones((5, D))]))
    plain = vocabulary_chunks([STUDENT, TEACHER], size=16)
    cut = vocabulary_chunks([padded, TEACHER], vocabulary=V, size=16)
    expected = divergence(STUDENT, [TEACHER], plain, Divergence())
    np.testing.assert_allclose(
        divergence(padded, [TEACHER], cut, Divergence()), expected, rtol=1e-5
    )


def test_hidden_match():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(N, 4))
    y = rng.normal(size=(N, 3))
    w = rng.normal(size=(4, 3))
    actual = losses.hidden_match(jnp.asarray(x), jnp.asarray(y), jnp.asarray(w))
    np.testing.assert_allclose(actual, ((x @ w - y) ** 2).mean(-1), rtol=1e-5)
    gradient = jax.grad(lambda x: losses.hidden_match(x, jnp.asarray(y), jnp.asarray(w)).sum())
    np.testing.assert_allclose(
        gradient(jnp.asarray(x)), 2 / 3 * (x @ w - y) @ w.T, rtol=1e-4, atol=1e-5
    )


def test_router_match():
    z, t = np.random.default_rng(6).normal(size=(2, N, 8))
    p = formulas.softmax(t)
    q = formulas.softmax(z)
    actual = losses.router_match(jnp.asarray(z), jnp.asarray(t))
    np.testing.assert_allclose(actual, formulas.kl(p, q), rtol=1e-5)
    gradient = jax.grad(lambda z: losses.router_match(z, jnp.asarray(t)).sum())(jnp.asarray(z))
    np.testing.assert_allclose(gradient, q - p, rtol=1e-4, atol=1e-6)


def test_bad_settings_are_one_line():
    other = lazy_logits(1, rows=V + 3)
    chunks = vocabulary_chunks([STUDENT])
    cases = [
        (lambda: vocabulary_chunks([STUDENT, other]), "output tables have .* rows"),
        (lambda: vocabulary_chunks([STUDENT], vocabulary=V + 1), "exceeds a table"),
        (lambda: vocabulary_chunks([STUDENT], temperature=0), "temperature is 0"),
        (lambda: divergence(STUDENT, [], chunks, Divergence()), "at least one teacher"),
        (lambda: divergence(STUDENT, [STUDENT], chunks, Divergence("kl")), "'kl' is unknown"),  # pyright: ignore
        (lambda: Divergence("skew_forward", 0.0).checked(), "needs 0 < mix"),
        (lambda: losses.hidden_match(jnp.ones((2, 3)), jnp.ones((2, 4))), "give a projection"),
        (lambda: losses.router_match(jnp.ones((2, 3)), jnp.ones((2, 4))), "cannot be compared"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(UserError, match="sum to 1"):
        divergence(STUDENT, [STUDENT], chunks, Divergence(), [0.5])
