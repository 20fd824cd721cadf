"""Properties of the series, their text, and the forecasts' scores that a notebook cannot hold."""

import time

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data.dynamics import saturating_growth, saturating_predator_prey, solve_logs
from llmft.models.fetch import fetched
from llmft.studies.forecasting.baselines import (
    baselines,
    ceiling,
    choose_regression,
    context_parroting,
    informed,
    linear_autoregression,
    refit_closed,
    refit_saturating,
    statistical_here,
    uninformed,
)
from llmft.studies.forecasting.codec import decode, encode, probe
from llmft.studies.forecasting.metrics import (
    crps,
    point_errors,
    point_forecast,
    scaled_scores,
    spread_scores,
    step_scores,
)
from llmft.studies.forecasting.prepared import prepare_series, read_split, series_documents, series_windows, windows
from llmft.studies.forecasting.series import round_series, scale_factors, simulate, split_rows, systems, unscale
from llmft.studies.forecasting.sources import load_series


def plain(values, precision):
    "The text of one trajectory by Python's own formatting."
    return ';'.join(','.join(f'{value:.{precision}f}' for value in step) for step in values)


# ---- the codec


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.floats(0, 3e4, width=32), min_size=4, max_size=24).filter(lambda row: len(row) % 2 == 0),
)
def test_encoding_is_pythons_own_formatting_and_comes_back(precision, row):
    rounded = round_series(np.array(row, np.float32).reshape(1, -1, 2), np.ones((1, 2), np.float32), precision)
    (text,) = encode(rounded, precision)
    assert text == plain(rounded[0], precision)
    back = decode([text], rounded.shape[1], precision=precision)
    assert back.malformed_N.tolist() == [0]
    assert back.values_NTV[0].tolist() == [[float(f'{value:.{precision}f}') for value in step] for step in rounded[0]]


@pytest.mark.parametrize('precision', [2, 3])
def test_reference_lines_follow_the_exact_float_recipe(precision):
    "Every line of the reference scaling, computed one number at a time in the order of the specification."
    values = np.random.default_rng(4).uniform(0.1, 3, (600, 100, 2)).astype(np.float32)
    lines = encode(round_series(values, scale_factors(values, 'per_trajectory'), precision), precision)
    expected, other = [], 0
    early = 0
    for row in values:
        columns, double = [], []
        for v in range(2):
            x = row[:, v]
            s = np.float32(10.0 / np.float64(np.percentile(x.astype(np.float64), 99)))
            columns.append(x * s)
            double.append(np.round(x.astype(np.float64) * (10.0 / np.percentile(x.astype(np.float64), 99)), precision))
        expected.append(plain(np.stack(columns, 1), precision))
        other += plain(np.stack(double, 1), precision) != expected[-1]
        early += plain(np.round(np.stack(columns, 1), precision), precision) != expected[-1]
    assert lines == expected
    assert other, 'computing in float64 gives the same lines: this test proves nothing'
    assert early, 'rounding in float32 gives the same lines: this test proves nothing'


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 3), st.integers(0, 60_000), st.floats(0.0625, 40, width=32), st.integers(-3, 3))
def test_products_near_half_a_unit_round_by_their_exact_value(precision, unit, factor, steps_away):
    "Float32 products at, and a few floats beside, half a unit of the last decimal."
    half = (unit + 0.5) / 10**precision
    value = np.float32(half / np.float64(np.float32(factor)))
    for _ in range(abs(steps_away)):
        value = np.nextafter(value, np.float32(np.inf if steps_away > 0 else 0))
    product = np.float32(value) * np.float32(factor)
    rounded = round_series(np.full((1, 1, 1), value), np.full((1, 1), factor, np.float32), precision)
    exact = f'{product:.{precision}f}'
    assert encode(rounded, precision) == [exact] == encode(np.full((1, 1, 1), product), precision)
    assert rounded.item() == float(exact)


def test_the_published_split_is_that_of_the_older_generator():
    rows = split_rows(1000)
    order = np.random.RandomState(42).permutation(1000)
    assert [len(part) for part in rows.values()] == [700, 150, 150]
    assert np.concatenate(list(rows.values())).tolist() == order.tolist()
    assert rows['train'][:4].tolist() == [521, 737, 740, 660]


def test_the_equations_of_the_teaching_set_and_its_solver_give_the_known_values():
    rates, at = (0.2, 10, 0.35, 0.1, 0.5, 0.2), [1, 10, 50, 99]
    exact = [(0.780550, 0.888692), (1.511216, 0.274405), (2.042211, 0.532963), (1.222035, 0.379331)]
    loose = [(0.781647, 0.888880), (1.510726, 0.275539), (2.039303, 0.529307), (1.212040, 0.377194)]
    solved = saturating_predator_prey([rates], [(1.0, 1.0)], np.linspace(0, 200, 100))[0]
    assert np.abs(solved[at] - loose).max() < 6e-7
    fine = solve_logs(np.array([rates]).T, np.zeros((1, 2)), 100, 200 / 99, 32, saturating_growth)[0]
    assert np.abs(fine[at] - exact).max() < 6e-7


def test_a_simulation_is_drawn_as_the_teaching_set_seems_to_be():
    series = simulate(60, seed=4)
    assert series.values_NTV.dtype == np.float32 and series.values_NTV.shape == (60, 100, 2)
    assert (series.times_T == np.linspace(0, 200, 100)).all()
    assert (abs(series.values_NTV[:, 0] - 1) <= 0.2).all() and (series.values_NTV > 0).all()
    closed = simulate(60, system='lotka_volterra', seed=4)
    swings = [np.ptp(each.values_NTV[:, 50:], axis=1) / np.ptp(each.values_NTV[:, :50], axis=1) for each in (series, closed)]
    assert (swings[0] < 0.9).mean() > 0.3 > 0.02 > (swings[1] < 0.9).mean()


def test_a_hundred_thousand_trajectories_take_seconds():
    values = np.tile(round_series(simulate(100, seed=1).values_NTV, np.ones((100, 2), np.float32)), (20, 1, 1))
    started = time.process_time()
    texts = encode(values)
    back = decode(texts, 100, precision=2)
    seconds = (time.process_time() - started) * 100_000 / len(values)
    assert back.success_rate == 1 and seconds < 30, f'{seconds:.0f} s of processor time for 100,000 trajectories'


@pytest.mark.parametrize(
    'text, precision, malformed',
    [
        ('1.00,2.00;3.00,4.00', 2, 0),
        ('1.00,2.00', 2, 1),
        ('', 2, 2),
        ('1.00,2.00;3.00', 2, 1),
        ('1.00,2.00;3.00,4.00,5.00', 2, 1),
        ('1.00,2.00;3.00,4.0', 2, 1),
        ('1.00,2.00;3.00,', 2, 1),
        ('1.00,2.00;3.00,4.00;9', 2, 0),
        ('1.00,2.00;-3.00,4.00', 2, 1),
        ('1.00,2.00;nan,4.00', 2, 1),
        ('1.00,2.00;1e1,4.00', 2, 1),
        ('1.00,2.00;1_0.00,4.00', 2, 1),
        ('1.00,2.00; 3.00,4.00', 2, 1),
        ('1.00,2.00;3.0.0,4.00', 2, 1),
        ('1.00,2.00;.00,4.00', 2, 1),
        ('1.00,2.00;٣.00,4.00', 2, 1),
        ('1,2;3.5,4', None, 0),
        ('1,2;3.,4', None, 1),
        ('1.00,2.00;' + '9' * 30 + '.00,1.00', 2, 1),
    ],
)
def test_decoding_is_strict(text, precision, malformed):
    found = decode([text], 2, precision=precision)
    assert found.malformed_N.tolist() == [malformed] and int(np.isnan(found.values_NTV[0, :, 0]).sum()) == malformed
    assert found.success_rate == float(malformed == 0)


# ---- scaling


def test_context_scaling_does_not_see_the_future():
    values = simulate(30, seed=2).values_NTV
    other = values.copy()
    other[:, 50:] = other[:, :49:-1] * 7
    assert (scale_factors(values, 'context', context=50) == scale_factors(other, 'context', context=50)).all()
    assert (scale_factors(values, 'per_trajectory') != scale_factors(other, 'per_trajectory')).any()
    rows = split_rows(30)
    test_changed = values.copy()
    test_changed[rows['test']] *= 5
    assert (
        scale_factors(values, 'global', train_rows=rows['train'])
        == scale_factors(test_changed, 'global', train_rows=rows['train'])
    ).all()
    assert len(np.unique(scale_factors(values, 'global', train_rows=rows['train']), axis=0)) == 1


def test_unscaling_undoes_scaling_within_the_rounding():
    values = simulate(20, seed=2).values_NTV
    for scaling in ('context', 'per_trajectory', 'global'):
        factors = scale_factors(values, scaling, train_rows=np.arange(10))
        back = unscale(decode(encode(round_series(values, factors, 3), 3), 100, precision=3).values_NTV, factors)
        assert (np.abs(back - values) <= 0.00051 / factors[:, None].astype(float) + 1e-5 * values).all()


# ---- tokenizers


def byte_level(split, merges):
    "A small byte-level BPE with the given rule for cutting and merges of digits, as real families have them."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in merges:
        vocabulary.setdefault(a + b, len(vocabulary))
    vocabulary['<|end|>'] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token='<|end|>', pad_token='<|end|>', clean_up_tokenization_spaces=False
    )


spaced = [('Ġ', c) for c in '0123456789,.;']
pairs = [(a, b) for a in '0123456789' for b in '0123456789']
threes = [(a + b, c) for a, b in pairs for c in '0123456789']
families = dict(
    qwen2=lambda: byte_level(r'\p{N}|[^\p{N}\s]+|\s', []),  # one digit at a time
    llama3=lambda: byte_level(
        r'\p{N}{1,3}| ?[^\s\p{N}]+|\s+', pairs + threes + spaced[10:]
    ),  # up to three digits, never with the space
    gpt2=lambda: byte_level(r' ?\p{N}+| ?[^\s\p{N}]+|\s+', spaced + pairs + [('.', '.'), (',', '.')]),
)  # any number of digits, with the space


@pytest.mark.parametrize(
    'family, is_spaced, per_character', [('qwen2', False, True), ('llama3', False, False), ('gpt2', True, True)]
)
def test_probe_chooses_what_comes_back(family, is_spaced, per_character):
    tokenizer = families[family]()
    way = probe(tokenizer)
    assert (way.spaced, way.per_character) == (is_spaced, per_character)
    rng = np.random.default_rng(0)
    for precision in (2, 3):
        values = np.round(rng.uniform(0, 130, (40, 6, 2)).astype(np.float32), precision)
        texts = encode(values, precision)
        written = [
            way.read(tokenizer.decode(ids))
            for ids in tokenizer([way.write(text) for text in texts], add_special_tokens=False)['input_ids']
        ]
        back = decode(written, 6, precision=precision)
        assert back.malformed_N.sum() == 0 and np.allclose(back.values_NTV, values, atol=10**-precision / 10)


def test_a_tokenizer_that_loses_numbers_is_refused():
    tokenizer = families['qwen2']()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace('7', '1')
    with pytest.raises(LabError, match='does not give numbers back'):
        probe(tokenizer)


# ---- bad input, one clear line each


def write_h5(path, **arrays):
    with h5py.File(path, 'w') as file:
        for name, value in arrays.items():
            file[name] = value
    return str(path)


def test_bad_files_are_refused_by_name(tmp_path):
    good, times = simulate(6, 20, seed=1).values_NTV, np.arange(20.0)
    assert len(load_series(write_h5(tmp_path / 'good.h5', trajectories=good, time=times))) == 6
    (tmp_path / 'text.h5').write_text('no')
    broken = good.copy()
    broken[3, 4, 0] = np.nan
    cases = {
        'there is no file': str(tmp_path / 'absent.h5'),
        'is no HDF5 file': str(tmp_path / 'text.h5'),
        "has no 'trajectories'": write_h5(tmp_path / 'a.h5', trajectory=good, time=times),
        "has no 'time'": write_h5(tmp_path / 'b.h5', trajectories=good),
        'do not belong together': write_h5(tmp_path / 'c.h5', trajectories=good[:, :, 0], time=times),
        'belong together': write_h5(tmp_path / 'd.h5', trajectories=good, time=times[:5]),
        "series '3' has no value at step 4": write_h5(tmp_path / 'e.h5', trajectories=broken, time=times),
    }
    for message, path in cases.items():
        with pytest.raises(LabError, match=message) as error:
            load_series(path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(alpha=0.0), 'alpha is 0'),
        (dict(alpha=-1.0), 'alpha is -1'),
        (dict(alpha=float('nan')), 'alpha is nan'),
        (dict(precision=0), 'precision is 0'),
        (dict(precision=9), 'precision is 9'),
        (dict(scaling='contxt'), "did you mean 'context'"),
        (dict(context=101), 'context is 101'),
        (dict(simulate_count=2), 'split empty'),
        (dict(system='lotka_voltera'), "did you mean 'lotka_volterra'"),
        (dict(step_time=-1.0), 'a time above 0'),
        (dict(simulate_count=0), 'at least 1'),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(LabError, match=message):
        prepare_series(tmp_path, **dict(dict(simulate_count=20, seed=1), **change))
    assert not list(tmp_path.iterdir())


def test_files_and_metadata(tmp_path):
    series, rows, factors, metadata = prepare_series(tmp_path, simulate_count=40, precision=3, seed=1)
    assert {path.name for path in tmp_path.iterdir()} == {
        'train_texts.txt',
        'val_texts.txt',
        'test_texts.txt',
        'factors.npz',
        'metadata.json',
    }
    assert metadata['sizes'] == dict(train=28, valid=6, test=6) and (
        metadata['precision'],
        metadata['alpha'],
        metadata['split_seed'],
        metadata['seed'],
    ) == (3, 10.0, 42, 1)
    order = np.random.RandomState(42).permutation(40)
    lines = (tmp_path / 'val_texts.txt').read_text().splitlines()
    assert lines == encode(round_series(series.values_NTV[order[28:34]], factors[order[28:34]], 3), 3)
    part = read_split(tmp_path, 'valid')
    assert part.texts == lines and (part.factors_NV == factors[order[28:34]]).all()
    (tmp_path / 'val_texts.txt').write_text('\n'.join([*lines[:2], lines[2][:-1], *lines[3:]]))
    with pytest.raises(LabError, match='val_texts.txt was changed'):
        read_split(tmp_path, 'valid')


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_windows_stay_inside_their_trajectory_and_cover_it(lengths, length, stride, keep_tail):
    from llmft.data.tokens import Examples

    ends = np.cumsum(lengths)
    documents = Examples(np.arange(ends[-1]).astype(np.uint16), ends - lengths, ends)
    stride = min(stride, length)
    try:
        pieces = windows(documents, length, stride, keep_tail)
    except LabError:
        assert not keep_tail and max(lengths) <= length
        return
    owner = np.searchsorted(ends, pieces.starts, side='right')
    assert (owner == np.searchsorted(ends, pieces.ends - 1, side='right')).all() and pieces.slots.max() <= length
    if keep_tail:
        seen = {token for i in range(len(pieces)) for token in pieces[i].tolist()[1:]}
        assert seen == {
            token
            for start, end in zip(documents.starts, documents.ends, strict=True)
            for token in range(start + 1, end)
        }
    else:
        assert (pieces.slots == length).all()


@pytest.mark.parametrize('model', ['base', 'smollm2'])
def test_the_loss_begins_where_the_prompt_of_a_forecast_ends(tmp_path, model):
    from llmft.data.tokens import load_tokenizer
    from llmft.studies.forecasting.prepared import prompt_ids

    if model == 'smollm2' and fetched('smollm2') is None:
        pytest.skip('SmolLM2 is not on this machine: llmft fetch smollm2')
    tokenizer = load_tokenizer(model)
    prepare_series(tmp_path, simulate_count=20, steps=30, context=20, seed=2)
    documents = series_documents(tmp_path, 'train', tokenizer, loss_from=20)
    prompts = prompt_ids(tokenizer, probe(tokenizer, 2), read_split(tmp_path, 'train').texts, 20)
    for prompt, start, end in zip(prompts, documents.starts, documents.ends, strict=True):
        assert documents.ids[start : start + len(prompt)].tolist() == prompt
        assert documents.loss[start:end].tolist() == [False] * len(prompt) + [True] * (end - start - len(prompt))


def test_windows_without_a_loss_are_left_out(tmp_path):
    from llmft.data.tokens import load_tokenizer

    tokenizer = load_tokenizer('base')
    prepare_series(tmp_path, simulate_count=20, steps=30, context=20, seed=2)
    every, _, lengths = series_windows(tmp_path, tokenizer, 64)
    assert every.slots.max() == 64 < lengths.min(), 'of the trajectories, before they are cut into windows'
    late, watched, _ = series_windows(tmp_path, tokenizer, 64, loss_from=20)
    assert 0 < len(late) < len(every) and (late.supervised() > 0).all() and (watched.supervised() > 0).all()
    with pytest.raises(LabError, match='loss_from is 30 and no trajectory has more steps'):
        series_windows(tmp_path, tokenizer, 64, loss_from=30)


# ---- scores and baselines


def test_scores_count_malformed_forecasts_and_never_repair():
    truth = np.ones((3, 4, 2))
    samples = np.repeat(truth[:, None], 5, 1) + 0.5
    samples[1, :, 2] = np.nan
    samples[2, 0, 1] = np.nan
    found = point_errors(point_forecast(samples), truth) | spread_scores(samples, truth)
    assert found['trajectories'] == 2 and found['mae'] == 0.5 and found['crps'] == 0.5 and found['r2'] is None
    assert point_errors(point_forecast(samples[1:2]), truth[1:2])['mae'] is None


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_crps_is_the_integral_of_squared_differences(count, seed):
    rng = np.random.default_rng(seed)
    samples, truth = rng.normal(size=(1, count, 1, 1)), rng.normal(size=(1, 1, 1))
    at = np.linspace(-8, 8, 160_001)
    below = (samples[0, :, 0, 0][:, None] <= at).mean(0)
    integral = ((below - (truth.item() <= at)) ** 2).sum() * (at[1] - at[0])
    assert abs(crps(samples, truth).item() - integral) < 2e-3


def rounded_and_split(count, seed, **settings):
    "Given and true steps as they stand in the texts, and the time between two."
    series = simulate(count, seed=seed, **settings)
    scaled = round_series(series.values_NTV, scale_factors(series.values_NTV, 'per_trajectory'))
    return scaled[:, :50], scaled[:, 50:], series.times_T[1]


@pytest.mark.parametrize('system', [*systems, 'unknown'])
def test_baselines_forecast_from_the_given_steps_alone(system):
    made_by = 'auto' if system == 'unknown' else system
    given, future, step_time = rounded_and_split(12, 6, system=made_by)
    forecasts = baselines(given, 50, step_time, system)
    refits = {'rosenzweig_macarthur': informed, 'lotka_volterra': [ceiling], 'unknown': []}[system]
    assert list(forecasts) == [*uninformed, *statistical_here(), *refits]
    errors = {name: point_errors(forecast, future)['mae_median'] for name, forecast in forecasts.items()}
    assert min(errors, key=errors.get) == ceiling or not refits
    assert errors['linear autoregression'] < errors['last value']


def test_equations_are_refitted_for_two_variables_only():
    given = np.random.default_rng(0).uniform(1, 9, (2, 50, 3))
    assert list(baselines(given, 5, 1.0, 'rosenzweig_macarthur')) == [*uninformed, *statistical_here()]


def test_the_true_equations_are_found_for_every_trajectory():
    "40 of 40 within 0.1 in scaled units over 50 steps; equations of closed orbits are nowhere near."
    given, future, step_time = rounded_and_split(40, 3)
    error_N = np.abs(refit_saturating(given, 50, step_time) - future).mean((1, 2))
    assert error_N.max() < 0.1 and np.median(error_N) < 0.03, np.sort(error_N)[-5:]
    assert np.median(np.abs(refit_closed(given, 50, step_time) - future).mean((1, 2))) > 0.5


def test_without_statsforecast_its_rivals_are_left_out_and_named(monkeypatch):
    import llmft.studies.forecasting.baselines as module

    given, _, step_time = rounded_and_split(2, 3)
    monkeypatch.setattr(module, 'find_spec', lambda name: None)
    assert list(baselines(given, 5, step_time)) == list(uninformed)
    assert all(words in module.absent_rivals() for words in ('AutoARIMA', 'AutoETS', '.[forecast]'))


@pytest.mark.parametrize('name', ['AutoARIMA', 'AutoETS'])
def test_rivals_of_statistics_forecast_every_series(name):
    "Also those that stand still, or are short; a straight line goes on as a line."
    pytest.importorskip('statsforecast')
    from llmft.studies.forecasting.baselines import statistical_forecast

    given, future, _ = rounded_and_split(3, 3)
    made = statistical_forecast(name, given, 50)
    assert made.shape == future.shape and np.isfinite(made).all()
    assert statistical_forecast(name, np.full((1, 20, 1), 3.0), 4).ravel() == pytest.approx([3.0] * 4)
    assert statistical_forecast(name, np.arange(12.0)[None, :, None], 3).ravel() == pytest.approx([12, 13, 14], abs=0.1)


def test_parroting_copies_what_followed_and_goes_on_with_its_copy():
    motif = np.array([1.0, 4.0, 2.0, 8.0, 5.0, 7.0])
    given = np.tile(motif, 3)[:14, None].repeat(2, 1)[None]
    expected = np.tile(motif, 12)[14:54]
    assert context_parroting(given, 40)[0, :, 0].tolist() == expected.tolist()


def test_scores_without_a_unit_are_their_definitions():
    rng = np.random.default_rng(5)
    given, truth, samples = rng.uniform(1, 9, (3, 8, 2)), rng.uniform(1, 9, (3, 4, 2)), rng.uniform(1, 9, (3, 7, 4, 2))
    mase = [
        np.mean([abs(np.median(samples[n, :, h, v]) - truth[n, h, v]) for h in range(4)])
        / np.mean([abs(given[n, t, v] - given[n, t - 1, v]) for t in range(1, 8)])
        for n in range(3)
        for v in range(2)
    ]
    loss = 0
    for level in np.arange(1, 10) / 10:
        for n, h, v in np.ndindex(3, 4, 2):
            under = truth[n, h, v] - np.quantile(samples[n, :, h, v], level)
            loss += 2 * max(level * under, (level - 1) * under) / 9
    scores = scaled_scores(samples, truth, given)
    assert scores['mase'] == pytest.approx(np.mean(mase)) and scores['wql'] == pytest.approx(loss / truth.sum())
    curves = step_scores(samples, truth, given)
    assert curves['mase_H'].mean() == pytest.approx(np.mean(mase))
    assert curves['crps_H'].mean() == pytest.approx(crps(samples, truth).mean())
    assert curves['coverage_H'].mean() == pytest.approx(spread_scores(samples, truth)['coverage_80'])
    assert (curves['wql_H'] * truth.sum((0, 2))).sum() == pytest.approx(loss)


def test_autoregression_recovers_a_linear_process():
    turn = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    rows = np.array([5 + np.linalg.matrix_power(turn, k) @ [2, 1] for k in range(60)])
    assert choose_regression(rows[:50])[1] == 1e-6
    assert np.allclose(linear_autoregression(rows[None, :50], 10)[0], rows[50:], atol=1e-3)
    with pytest.raises(LabError, match='too few for an autoregression'):
        linear_autoregression(rows[None, :5], 10)


@pytest.mark.parametrize('given', [1, 2, 7])
def test_too_few_given_steps_are_refused_with_the_number_that_is_enough(given):
    series = np.random.default_rng(0).random((2, 9, 1))
    with pytest.raises(LabError, match='too few for an autoregression: give at least 8'):
        linear_autoregression(series[:, :given], 3)
    assert linear_autoregression(series[:, :8], 3).shape == (2, 3, 1)
