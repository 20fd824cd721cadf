"""Series of one's own: every form of table, what is refused, windows by time, signs, and scores of another library."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.cli import call
from llmft.core import LabError
from llmft.data.tokens import load_tokenizer
from llmft.models.load import load_model
from llmft.studies.forecasting import figures
from llmft.studies.forecasting.baselines import linear_autoregression, statistical_here, uninformed
from llmft.studies.forecasting.codec import decode, encode, probe
from llmft.studies.forecasting.comparison import (
    compare_forecasts,
    compared_rows,
    comparison_verdict,
    error_table,
    rank_forecasts,
    variable_table,
)
from llmft.studies.forecasting.forecast import Grammar, evaluate_forecasts
from llmft.studies.forecasting.metrics import scaled_scores, score_forecast
from llmft.studies.forecasting.prepared import prepare_series, read_split, series_key
from llmft.studies.forecasting.selection import keep_errors
from llmft.studies.forecasting.series import round_series, scale_factors, split_windows
from llmft.studies.forecasting.sources import load_series

root = Path(__file__).parent.parent
stages = ('forecast_data', 'forecast_train', 'forecast_eval')

# ---- forms

long = pd.DataFrame(
    dict(
        unique_id=['b'] * 3 + ['a'] * 3, ds=[0.0, 0.5, 1.0] * 2, load=[1.0, 2, 3, -4, 5, 6], wind=[0.5, 0, 0, 7, 7, 7]
    )
)
expected = np.array([[[1, 0.5], [2, 0], [3, 0]], [[-4, 7], [5, 7], [6, 7]]], np.float32)


def written(frame, folder, ending):
    path = folder / f'table.{ending}'
    if ending == 'parquet':
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False, sep='\t' if ending == 'tsv' else ',')
    return str(path)


@pytest.mark.parametrize('ending', ['csv', 'tsv', 'parquet'])
def test_every_form_gives_the_same_series(tmp_path, ending):
    mixed = long.sample(6, random_state=1).sort_values('ds')
    for source in (long, mixed, written(long, tmp_path, ending), written(mixed, tmp_path, 'csv')):
        series = load_series(source)
        order = [0, 1] if series.values_NTV[0, 0, 0] == 1 else [1, 0]
        assert (series.values_NTV[order] == expected).all()
        assert series.notes['names'] == ['load', 'wind'] and series.times_T.tolist() == [0, 0.5, 1]

    wide = pd.DataFrame({'Time': [0.0, 0.5, 1.0], 'b': expected[0, :, 0], 'a': expected[1, :, 0]})
    apart = load_series(written(wide, tmp_path, ending), columns='series')
    assert (apart.values_NTV == expected[:, :, :1]).all() and apart.notes['names'] == ['value']
    together = load_series(written(wide, tmp_path, ending))
    assert together.values_NTV.shape == (1, 3, 2) and together.notes['names'] == ['b', 'a']
    assert load_series(written(wide, tmp_path, ending), value_fields='a').notes['names'] == ['a']


def test_dates_that_follow_a_calendar_are_even(tmp_path):
    for frequency in ('D', 'MS', 'B', 'h', 'QS'):
        dates = pd.date_range('2024-01-01', periods=9, freq=frequency)
        for cells in (dates, dates.strftime('%Y-%m-%dT%H:%M:%S')):
            series = load_series(pd.DataFrame(dict(date=cells, y=np.arange(9.0))))
            assert series.times_T.tolist() == list(range(9)) and series.notes['frequency'].startswith(frequency)


def test_the_equations_of_a_table_are_noted():
    assert load_series(long).notes['system'] == 'unknown'
    assert load_series(long, 'lotka_volterra').notes['system'] == 'lotka_volterra'
    with pytest.raises(LabError, match="did you mean 'lotka_volterra'"):
        load_series(long, 'lotka_voltera')


# ---- what is refused


def h5(path, times=None, values=None):
    with h5py.File(path, 'w') as file:
        file['trajectories'] = np.ones((4, 5, 2)) if values is None else values
        file['time'] = np.arange(5.0) if times is None else times
    return str(path)


def odd_h5(path, kind):
    "HDF5 files that declare more than they hold, or point elsewhere."
    (path.parent / 'secret').write_bytes(bytes(400))
    h5(path.parent / 'other.h5')
    with h5py.File(path, 'w') as file:
        file['time'] = np.arange(5.0)
        if kind == 'huge':
            file.create_dataset('trajectories', (10**9, 100, 2), 'f4', chunks=(1, 100, 2))
        if kind == 'external':
            place = [(str(path.parent / 'secret'), 0, 320)]
            file.create_dataset('trajectories', (4, 5, 2), 'f8', external=place)
        if kind == 'link':
            file['trajectories'] = h5py.ExternalLink(str(path.parent / 'other.h5'), 'trajectories')
        if kind == 'virtual':
            layout = h5py.VirtualLayout((4, 5, 2), 'f8')
            layout[:] = h5py.VirtualSource(str(path.parent / 'other.h5'), 'trajectories', (4, 5, 2))
            file.create_virtual_dataset('trajectories', layout)
        if kind == 'soft':
            file['trajectories'] = h5py.SoftLink('/nowhere')
        if kind == 'group':
            file.create_group('trajectories')
        if kind == 'text':
            file['trajectories'] = np.full((4, 5, 2), b'1.0')
    return str(path)


def one(**columns):
    return lambda folder: pd.DataFrame(columns)


bad = {
    'descending': (one(time=[0, 1, 2, 1.5], y=[1, 2, 3, 4]), 'sort the rows by time'),
    'two rows of one time': (one(time=[0, 1, 1, 2], y=[1, 2, 3, 4]), 'second row of one time'),
    'uneven': (one(time=[0, 1, 2, 4], y=[1, 2, 3, 4]), 'uneven .the median step is 1.: set uneven to resample'),
    'nan time': (one(time=[0, np.nan, 2], y=[1, 2, 3]), 'row 2 holds .nan. in the column .time., which is no time'),
    'endless time': (one(time=[0, 1, np.inf], y=[1, 2, 3]), 'not finite'),
    'no date': (one(date=['2024-01-01', 'soon'], y=[1, 2]), "holds 'soon' in the column 'date', which is no time"),
    'complex': (one(time=[0, 1], y=[1 + 1j, 2]), "'y' holds complex numbers"),
    'complex objects': (one(time=[0, 1], y=pd.Series([1, 2j], dtype=object)), "'y' holds complex numbers"),
    'text': (one(time=[0, 1], y=['high', 'low']), "row 1 holds 'high' in the column 'y', which is no number"),
    'endless': (one(time=[0, 1], y=[1, np.inf]), 'not finite'),
    'too large': (one(time=[0, 1], y=[1, 1e300]), 'not finite as a 32-bit number'),
    'missing': (one(time=[0, 1], y=[1, np.nan]), 'has no value at step 1 .1 are missing in all.: set missing'),
    'one step': (one(id=['a', 'a', 'b'], time=[0, 1, 0], y=[1, 2, 3]), "series 'b' has one step: leave it out"),
    'no id': (one(id=['a', None], time=[0, 1], y=[1, 2]), 'which is no id'),
    'lengths': (one(id=list('aaabb'), time=[0, 1, 2, 0, 1], y=[1] * 5), "'a' has 3 steps and 'b' has 2: set window"),
    'no time': (one(when=[0, 1], y=[1, 2]), 'name it by time_field'),
    'no values': (one(time=[0, 1]), 'no column of values'),
    'no rows': (one(time=[], y=[]), 'has no rows'),
    'h5 descending': (lambda folder: h5(folder / 'a.h5', np.arange(5.0)[::-1]), 'sort the rows by time'),
    'h5 uneven': (lambda folder: h5(folder / 'a.h5', np.arange(5.0) ** 2), 'are uneven'),
    'h5 nan time': (lambda folder: h5(folder / 'a.h5', np.array([0, 1, np.nan, 3, 4])), 'step 2 holds .nan.'),
    'h5 complex': (lambda folder: h5(folder / 'a.h5', values=np.ones((4, 5, 2), complex)), 'holds complex128, not real'),
    'h5 complex times': (lambda folder: h5(folder / 'a.h5', np.arange(5) + 0j), "'time' holds complex128"),
    'h5 huge': (lambda folder: odd_h5(folder / 'a.h5', 'huge'), 'declares 745 GiB'),
    'h5 external': (lambda folder: odd_h5(folder / 'a.h5', 'external'), 'lies in another file'),
    'h5 link': (lambda folder: odd_h5(folder / 'a.h5', 'link'), 'lies in another file'),
    'h5 virtual': (lambda folder: odd_h5(folder / 'a.h5', 'virtual'), 'lies in another file'),
    'h5 dangling': (lambda folder: odd_h5(folder / 'a.h5', 'soft'), 'lies in another file'),
    'h5 group': (lambda folder: odd_h5(folder / 'a.h5', 'group'), 'is a group'),
    'h5 text': (lambda folder: odd_h5(folder / 'a.h5', 'text'), 'not real numbers'),
}


@pytest.mark.parametrize('kind', bad)
def test_what_can_not_be_forecast_is_one_line(tmp_path, kind):
    make, message = bad[kind]
    source = make(tmp_path)
    out = tmp_path / 'out'
    out.mkdir()
    with pytest.raises(LabError, match=message) as error:
        prepare_series(out, source, context=2)
    assert '\n' not in str(error.value) and not list(out.iterdir())


def test_the_line_of_a_csv_is_named(tmp_path):
    (tmp_path / 'a.csv').write_text('time,y\n0,1\n1,2,3\n')
    with pytest.raises(LabError, match='a.csv:3 has 3 cells for 2 fields'):
        load_series(tmp_path / 'a.csv')
    (tmp_path / 'a.csv').write_text('time,y\n0,1\n\n1,oops\n')
    with pytest.raises(LabError, match="a.csv:4 holds 'oops' in the column 'y'"):
        load_series(tmp_path / 'a.csv')


# ---- rules


@pytest.mark.parametrize('rule, kept', [('previous', [[1, 1, 3], [4, 5, 5]]), ('drop', [[7, 8, 9]])])
def test_missing_values_follow_the_rule(rule, kept):
    rows = [[1, np.nan, 3], [4, 5, np.nan]] + ([[7, 8, 9]] if rule == 'drop' else [])
    frame = pd.DataFrame(dict(id=np.repeat(range(len(rows)), 3), time=[0, 1, 2] * len(rows), y=np.ravel(rows)))
    series = load_series(frame, missing=rule)
    assert series.values_NTV[:, :, 0].tolist() == kept and series.notes['missing_values'] == 2


def test_previous_never_looks_ahead():
    values = np.arange(12.0)
    values[[3, 4, 9]] = np.nan
    other = np.where(np.arange(12) > 6, values * 5, values)
    filled = [load_series(pd.DataFrame(dict(time=range(12), y=y)), missing='previous') for y in (values, other)]
    assert (filled[0].values_NTV[0, :7] == filled[1].values_NTV[0, :7]).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.2, 3), min_size=4, max_size=20), st.integers(0, 9))
def test_resampling_lies_on_the_lines_between_rows(steps, seed):
    times = np.cumsum(steps)
    values = np.random.default_rng(seed).normal(size=len(times))
    series = load_series(pd.DataFrame(dict(time=times, y=values)), uneven='resample') if np.ptp(steps) > 0.1 else None
    if series:
        at = times[0] + series.times_T
        assert np.allclose(series.values_NTV[0, :, 0], np.interp(at, times, values), atol=1e-5)
        assert at[-1] <= times[-1] + 0.01 * np.median(steps) and at[-1] + np.median(np.diff(times)) > times[-1]


# ---- windows by time


@settings(max_examples=50, deadline=None)
@given(st.integers(40, 200), st.integers(4, 20), st.integers(1, 9), st.integers(1, 19))
def test_no_step_to_forecast_was_trained_on(length, window, stride, known):
    known = min(known, window - 1)
    times = list(range(length)) * 2
    frame = pd.DataFrame(dict(id=np.repeat(['a', 'b'], length), time=times, y=np.arange(2.0 * length)))
    series = load_series(frame, window=window, stride=stride)
    try:
        rows = split_windows(series.starts_N, series.lengths_N, window, known)
    except LabError as error:
        assert 'split empty' in str(error)
        return
    seen = {split: set(series.values_NTV[part].ravel()) for split, part in rows.items()}
    asked = {split: set(series.values_NTV[part][:, known:].ravel()) for split, part in rows.items()}
    assert not seen['train'] & (asked['valid'] | asked['test']) and not seen['valid'] & asked['test']
    assert len(set(np.concatenate(list(rows.values())))) == sum(map(len, rows.values()))


def test_the_origins_are_those_of_another_library():
    "The last windows, as utilsforecast cuts them."
    processing = pytest.importorskip('utilsforecast.processing')
    frame = pd.DataFrame(dict(unique_id='a', ds=range(100), y=np.random.default_rng(0).normal(size=100)))
    series = load_series(frame, window=20, stride=5)
    rows = split_windows(series.starts_N, series.lengths_N, 20, 15)['test']
    ours = [(part[:15].ravel(), part[15:].ravel()) for part in series.values_NTV[rows]]
    theirs = list(processing.backtest_splits(frame, len(rows), 5, 'unique_id', 'ds', 1, step_size=5, input_size=15))
    assert len(rows) == 3
    for (past, future), (_, given_rows, asked_rows) in zip(ours, theirs, strict=True):
        assert np.allclose(past, given_rows.y) and np.allclose(future, asked_rows.y)


def test_scores_are_those_of_another_library():
    "MAE, MSE, RMSE and coverage over trajectories, steps and variables equal those of utilsforecast."
    losses = pytest.importorskip('utilsforecast.losses')
    rng = np.random.default_rng(3)
    truth, samples = rng.normal(size=(7, 9, 2)), rng.normal(size=(7, 20, 9, 2))
    ours = score_forecast(samples, truth, ('a', 'b'))
    middle = np.median(samples, axis=1)
    low, high = np.quantile(samples, [0.1, 0.9], axis=1)
    frame = pd.DataFrame(
        dict(
            unique_id=np.repeat(range(7), 18), ds=list(range(18)) * 7, y=truth.ravel(), m=middle.ravel(),
            low=low.ravel(), high=high.ravel(),
        )
    )
    theirs = {name: getattr(losses, name)(frame, ['m'])['m'] for name in ('mae', 'mse')}
    frame = frame.rename(columns={'low': 'm-lo-80', 'high': 'm-hi-80'})
    covered = losses.coverage(frame, ['m'], level=80)['m'] if 'level' in losses.coverage.__code__.co_varnames else None
    assert abs(ours['mae'] - theirs['mae'].mean()) < 1e-6
    assert abs(ours['mae_median'] - theirs['mae'].median()) < 1e-6
    assert abs(ours['mse'] - theirs['mse'].mean()) < 1e-6
    assert abs(ours['rmse'] - losses.rmse(frame.assign(unique_id=0), ['m'])['m'].item()) < 1e-6
    assert covered is None or abs(ours['coverage_80'] - covered.mean()) < 1e-6
    for v, name in enumerate('ab'):
        part = frame[np.tile([0, 1], 63) == v]
        assert abs(ours[f'mae_{name}'] - losses.mae(part, ['m'])['m'].mean()) < 1e-6


def test_scores_without_a_unit_are_those_of_another_library():
    "MASE against the given steps, and WQL over nine quantiles, equal those of utilsforecast."
    losses = pytest.importorskip('utilsforecast.losses')
    rng = np.random.default_rng(4)
    known, truth, samples = (rng.uniform(1, 9, shape) for shape in ((6, 12, 2), (6, 7, 2), (6, 20, 7, 2)))
    ours = scaled_scores(samples, truth, known)

    def frame_of(values_NTV, first, **more):
        "Rows of one series for each trajectory and variable."
        count, steps, variables = values_NTV.shape
        flat = {name: np.moveaxis(part, 2, 1).ravel() for name, part in dict(y=values_NTV, **more).items()}
        ids, times = np.repeat(range(count * variables), steps), np.tile(range(first, first + steps), count * variables)
        return pd.DataFrame(dict(unique_id=ids, ds=times, **flat))

    levels = np.arange(1, 10) / 10
    quantiles = {f'q{level:g}': part for level, part in zip(levels, np.quantile(samples, levels, axis=1), strict=True)}
    frame = frame_of(truth, 12, m=np.median(samples, axis=1), **quantiles)
    theirs = losses.mase(frame, ['m'], 1, frame_of(known, 0))['m']
    assert abs(ours['mase'] - theirs.mean()) < 1e-6
    assert abs(ours['mase_median'] - np.median(theirs.to_numpy().reshape(6, 2).mean(1))) < 1e-6
    whole = losses.scaled_crps(frame.assign(unique_id=0, ds=range(len(frame))), {'m': list(quantiles)}, levels)
    assert abs(ours['wql'] - whole['m'].item()) < 1e-6


# ---- signs and constants


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.floats(-3e4, 3e4, width=32), min_size=3, max_size=24))
def test_negative_numbers_come_back(precision, row):
    shown = round_series(np.array(row, np.float32).reshape(1, -1, 1), np.ones((1, 1), np.float32), precision)
    texts = encode(shown, precision)
    back = decode(texts, len(row), 1, precision, signed=True)
    assert back.malformed_N.tolist() == [0] and '-0.' + '0' * precision + ';' not in texts[0] + ';'
    assert back.values_NTV[0, :, 0].tolist() == [float(f'{value:.{precision}f}') for value in shown[0, :, 0]]
    unsigned = decode(texts, len(row), 1, precision)
    assert unsigned.malformed_N[0] == texts[0].count('-')


@pytest.mark.parametrize('signed', [False, True])
def test_every_walk_of_the_grammar_can_be_read(signed):
    tokenizer = load_tokenizer('base')
    way = probe(tokenizer, 2, signed)
    grammar = Grammar(way, len(tokenizer), tokenizer.eos_token_id, steps=3, variables=3, integer_digits=2)
    rng = torch.Generator().manual_seed(0)
    new = torch.empty(200, 0, dtype=torch.long)
    for step in range(70):
        allowed = grammar(step, new)
        new = torch.cat([new, torch.multinomial(allowed.float(), 1, generator=rng)], 1)
    texts = [way.read(tokenizer.decode([i for i in row if i != tokenizer.eos_token_id])) for row in new.tolist()]
    read = decode(texts, 3, 3, 2, signed)
    assert read.success_rate == 1
    assert any('-' in text for text in texts) == signed


def test_scales_of_negative_and_constant_values():
    values = np.stack([np.linspace(-8, 3, 50), np.full(50, -5.0), np.zeros(50)], 1)[None].astype(np.float32)
    factors = scale_factors(values, 'context', context=50)
    assert factors[0, 0] == np.float32(10 / np.percentile(np.abs(values[0, :, 0].astype(float)), 99))
    assert factors[0, 1:].tolist() == [2.0, 1.0]


def test_the_autoregression_follows_values_below_zero():
    times = np.arange(60)
    series = -50 + 10 * np.sin(times / 5)[None, :, None]
    assert np.abs(linear_autoregression(series[:, :50], 10) - series[:, 50:]).max() < 5


# ---- from a table to a verdict


@pytest.mark.parametrize('variables', [1, 3])
def test_a_table_is_evaluated_like_the_study(tmp_path, variables):
    rng = np.random.default_rng(variables)
    names = ['load', 'temp', 'still'][:variables]
    columns = dict(load=-3 + np.sin(np.arange(90) / 3) + 0.1 * rng.normal(size=90), temp=rng.normal(size=90), still=2.0)
    frame = pd.DataFrame(dict(time=range(90), **{name: columns[name] for name in names}))
    prepare_series(tmp_path, frame, context=8, window=12, stride=2)
    part = read_split(tmp_path, 'test')
    assert part.metadata['signed'] and part.metadata['names'] == names
    model, tokenizer = load_model('base'), load_tokenizer('base')
    made, scores = evaluate_forecasts(model, tokenizer, part, 8, 4, 2, samples=2)
    assert made.success_rate == 1 and np.isfinite(scores['nll_per_value'])
    assert {f'mae_{name}' for name in names} <= set(scores)

    comparison = compare_forecasts(part, {'untrained': made}, {'untrained': scores}, 8, 4)
    assert comparison.names == names and comparison.simple == [*uninformed, *statistical_here()]
    assert comparison_verdict(comparison, 'untrained') and error_table(comparison, 'context')
    assert all(name in str(variable_table(comparison)._repr_html_()) for name in names)
    step = part.times_T[1]
    drawn = [
        figures.series_figure(part.times_T, part.scaled_NTV, 8, names=names),
        figures.spectra_figure(part.scaled_NTV, step, names),
        figures.clusters_figure(part.scaled_NTV, step, names),
        figures.forecasts_figure(part.times_T, comparison.truth_NTV, made.samples_NSHV, 8, names=names),
        figures.boxes_figure(comparison.gaps(), names=names),
    ]
    assert len(drawn) == 5


def test_series_in_other_decimals_are_the_same_series(tmp_path):
    keys = {}
    for decimals, seed in ((2, 42), (3, 42), (2, 7)):
        folder = tmp_path / f'{decimals}-{seed}'
        prepare_series(folder, simulate_count=40, precision=decimals, split_seed=seed)
        keys[decimals, seed] = series_key(read_split(folder, 'valid').metadata)
    assert keys[2, 42] == keys[3, 42] != keys[2, 7]


def test_windows_that_forecast_the_same_steps_are_not_compared_as_if_apart(tmp_path):
    frame = pd.DataFrame(dict(time=range(200), load=2 + np.sin(np.arange(200) / 3)))
    rng = np.random.default_rng(0)
    for stride, apart in ((2, 2), (3, 2), (4, 1), (0, 1)):
        prepare_series(tmp_path / str(stride), frame, context=8, window=12, stride=stride)
        part = read_split(tmp_path / str(stride), 'test')
        samples_NSHV = part.scaled_NTV[:, None, 8:] + rng.normal(size=(len(part), 3, 4, 1))
        made = SimpleNamespace(samples_NSHV=samples_NSHV, nll_H=None)
        scores = score_forecast(samples_NSHV, part.scaled_NTV[:, 8:], part.metadata['names'])
        comparison = compare_forecasts(part, {'untrained': made}, {'untrained': scores}, 8, 4)
        rows, names = compared_rows(comparison)
        assert rows == list(range(0, len(part), apart)) and set(names) == set(comparison.points)

        judge = SimpleNamespace(data=SimpleNamespace(valid_part=part), given=8, horizon=4)
        judge.errors = lambda number, part=part: rng.random(len(part))
        kept = keep_errors(tmp_path / str(stride), judge, {}, [{}])
        assert {len(errors_N) for errors_N in kept.values()} == {len(rows)}

        ranking = rank_forecasts(comparison)
        assert {difference.items for difference in ranking.differences.values()} == {len(rows)}
        assert ranking.measure.items == ('trajectories' if apart == 1 else 'windows without a common step')


# ---- the guide


def test_the_guide_leads_from_its_table_to_a_verdict(tmp_path, monkeypatch, capsys):
    "The example table and the parameter file of the guide, cut to two steps."
    guide = (root / 'nbs/guides/own-series.qmd').read_text()
    (block,) = re.findall(r'```python\n(.*?)```', guide, flags=re.DOTALL)
    assert 'llmft run params/sweeps/own_series.yaml --small' in guide
    monkeypatch.chdir(tmp_path)
    exec(compile(block, 'guide', 'exec'), {})

    sweep = (root / 'params/sweeps/own_series.yaml').read_text()
    assert 'data: my_series.csv' in sweep
    (tmp_path / 'own.yaml').write_text(
        sweep.replace('outputs/', f'{tmp_path}/outputs/').replace('my_series.csv', f'{tmp_path}/my_series.csv')
    )
    monkeypatch.chdir(root)
    cut = ('max_steps=2', 'eval_every=2', 'num_eval_samples=1', 'valid_horizon=2', 'valid_samples=1')
    cut += ('num_eval_samples=2', 'samples=2', 'horizon=2', f'outputs={tmp_path}/outputs')
    arguments = ['run', str(tmp_path / 'own.yaml'), '--small', *[word for value in cut for word in ('-p', value)]]
    assert call(arguments) == 0, capsys.readouterr()

    done = {name: json.loads((tmp_path / f'outputs/{name}/own-series/run.json').read_text()) for name in stages}
    assert [record['run']['status'] for record in done.values()] == ['done'] * 3
    series = done['forecast_eval']['meta']['series']
    assert series['names'] == ['load', 'temperature'] and series['missing_values'] == 1 and series['signed']
    assert series['frequency'] == 'D'
