"""Properties of the series, their text, and the forecasts' scores that a notebook cannot hold."""

import time

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.studies.forecasting.codec import decode, encode, probe
from llmft.studies.forecasting.metrics import (
    baselines,
    choose_regression,
    crps,
    linear_autoregression,
    point_errors,
    point_forecast,
    spread_scores,
)
from llmft.studies.forecasting.prepared import prepare_series, read_split, windows
from llmft.studies.forecasting.series import round_series, scale_factors, simulate, split_rows, unscale
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
    for row in values:
        columns, double = [], []
        for v in range(2):
            x = row[:, v]
            s = np.float32(10.0 / np.float64(np.percentile(x.astype(np.float64), 99)))
            columns.append(np.round(x * s, precision))
            double.append(np.round(x.astype(np.float64) * (10.0 / np.percentile(x.astype(np.float64), 99)), precision))
        expected.append(plain(np.stack(columns, 1), precision))
        other += plain(np.stack(double, 1), precision) != expected[-1]
    assert lines == expected
    assert other, 'computing in float64 gives the same lines: this test proves nothing'


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
        (dict(spread=1.0), 'spread is 1'),
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
    order = np.random.default_rng(42).permutation(40)
    lines = (tmp_path / 'val_texts.txt').read_text().splitlines()
    assert lines == encode(round_series(series.values_NTV[order[28:34]], factors[order[28:34]], 3), 3)
    part = read_split(tmp_path, 'valid')
    assert part.texts == lines and (part.factors_NV == factors[order[28:34]]).all()
    (tmp_path / 'val_texts.txt').write_text('\n'.join([*lines[:2], lines[2][:-1], *lines[3:]]))
    with pytest.raises(LabError, match='line 3 of the valid texts'):
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


def test_baselines_forecast_from_the_given_steps_alone():
    values = simulate(12, seed=6).values_NTV.astype(float)
    forecasts = baselines(values[:, :50], 10, 0.4)
    assert set(forecasts) == {'last value', 'seasonal', 'linear autoregression', 'equations refitted'}
    errors = {name: point_errors(forecast, values[:, 50:60])['mae_median'] for name, forecast in forecasts.items()}
    assert errors['equations refitted'] < 0.002 and errors['equations refitted'] < min(
        error for name, error in errors.items() if name != 'equations refitted'
    )
    assert errors['linear autoregression'] < errors['last value']


def test_autoregression_recovers_a_linear_process():
    turn = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    rows = np.array([5 + np.linalg.matrix_power(turn, k) @ [2, 1] for k in range(60)])
    assert choose_regression(rows[:50])[1] == 1e-6
    assert np.allclose(linear_autoregression(rows[None, :50], 10)[0], rows[50:], atol=1e-3)
    with pytest.raises(LabError, match='too few for an autoregression'):
        linear_autoregression(rows[None, :5], 10)
