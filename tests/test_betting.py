"The bounds that use the spread of the losses, beside implementations of their own and games with a known truth."

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from llmft.bounds.betting import bernstein_bound, betting_bound, coverage, freedman_bound, mean_limit, variance_limit
from llmft.bounds.bounds import lowest_loss, smoothing_width, subsampling_bound

FORMS = ('hoeffding', 'kl', 'bernstein', 'betting', 'freedman')
WIDTH, LOWEST = smoothing_width(0.1, 16), lowest_loss(0.1, 16)


def losses(seed, m, spread=0.4):
    "Losses of documents in bits, as a small model has them."
    return np.clip(np.random.default_rng(seed).normal(3, spread, m), LOWEST, LOWEST + WIDTH)


# ---- an implementation of its own: one draw after another, plain floats, roots by Brent's method


def guesses(values):
    "Before each value: (mean, variance) so far, with 1/2 and 1/50 as the first of each."
    total, squares = 0.5, 0.02
    for count, value in enumerate(values, 1):
        mean = total / count
        yield mean, squares / count
        total, squares = total + value, squares + (value - mean) ** 2


def richest(f, left_mean, floor, stakes):
    "The largest logarithm of the capital of a game against the mean that `left_mean(t)` says is left."
    capital, best = 0.0, -math.inf
    for t, (value, stake) in enumerate(zip(f, stakes, strict=True)):
        mean = left_mean(t)
        if mean < floor - 1e-9:
            return math.inf
        stake = min(stake, 0.99 / max(mean - floor, 1e-9))
        capital += math.log(1 + stake * (value - mean))
        best = max(best, capital)
    return best


def plain_stakes(values, nats):
    return [math.sqrt(2 * nats / (len(values) * variance)) for _, variance in guesses(values)]


def root(won, low):
    "Where a won game begins, above `low`."
    return brentq(won, low, 1 - 1e-9, xtol=1e-12) if won(1 - 1e-9) > 0 else 1.0


def plain_mean_limit(u, n, nats):
    stakes = plain_stakes(u, nats)

    def won(mean):
        def left(t):
            return -(n * mean - sum(u[:t])) / (n - t)

        return min(richest([-x for x in u], left, -1, stakes), 1e6) - nats

    return root(won, sum(u) / len(u))


def plain_variance_limit(u, n, nats):
    centres = [mean for mean, _ in guesses(u)]
    misses = [(x - c) ** 2 for x, c in zip(u, centres, strict=True)]
    stakes = plain_stakes(misses, nats)

    def won(variance):
        def left(t):
            return -((n - 1) * variance - sum((x - centres[t]) ** 2 for x in u[:t])) / (n - t)

        return min(richest([-y for y in misses], left, -1, stakes), 1e6) - nats

    return root(won, 0)


def nats_of(K, n, m, delta, S):
    r = m / (m + n)
    return math.log(S / ((1 - r) * delta)), K * math.log(2) + math.log(1 / (r * delta))


def plain_bernstein(u, K, n, delta, S):
    sample, complexity = nats_of(K, n, len(u), delta, S)
    mean = plain_mean_limit(u, n, sample + math.log(2))
    variance = plain_variance_limit(u, n, sample + math.log(2))
    nats = complexity + math.log(2)
    return mean + math.sqrt(2 * variance * nats / n) + 7 * nats / (3 * (n - 1))


def plain_shares(nats, n):
    return [min(0.99, factor * math.sqrt(2 * nats / n) / 0.2) for factor in (0.25, 0.5, 1, 2)]


def plain_one_step(u, nats):
    "The mean at which the average capital of four gamblers is what is allowed."

    def won(R):
        each = [sum(math.log(1 + b * (R - x) / (1 - R)) for x in u) for b in plain_shares(nats, len(u))]
        largest = max(each)
        return largest + math.log(sum(math.exp(one - largest) for one in each) / 4) - nats

    return root(won, sum(u) / len(u))


def plain_betting(u, K, n, delta, S, draws=None):
    m = len(u)
    if m == n:
        return plain_one_step(u, K * math.log(2) + math.log(1 / delta))
    sample, complexity = nats_of(K, n, m, delta, S)
    alone = complexity + math.log(draws or S)
    sample, complexity = sample + math.log(4), complexity + math.log(4)
    if alone / m <= sample / m + complexity / n:
        return plain_one_step(u, alone)
    return plain_two_steps(u, n, sample, complexity)


def plain_two_steps(u, n, sample, complexity):
    before = [mean for mean, _ in guesses(u)]
    limits = []
    for b in plain_shares(complexity, n):
        stakes = [stake * (1 - mean) / b for stake, mean in zip(plain_stakes(u, sample), before, strict=True)]

        def won(R, b=b, stakes=stakes):
            f = [math.log(1 + b * (R - x) / (1 - R)) for x in u]
            return min(richest(f, lambda t: (complexity - sum(f[:t])) / (n - t), math.log(1 - b), stakes), 1e6) - sample

        limits.append(root(won, sum(u) / len(u)))
    return min(limits)


def plain_freedman(u, K, n, delta, S):
    sample, complexity = (nats + math.log(32) for nats in nats_of(K, n, len(u), delta, S))
    Y = (math.floor(8 * sum(u) / len(u)) + 0.5) / 8
    limits = []
    for s in plain_shares(complexity, n):

        def h(x, s=s):
            y = s * (Y - x) / (1 - Y)
            return x + (1 - Y) / s * (y - math.log(1 + y))

        low, high = h(0), h(1)
        mean = plain_mean_limit([(h(x) - low) / (high - low) for x in u], n, sample)
        limits.append(low + (high - low) * mean + (1 - Y) / s * complexity / n)
    return min(limits)


CASES = [(40, 2, 100, 0.05, 1), (60, 30, 5000, 0.01, 8), (120, 200, 20_000, 0.05, 240)]


@pytest.mark.parametrize('m, K, n, delta, S', CASES)
@pytest.mark.parametrize('ours, plain', [(bernstein_bound, plain_bernstein), (betting_bound, plain_betting),
                                         (freedman_bound, plain_freedman)])  # fmt: skip
def test_each_form_is_what_an_implementation_of_its_own_says(ours, plain, m, K, n, delta, S):
    x = losses(m, m)
    u = ((x - LOWEST) / WIDTH).tolist()
    expected = LOWEST + WIDTH * min(plain(u, K, n, delta, S), 1)
    assert float(ours(x, K, n, WIDTH, delta, S, LOWEST)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('m, K, n, S, draws, steps', [(200, 5, 1000, 30, 1, 1), (200, 5, 1000, 2**40, None, 2),
                                                      (200, 500, 1000, 30, 1, 2), (190, 300, 200, 2**40, 2**40, 2),
                                                      (50, 20, 50, 7, None, 1)])  # fmt: skip
def test_betting_takes_one_step_where_it_costs_less(m, K, n, S, draws, steps):
    n = max(n, m)
    x = losses(m, m)
    u = ((x - LOWEST) / WIDTH).tolist()
    found = float(betting_bound(x, K, n, WIDTH, 0.05, S, LOWEST, draws))
    assert found == pytest.approx(LOWEST + WIDTH * plain_betting(u, K, n, 0.05, S, draws), abs=1e-6)
    sample, complexity = nats_of(K, n, m, 0.05, S)
    one = LOWEST + WIDTH * plain_one_step(u, complexity + math.log(draws or S) if m < n else K * math.log(2) + math.log(20))
    assert (found == pytest.approx(one, abs=1e-6)) == (steps == 1)


def test_each_sample_that_may_have_been_drawn_is_paid_for():
    x = losses(4, 200)
    bounds = [float(betting_bound(x, 5, 1000, WIDTH, 0.05, 30, LOWEST, draws)) for draws in (1, 2, 30, None)]
    assert bounds[0] < bounds[1] < bounds[2] == bounds[3]


@pytest.mark.parametrize('n', [45, 60, 10**6])
def test_limits_of_mean_and_variance_are_what_an_implementation_of_its_own_says(n):
    u = (losses(7, 40) - LOWEST) / WIDTH
    assert float(mean_limit(u, n, 3.0)) == pytest.approx(plain_mean_limit(u.tolist(), n, 3.0), abs=1e-7)
    assert float(variance_limit(u, n, 3.0)) == pytest.approx(plain_variance_limit(u.tolist(), n, 3.0), abs=1e-7)


@pytest.mark.parametrize('limit, truth', [(mean_limit, np.mean), (variance_limit, lambda u: np.var(u, ddof=1))])
@pytest.mark.parametrize('m', [20, 60, 90])
@pytest.mark.parametrize('spread', [0.05, 0.4])
def test_limits_hold_for_samples_that_are_not_put_back(limit, truth, m, spread):
    rng = np.random.default_rng(m)
    whole = np.clip(rng.normal(0.4, spread, 100), 0, 1)
    samples = np.stack([rng.permutation(whole)[:m] for _ in range(1000)])
    limits = limit(samples, 100, math.log(10))
    assert (limits >= truth(whole) - 1e-9).mean() >= 0.9
    assert (limits[:50].mean() < limit(samples[:50, : m // 2], 100, math.log(10)).mean())


# ---- properties

situation = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 1000),
        m=st.integers(2, 80),
        more=st.integers(1, 10_000),
        bits=st.floats(0, 3000),
        delta=st.floats(1e-6, 0.5),
        choices=st.integers(1, 2**40),
        spread=st.floats(0, 3),
    )
)
NEW = (bernstein_bound, betting_bound, freedman_bound)


@settings(max_examples=40, deadline=None)
@given(situation, st.floats(1, 5))
def test_new_forms_grow_with_what_is_paid_and_stay_in_their_interval(given, factor):
    x = losses(given['seed'], given['m'], given['spread'])
    n = given['m'] + given['more']
    for form in NEW:
        here = float(form(x, given['bits'], n, WIDTH, given['delta'], given['choices'], LOWEST))
        assert x.mean() - 1e-9 <= here <= LOWEST + WIDTH + 1e-9
        if form is bernstein_bound:  # the shares of the others depend on K, so a little more may cost a little less
            more = float(form(x, given['bits'] * factor, n, WIDTH, given['delta'], given['choices'], LOWEST))
            assert here <= more + 1e-6


@settings(max_examples=40, deadline=None)
@given(situation)
def test_a_larger_loss_never_lowers_the_betting_bound_of_all_documents(given):
    x = losses(given['seed'], given['m'], given['spread'])
    worse = x.copy()
    worse[np.argmin(worse)] = min(worse.min() + 0.5, LOWEST + WIDTH)
    bounds = [float(betting_bound(y, given['bits'], len(y), WIDTH, lowest=LOWEST)) for y in (x, worse)]
    assert bounds[0] <= bounds[1] + 1e-9


@pytest.mark.parametrize('n, m, K, S', [(1000, 200, 5, 30), (500_000, 5000, 2400, 240), (30_000, 30_000, 500, 1)])
@pytest.mark.parametrize('kind', ['documents', 'coins'])
def test_betting_is_never_much_worse_than_hoeffding(n, m, K, S, kind):
    x = losses(1, m) if kind == 'documents' else LOWEST + WIDTH * (np.random.default_rng(1).random(m) < 0.5)
    risk = x.mean()
    ours = float(betting_bound(x, K, n, WIDTH, 0.05, S, LOWEST)) - risk
    hoeffding = subsampling_bound(risk, K, n, m, WIDTH, 0.05, S) - risk
    assert ours < (0.6 if kind == 'documents' else 1.35) * hoeffding


def test_a_bound_from_ten_thousand_of_half_a_million_takes_seconds():
    import time

    x = losses(3, 10_000)
    began = time.process_time()
    for _ in range(8):
        betting_bound(x, 2400, 500_000, WIDTH, 0.01, 2**45, LOWEST)
        bernstein_bound(x, 2400, 500_000, WIDTH, 0.01, 2**45, LOWEST)
    assert time.process_time() - began < 8


# ---- games


@pytest.mark.parametrize('kind', ['documents', 'coins', 'rare'])
def test_every_form_holds_in_a_thousand_games(kind):
    rng = np.random.default_rng(5)
    means = np.linspace(0.4, 0.44, 10)[:, None]
    population = dict(
        documents=lambda: np.clip(rng.normal(means, 0.06, (10, 5000)), 0, 1),
        coins=lambda: (rng.random((10, 5000)) < means).astype(float),
        rare=lambda: np.where(rng.random((10, 5000)) < 0.01, 1.0, 0.02 * rng.random((10, 5000))),
    )[kind]()
    played = coverage(population, 1.0, 0.0, 300, 100, games=1000)
    assert played['games'] == 1000
    assert all(played[form] >= 0.95 for form in FORMS), played
    if kind == 'documents':
        assert played['betting_slack'] < 0.08 < played['hoeffding_slack']


@pytest.mark.parametrize('weight, most', [(0.25, 0.25), (0.1, 0.3), (0.05, 0.35)])
def test_the_slack_of_documents_is_below_the_aim(weight, most):
    "Losses that spread by 0.3 bits, as those of the small study; kl leaves more than a bit."
    width, lowest = smoothing_width(weight, 16), lowest_loss(weight, 16)
    rng = np.random.default_rng(2)
    population = np.clip(rng.normal(2.6, 0.05, (30, 1)) + rng.normal(0, 0.3, (30, 4000)), lowest, lowest + width)
    played = coverage(population, width, lowest, 1000, 200, games=200)
    assert played['betting'] >= 0.95 and played['betting_slack'] <= most < 1 < played['kl_slack']
