"Which rival is best and how sure that is: intervals that cover, ties, few items, unknown scores."

import numpy as np
import pytest

from llmft.core import LabError
from llmft.runs.rivals import (
    Measure,
    certainty_words,
    few_items,
    in_bullets,
    paired_difference,
    place_words,
    ranked,
    told,
)

loss = Measure('loss', 'nats', items='documents')
share = Measure('accuracy', lower=False, items='problems', percent=True)


def covered(items, games, draw, **settings):
    "In what share of games the interval holds the true difference, which is zero."
    rng = np.random.default_rng(items)
    found = [paired_difference(draw(rng, items), np.zeros(items), **settings) for _ in range(games)]
    return np.mean([each.low <= 0 <= each.high for each in found]), np.mean([each.clear for each in found])


@pytest.mark.parametrize('items', [8, 30, 100])
def test_the_interval_covers_the_truth(items, monkeypatch):
    monkeypatch.setattr('llmft.runs.rivals._resamples', 1000)
    inside, clear = covered(items, 400, lambda rng, n: rng.normal(0, 1, n))
    assert 0.92 <= inside <= 0.985, inside  # 400 games: 0.95 within three standard errors
    assert clear <= 0.08, clear


def test_skewed_scores_and_medians_are_not_called_clear_too_often(monkeypatch):
    monkeypatch.setattr('llmft.runs.rivals._resamples', 500)
    inside, _ = covered(40, 300, lambda rng, n: rng.exponential(1, n) - 1)
    assert inside >= 0.88, inside
    inside, _ = covered(40, 300, lambda rng, n: rng.normal(0, 1, n), median=True)
    assert inside >= 0.92, inside


def test_solved_problems_are_called_clear_no_more_often_than_mcnemar_allows(monkeypatch):
    monkeypatch.setattr('llmft.runs.rivals._resamples', 300)
    rng = np.random.default_rng(0)
    pairs = [(rng.random(60) < 0.1, rng.random(60) < 0.1) for _ in range(400)]
    assert np.mean([paired_difference(*pair).clear for pair in pairs]) <= 0.05
    assert not paired_difference(np.arange(100) < 45, np.arange(100) < 40).clear  # five to none: p = 0.06
    sure = paired_difference(np.arange(60) < 30, np.arange(60) < 22)
    assert sure.clear and sure.items == 60


def test_pairing_finds_what_spread_between_items_hides():
    rng = np.random.default_rng(1)
    hard_N = rng.normal(3, 1, 50)
    easier_N = hard_N - 0.02 + rng.normal(0, 0.01, 50)
    assert paired_difference(easier_N, hard_N).clear
    assert not paired_difference(easier_N, rng.permutation(hard_N)).clear


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(2)
    first_N, second_N = rng.normal(size=(2, 30))
    assert paired_difference(first_N, second_N) == paired_difference(first_N, second_N)
    assert paired_difference(first_N, second_N).low != paired_difference(first_N, second_N, seed=1).low


def test_many_items_are_resampled_in_pieces():
    rng = np.random.default_rng(3)
    found = paired_difference(rng.normal(0.1, 1, 5_000), np.zeros(5_000))
    assert found.clear and abs((found.high - found.low) / (2 * 1.96 / 5_000**0.5) - 1) < 0.1


def test_weights_make_the_mean_over_documents_that_over_tokens():
    tokens_N = np.array([100.0, 10.0, 1.0])
    sums_N = np.array([200.0, 50.0, 9.0])
    found = ranked(dict(own=sums_N / tokens_N), loss, weights_N=tokens_N)
    assert np.isclose(found.values['own'], sums_N.sum() / tokens_N.sum())


@pytest.mark.parametrize('items', [1, 2, 5])
def test_a_handful_of_items_is_never_clear(items):
    ranking = ranked(dict(ours=np.arange(items) + 0.0, base=np.arange(items) + 5.0), loss)
    assert ranking.tied == ['ours', 'base']
    assert place_words(ranking).startswith('Too few documents to say whether')
    assert told(ranking).count('no interval') == (items == 1)
    assert ('95% interval' in certainty_words(ranking)) == (items > 1)


def test_few_items_may_be_clear_and_many_may_tie():
    rng = np.random.default_rng(4)
    few_N = rng.normal(3, 1, few_items - 10)
    assert 'strongest rival' in place_words(ranked(dict(a=few_N, b=few_N + 0.1), loss))
    many_N = rng.normal(3, 1, few_items)
    noisy_N = many_N + rng.normal(0, 1, few_items)
    tie = ranked(dict(a=many_N, b=noisy_N), loss)
    assert ' tie: ' in place_words(tie) and len(tie.tied) == 2


def test_the_same_scores_tie():
    scores_N = np.linspace(1, 2, 50)
    assert ranked(dict(a=scores_N, b=scores_N.copy()), loss).tied == ['a', 'b']


@pytest.mark.parametrize('lower', [True, False])
def test_the_strongest_rival_is_named_wherever_it_stands(lower):
    rng = np.random.default_rng(5)
    names = ['own', 'weak', 'strong', 'middling']
    sign = 1 if lower else -1
    steps = dict(zip(names, (0.2, 0.9, 0.0, 0.5), strict=True))
    hard_N = rng.normal(3, 0.5, 40)
    scores = {name: hard_N + sign * step for name, step in steps.items()}
    measure = Measure('score', lower=lower, items='documents')
    assert ranked(scores, measure).best == 'strong'
    assert 'own loses to strong, the strongest rival' in place_words(ranked(scores, measure), 'own')
    del scores['strong']
    assert 'for middling, the strongest rival' in place_words(ranked(scores, measure), 'own')


def test_all_that_cannot_be_told_from_the_best_are_named():
    rng = np.random.default_rng(6)
    hard_N = rng.normal(3, 1, 60)
    scores = {name: hard_N + rng.normal(0, 0.2, 60) for name in ('a', 'b', 'c')} | dict(far=hard_N + 9, lost=None)
    words = told(ranked(scores, loss))
    assert 'far' not in words and all(name in words for name in ('a', 'b', 'c')) and 'Unknown: lost.' in words


def test_single_measurements_rank_beyond_their_tolerance_only():
    speed = Measure('throughput', 'tokens/s', lower=False, tolerance=0.02)
    assert place_words(ranked(dict(fp32=652.2, fp16=651.0), speed)).startswith('In throughput, fp32 and fp16 tie: ')
    assert 'for fp16, the strongest rival' in place_words(ranked(dict(fp32=652.2, fp16=600.0), speed))
    assert ranked(dict(a=np.ones(3), b=5.0), loss).differences['b'].items == 0  # one number cannot be paired


def test_nan_and_nothing_are_refused():
    bad = [dict(a=[1.0, np.nan], b=[1.0, 2.0]), dict(a=np.nan, b=1.0), dict(a=np.inf), dict(a=None), dict()]
    bad += [dict(a=[], b=[]), dict(a=[1.0], b=[1.0, 2.0]), dict(a=[[1.0]], b=[[1.0]])]
    for scores in bad:
        with pytest.raises(LabError) as caught:
            ranked(scores, loss)
        assert '\n' not in str(caught.value) and ':' in str(caught.value)


def test_a_verdict_has_three_bullets_at_most():
    assert in_bullets('Answer.', '', None, 'Next:\nmore.') == '- Answer.\n- Next: more.'
    with pytest.raises(LabError, match='at most 3 bullets'):
        in_bullets(*'abcd')
    assert '60.0% against 50.0%' in place_words(ranked(dict(a=0.6, b=0.5), share))
