"Every verdict names the strongest rival, whoever that is: each of them is made to win in turn."

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from house import experiments, root

from llmft.bench.training import rank_trainers
from llmft.bench.turns import Target, contest_verdict
from llmft.runs.rivals import (
    Difference,
    Measure,
    Ranking,
    certainty_words,
    held_out_loss,
    keep_judged,
    paired_scores,
    place_words,
    ranked,
)
from llmft.studies.code import report as code
from llmft.studies.code.pass_at_k import Attempt
from llmft.studies.finetuning import comparison as finetune_runs
from llmft.studies.finetuning import profile
from llmft.studies.finetuning import report as finetuning
from llmft.studies.forecasting import comparison as forecasts
from llmft.studies.forecasting import report as forecast_training
from llmft.studies.forecasting import summary
from llmft.studies.forecasting.baselines import ceiling, informed, statistical, uninformed
from llmft.studies.inference import comparison as precisions
from llmft.studies.inference import report as inference
from llmft.studies.pdfs import comparison as pdf_runs
from llmft.studies.pdfs import report as pdfs
from llmft.studies.sublora import proof
from llmft.studies.sublora import report as sublora

rng = np.random.default_rng(0)
items = 40
hard_N = rng.normal(3, 0.3, items)
far = {True: 0.0, False: 1.0}  # what is added to the winner's score, and to those of the others


def judged(wins):
    "What `judge` gives of a model that is best, or is not."
    losses_N = hard_N + far[wins]
    loss = float(losses_N.mean())
    facts = dict(targets=100 * items, documents=items, bytes=9000, bits_per_byte=loss / 3)
    return dict(facts, loss=loss, perplexity=math.exp(loss), document_losses=losses_N, document_targets=[100] * items)


fitted = SimpleNamespace(
    progress=SimpleNamespace(step=20, stopped='finished', tokens=10_000, seconds=60.0, flops=1e12, best_step=20),
    trainable=1000,
    steps=20,
)


def finetune(best):
    after, before, base = (judged(best == name) for name in rivals['finetune'])
    return finetuning.finetuning_verdict('qlora', dict(total=5000), fitted, before, after, base)


def pretrain(best):
    after, before = (judged(best == name) for name in rivals['pretrain'])
    return finetuning.pretraining_verdict(fitted, before, after)


def pdf_finetune(best):
    after, before = (judged(best == name) for name in rivals['pdf_finetune'])
    return pdfs.pdf_verdict('Done.', before, after, fitted)


def finetune_result(name, best):
    cost = dict.fromkeys(('time_per_epoch_seconds', 'peak_memory_gb'), 1 + far[name == best])
    metrics = cost | dict(perplexity_after=20 * math.exp(far[name == best]), learning_rate=1e-3, memory_error=0.5)
    metrics |= dict(perplexity_before=20 * math.exp(far['full before training' == best] + 0.5))
    record = dict(params=dict(method=name, model='base'), meta=dict(data=dict(valid=dict(sha256='a'))))
    return dict(record=record, metrics=metrics | dict(bits_per_byte_after=metrics['perplexity_after']), folder='')


def compare(best):
    results = {name: finetune_result(name, best) for name in ('full', 'lora', 'qlora')}
    return finetune_runs.comparison_verdict(results)


def pdf_compare(best):
    rows = [
        dict(
            run=name,
            max_batch_size=4 if name == best else 2,
            seconds_per_step=1 + far[name == best],
            perplexity_before=20 * math.exp(0.5 + far['half before training' == best]),
            perplexity_after=20 * math.exp(far[name == best]),
            held_out='a',
            folder='',
        )
        for name in ('half', 'nf4')
    ]
    return pdf_runs.comparison_verdict(rows)


def inference_compare(best):
    rows = [
        dict(
            run=name,
            throughput_tokens_per_sec=600.0 if name == best else 300.0,
            memory=1 + far[name == best],
            peak_memory_gb=1 + far[name == best],
            model_size_gb=1.0,
            perplexity=20 * math.exp(far[name == best]),
            accuracy=0.6 if name == best else 0.2,
            correct=6,
            total_queries=10,
            folder='',
        )
        for name in rivals['inference_compare']
    ]
    return precisions.comparison_verdict(rows, 'fp32', [])


def one_inference(best):
    sizes = {int(name.split()[1]): name for name in rivals['inference']}
    answers = {
        size: dict(throughput_tokens_per_sec=600.0 if name == best else 300.0, peak_bytes=2**30)
        for size, name in sizes.items()
    }
    marks = dict(correct=3, questions=10, cut_off=0.1)
    return inference.inference_verdict('fp32', answers, marks, judged(True), dict(kld=None))


def profiled(best):
    kinds = rivals['profile']
    operations = [
        dict(name=kind, kind=kind, part='head', phase='forward', seconds=5.0 if kind == best else 1.0) for kind in kinds
    ]
    return profile.profile_verdict(operations, SimpleNamespace(steps=3, seconds=1.0, plain_seconds=0.9), 'full')


def instruct(best):
    def measured(wins):
        answers = [Attempt(f'p{n}', 0, '', 'passed' if n < 30 * wins else 'wrong', '', 0.1) for n in range(items)]
        return dict(valid=judged(wins), test=judged(wins), attempts=answers)

    after, before = (measured(best == name) for name in rivals['instruct'])
    metrics = dict(steps=2, planned_steps=2, stopped='finished', best_step=2, eval_loss_before=3.0, eval_loss=2.0)
    data = SimpleNamespace(row_notes=dict(train=dict(targets=10, targets_lost=10)))
    return code.instruct_verdict(metrics, data, before, after)


simple = [*uninformed, *statistical]


def forecast_comparison(best):
    truth_NTV = np.ones((items, 70, 2))
    names = ['fine-tuned', 'untrained', *simple, *informed]
    noise_NHV = rng.random((items, 20, 2)) * 0.1
    points = {name: truth_NTV[:, 50:] + noise_NHV + far[name == best] for name in names}
    known = dict(mae_median=1.0, mae=1.0, mse=1.0, success_rate=1.0, trajectories=items)
    rows = {name: known for name in names}
    return forecasts.Comparison(
        None, truth_NTV, truth_NTV[:, 50:], points, names[2:], rows, {}, {}, dict.fromkeys(names, 1.0), ['a', 'b']
    )


def test_a_model_that_shares_no_trajectory_with_the_judged_one_is_left_out():
    comparison = forecast_comparison('fine-tuned')
    comparison.points['untrained'][1:] = np.nan
    comparison.points['fine-tuned'][0] = np.nan
    errors = forecasts.trajectory_errors(comparison)
    assert errors['untrained'] is None and len(errors['fine-tuned']) == items - 1
    assert 'fine-tuned' in forecasts.comparison_verdict(comparison, 'fine-tuned')


def test_training_runs_that_were_judged_on_something_else_are_not_ranked_with_the_others():
    def result(name, mae, **params):
        run = dict(name=name, notebook='forecast_train')
        asked = dict(model='base', num_eval_samples=6, given=50, valid_horizon=10, valid_samples=3) | params
        record = dict(run=run, params=asked, meta=dict(series=dict(source='simulated', scaling='context', alpha=10.0)))
        metrics = dict(part='search', valid_mae=mae, learning_rate=mae / 100, lora_rank=8, precision=2)
        return dict(record=record, folder='', metrics=metrics | dict(valid_horizon=10, valid_trajectories=6))

    study = summary.study_rows([result('a', 2.0), result('b', 3.0), result('short', 0.5, valid_horizon=1)])
    said = summary.summary_verdict(study, None, 0.0)
    assert 'of 2 searched runs: learning rate 0.02' in said and 'as judged on other data, steps or trajectories: 1 run.' in said
    assert 'learning rate 0.005' not in summary.summary_details(study)


def forecast_eval(best):
    return forecasts.comparison_verdict(forecast_comparison(best), 'fine-tuned')


def forecast_row(best):
    own = dict(mae_median=1 + far['fine-tuned' == best], error_at_10=1 + far['fine-tuned' == best])
    keys = {name: forecasts.metric_name(name) for name in [*simple, 'untrained']}
    errors = {f'{key}_{error}': 1 + far[name == best] for name, key in keys.items() for error in own}
    return dict(run='test', judged='fine-tuned', trajectories=items, **own, **errors)


def forecast_summary(best):
    return summary.summary_verdict(summary.StudyRows([], [forecast_row(best)], []), None, 0.0)


def forecast_train(best):
    errors = dict(best=hard_N + far[best == 'step 20'], before=hard_N + far[best == 'untrained'])
    curve = dict(step=20, mae=1.0, trajectories=items)
    outcome = forecast_training.TrainingOutcome(curve, curve, [curve], 20, 1e12, 0.4, 0.0, errors, 50)
    params = SimpleNamespace(valid_horizon=10, max_steps=20, start='')
    return forecast_training.training_verdict(params, outcome, fitted.progress)


def sublora_bounds(best):
    bound = 8 + far[best == 'the claim']
    claim = dict(bound=bound, risk=7.0, m=10, bits=100.0, n=1000)
    guess = 8 + far[best == 'random guessing']
    claims = dict(bits_per_token=claim)
    return proof.proof_verdict(proof.Proof(b'', None, claims, 7.5, 100, guess, 1, 0.05, True, 'a condition'))


def sublora_analysis(best):
    groups = [
        dict(
            name=name,
            budget=1000,
            bound_value_by_seed={s: 4 + far[best == f'{name} (d = 1,000)'] + s / 9 for s in range(3)},
        )
        for name in ('uniform', 'learned')
    ]
    metrics = dict(
        runs=6, non_vacuous=6, random_guess_bits=4.2 + far[best == 'random guessing'], best='r', best_bound=4.0
    )
    metrics |= dict(best_empirical_bpd=3.0, above_held_out=6)
    return sublora.analysis_verdict(metrics, [], groups)


def sublora_train(best):
    names = rivals['sublora_train']
    after, before, guess = (3 + far[best == name] for name in names)
    losses = sublora.HeldOut(before, after, guess, 1000, 100)
    weight = SimpleNamespace(numel=lambda: 10)
    subspace = SimpleNamespace(trained=lambda: [weight], start=weight)
    return sublora.training_verdict(
        SimpleNamespace(allocation_mode='uniform', b_ratio=None), subspace, fitted.progress, losses
    )


def verdict_of_cell(notebook, **values):
    "What the verdict cell of an experiment says of these values."
    cells = nbformat.read(root / f'nbs/experiments/{notebook}.ipynb', 4).cells
    source = next(cell.source for cell in cells if re.search(r'^verdict = ', cell.source, re.MULTILINE))
    tools = dict(Measure=Measure, ranked=ranked, rank_trainers=rank_trainers, contest_verdict=contest_verdict)
    space = tools | dict(Markdown=str, rounds=3) | values
    given = (
        'from llmft.core import number_of\nfrom llmft.runs.numbers import show_number\n'
        'from llmft.runs.rivals import *\nfrom llmft.bench.pdfs import rank_readers\n'
    )
    exec(given + source, space)
    return space['verdict']


def rate(wins):
    return 900.0 if wins else 300.0


def found_by(best, names):
    seconds = {True: [10.0, 10.1, 10.3], False: [30.0, 31.0, 30.5]}
    return {
        name: dict(goal=10.0, epoch_tokens=900, round_seconds=seconds[name == best], valid_loss=10 + far[name == best])
        for name in names
    }


unmet = [Target('what nobody asked', 1.0, 2.0)]


def bench(best):
    memory = {name: 1 + far[name == best] for name in ('ours', 'hf_trainer')}
    return verdict_of_cell(
        'bench',
        models=['m'],
        found=dict(m=found_by(best, rivals['bench'])),
        memory=memory,
        mebibytes=memory,
        targets=unmet,
        tokens=900,
        largest_difference=1e-6,
    )


def bench_instruct(best):
    return verdict_of_cell(
        'bench_instruct',
        found=found_by(best, rivals['bench_instruct']),
        memory={},
        reading={},
        targets=unmet,
        rows=9,
        difference=dict(gradient_difference=1e-6),
    )


def bench_inference(best):
    tokens = {name: [rate(name == best) + turn for turn in range(7)] for name in rivals['bench_inference']}
    nothing = dict(beside={}, llama_cpp='', short={}, slower=[], rounds=7)
    facts = dict(rows=[dict(model='base', batch=1, tokens=tokens)], forms=['fp32'], targets=unmet)
    return verdict_of_cell('bench_inference', **facts, **nothing)


def bench_bounds(best):
    kinds = [dict(kind=kind, d=10, both=1 + far[kind == best]) for kind in rivals['bench_bounds']]
    steps, scoring = dict(lora=1.0, sublora=1.1), dict(forward=1.0, scoring=1.1)
    facts = dict(projections=kinds, dimensions=[10], steps=steps, scoring=scoring, metrics=dict(adjoint_error=1e-7))
    return verdict_of_cell('bench_bounds', targets=unmet, **facts)


def bench_forecast(best):
    together, batched, alone = (1 + far[best == name] for name in rivals['bench_forecast'])
    facts = dict(trajectories=9, samples=2, rounds=3, one_by_one=3, codec_trajectories=100, all_seconds=dict(encode=1, decode=1))
    facts |= dict(batched=batched, faster_than_batched=batched / together, same=3, plain=['1.00'] * 3)
    return verdict_of_cell('bench_forecast', together=together, alone=alone, faster=alone / together, **facts)


rivals = dict(  # experiment -> names of all that its verdict must be able to name
    finetune=['qlora', 'the model before training', 'the base without quantisation'],
    pretrain=['the trained model', 'random weights'],
    pdf_finetune=['the trained model', 'the model before training'],
    compare=['full', 'lora', 'qlora'],
    pdf_compare=['half', 'nf4'],
    inference=['batch 1', 'batch 8', 'batch 32'],
    inference_compare=['fp32', 'fp16', 'nf4'],
    profile=['Matrix products', 'attention', 'copies'],
    instruct=[code.trained_name, code.start_name],
    forecast_eval=['fine-tuned', 'untrained', *simple],
    forecast_summary=['fine-tuned', 'untrained', *simple],
    forecast_train=['step 20', 'untrained'],
    sublora_bounds=['the claim', 'random guessing'],
    sublora_analysis=['uniform (d = 1,000)', 'learned (d = 1,000)', 'random guessing'],
    sublora_train=['the trained model', 'the untrained model', 'random guessing'],
    bench=['ours', 'trl_packed', 'trl_padded', 'hf_trainer'],
    bench_instruct=['ours', 'trl_packed', 'hf_padded_full'],
    bench_inference=['ours', 'transformers'],
    bench_bounds=['kronecker', 'fastfood', 'sparse'],
    bench_forecast=['together, with grammar', 'batched, transformers', 'one by one, transformers'],
)
verdicts = {
    'inference': one_inference,
    'profile': profiled,
    **{name: globals()[name] for name in rivals if name not in ('inference', 'profile')},
}
no_rivals = {'forecast_data', 'gpu_check'}  # they judge no model: one prepares data, one checks a machine


def test_the_verdict_names_llama_cpp_where_it_wins():
    turns = {'ours': [70.0 + turn for turn in range(7)], 'llama.cpp': [90.0 + turn for turn in range(7)]}
    facts = dict(beside={'smollm2': turns}, llama_cpp='int4_fast', short={'smollm2': 'smollm2'})
    facts |= dict(rows=[], forms=['fp32'], slower=[], rounds=7)
    said = verdict_of_cell('bench_inference', targets=unmet, **facts)
    assert 'In throughput of smollm2 in int4_fast, batch 1, ours loses to llama.cpp, the strongest rival' in said


def test_every_experiment_is_here():
    assert {path.stem for path in experiments} == set(rivals) | no_rivals


@pytest.mark.parametrize('notebook, best', [(notebook, best) for notebook, names in rivals.items() for best in names])
def test_the_verdict_names_the_rival_that_wins(notebook, best):
    verdict = verdicts[notebook](best)
    lines = verdict.split('\n')
    assert 1 < len(lines) <= 3 and all(line.startswith('- ') for line in lines), verdict
    name = re.escape(best)
    won = rf'(?i:{name}) is best: |share of the time goes to (?i:{name}): |loses to (?i:{name}), the strongest rival'
    undecided = rf'Too few \w+ to say whether .*{name}'
    assert re.search(f'{won}|{undecided}', verdict), verdict
    assert 'Next: ' in lines[-1], verdict
    assert not re.search(r'(^- |[.!?] )[a-z]', verdict, re.MULTILINE), f'a sentence begins in lower case: {verdict}'


most_words = dict(compare=110, forecast_eval=110, instruct=125, bench=140, bench_instruct=120, bench_bounds=110)  # of many measures


@pytest.mark.parametrize('notebook, best', [(notebook, names[0]) for notebook, names in rivals.items()])
def test_a_verdict_is_short(notebook, best):
    verdict = verdicts[notebook](best)
    assert len(verdict.split()) <= most_words.get(notebook, 100), verdict


def test_a_long_study_has_a_short_verdict():
    shared = dict(valid_trajectories=6, precision=2, notebook='forecast_train', learning_rate=0.01, lora_rank=4)
    runs = [dict(shared, run=f'r{n}', part='search', valid_mae=1 + n / 100) for n in range(18)]
    runs += [dict(shared, run=f'c{n}', part='context', context_length=n, valid_mae=2 + n / 1e4) for n in (128, 512)]
    rows = [forecast_row('seasonal') | dict(run=name, mae=1.0, seasonal_mae=0.5) for name in ('final', 'first', 'second')]
    study = summary.StudyRows(runs, rows, [])
    said = summary.summary_verdict(study, 8e12, 1e13)
    assert len(said.split()) <= 100 and said.count('loses to seasonal, the strongest rival') == 1, said
    details = summary.summary_details(study)
    assert details.count('loses to seasonal, the strongest rival') == 3 and 'Also judged: ' in details


def test_of_many_ties_a_few_are_named():
    measure = Measure('held-out perplexity', items='documents', log=True)
    many = ranked({f'r{n}': np.linspace(3, 4, 40) + n / 1e7 for n in range(15)}, measure)
    assert 'Nor can any other be told from the best.' in certainty_words(many)
    many = ranked({f'r{n}': np.linspace(3, 4, 40) + n / 1e7 for n in range(15)} | dict(far=np.ones(40) * 9), measure)
    assert 'either: r2, r3 and 11 more.' in certainty_words(many)


def test_a_run_before_training_that_wins_is_named():
    assert 'In held-out perplexity, full before training is best' in compare('full before training')
    assert 'In held-out perplexity, half before training is best' in pdf_compare('half before training')


measured_by = {  # metric with _error or _ratio, by experiment -> what in the verdict stands for it
    'bench': r'(time_to_loss|tokens_per_sec)_ratio_vs_(?P<rival>trl_packed|trl_padded|hf_trainer)(_\w+)?|memory_ratio_vs_.*|runner_overhead_ratio',
    'bench_inference': r'decode_ratio_.*',
    'bench_bounds': r'.*',
    'bench_instruct': r'(time_to_loss|tokens_per_sec)_ratio_vs_(hf_padded|trl_packed)|memory_ratio_vs_hf_padded|pdf_ratio_vs_pypdf',
    'finetune': r'memory_error',  # a prediction of memory, which the comparison of runs judges
    'forecast_eval': r'(untrained_|last_value_|seasonal_|linear_autoregression_|context_parroting_|autoarima_|autoets_|'
    r'\w+_refitted_)?error_at_10',
    'forecast_summary': r'.+_error_at_10',
    'gpu_check': r'training: params/.*: memory_error',  # a prediction of memory, which is a finding of its own
    'instruct': r'pass_at_1_error',  # the spread of a mean, for which the interval stands
    'sublora_bounds': r'top\d+_error|b_ratio',  # further claims, all in the table; a setting
}


def test_every_error_and_ratio_of_a_finished_run_is_known_to_a_verdict():
    looked = 0
    for path in sorted((root / 'outputs/gallery').glob('*/*/metrics.json')):
        notebook = path.parent.parent.name
        for key in json.loads(path.read_text()):
            if '_error' in key or '_ratio' in key:
                looked += 1
                assert re.fullmatch(measured_by.get(notebook, 'none'), key), f'{notebook}: no verdict tells of {key}'
    assert looked >= 30


@pytest.mark.parametrize('error', ['error_at_10', 'mae', 'mae_median'])
def test_each_baseline_that_a_forecast_measures_is_a_rival(error):
    comparison = forecast_comparison('seasonal')
    untrained = dict.fromkeys(('mae', 'mae_median', 'mse', 'success_rate'), 1.0)
    metrics = forecasts.comparison_metrics(comparison, untrained)
    measured = {key.removesuffix(f'_{error}') for key in metrics if key.endswith(f'_{error}')}
    assert measured == {forecasts.metric_name(name) for name in (*simple, *informed, 'untrained')}
    row = metrics | dict(run='x', judged='fine-tuned', mae=1.0, mae_median=1.0, error_at_10=1.0, original_mae=1.0, original_mae_median=1.0)
    assert set(summary.rivals_of(row, error)) == {*simple, *informed, 'untrained', 'fine-tuned'}
    for step, median in ((0, True), (0, False), (forecasts.judged_step, True)):
        assert set(forecasts.rank_forecasts(comparison, step, median).values) == {'fine-tuned', 'untrained', *simple}


@pytest.mark.parametrize('start, own', [('outputs/forecast_train/final', 'fine-tuned'), ('', 'untrained')])
def test_a_summary_knows_which_model_was_judged_from_the_record(start, own):
    record = dict(run=dict(name='x', notebook='forecast_eval'), meta={}, params=dict(start=start))
    study = summary.study_rows([dict(record=record, folder='', metrics=dict(mae=0.9, last_value_mae=2.0))])
    assert summary.rivals_of(study.tests[0], 'mae') == {own: 0.9, 'last value': 2.0}
    assert f'In mean MAE, {own} is best' in summary.summary_details(study)
    unread = dict(study.tests[0], judged='fine-tuned', untrained_mae=None)
    assert summary.rivals_of(unread, 'mae') == {'fine-tuned': 0.9, 'untrained': None, 'last value': 2.0}


def test_the_ceiling_is_named_and_is_no_rival():
    comparison = forecast_comparison('fine-tuned')
    comparison.points[ceiling] = comparison.truth_NTV[:, 50:]
    said = forecasts.comparison_verdict(comparison, 'fine-tuned')
    assert said.startswith('- The fine-tuned model beats every rival that is not given the equations')
    assert f'The ceiling, {ceiling}, errs by 1.000 in the mean' in said and f'loses to {ceiling}' not in said
    row = forecast_row('fine-tuned') | dict(mae=1.0, true_equations_refitted_mae=0.02)
    row |= dict(true_equations_refitted_mae_median=0.01)
    said = summary.summary_verdict(summary.StudyRows([], [row], []), None, 0.0)
    assert f'The ceiling, {ceiling}, errs by 0.020' in said and f'to {ceiling}' not in said


def test_a_tie_with_the_strongest_rival_is_no_win():
    comparison = forecast_comparison('nobody')
    assert 'does not beat every rival' in forecasts.comparison_verdict(comparison, 'fine-tuned')


def test_scores_that_look_the_same_tie_however_sure_the_difference():
    first_N = np.linspace(3, 4, 40)
    measure = Measure('held-out perplexity', items='documents', log=True)
    near = ranked(dict(fp16=first_N, fp32=first_N + 1e-6), measure)
    assert near.differences['fp32'].clear and near.tied == ['fp16', 'fp32']
    assert place_words(near).startswith('In held-out perplexity, fp16 and fp32 tie: ')
    far = ranked(dict(fp16=first_N, nf4=first_N + 0.1), measure)
    assert place_words(far).startswith('In held-out perplexity, fp16 is best: ')


def test_a_baseline_that_nobody_thought_of_is_named_by_the_summary():
    row = forecast_row('nobody') | dict(oracle_error_at_10=0.01, oracle_mae_median=0.01)
    said = summary.summary_verdict(summary.StudyRows([], [row], []), None, 0.0)
    assert 'loses to oracle, the strongest rival' in said and '10 steps ahead 2 against 0.0100 of oracle' in said
    assert (
        'oracle'
        in summary.rival_table(
            [row | dict(asked=1, horizon=20, success_rate=1.0, precision=2, mae=1.0)]
        )._repr_html_()
    )


def test_rows_before_step_ten_and_unreadable_models():
    comparison = forecast_comparison('seasonal')
    comparison.points['untrained'] = np.full_like(comparison.points['untrained'], np.nan)
    assert 'Unknown: untrained.' in forecasts.comparison_verdict(comparison, 'fine-tuned')
    comparison.rows['fine-tuned'] = dict(comparison.rows['fine-tuned'], mae_median=None, trajectories=0)
    assert 'No forecast of the fine-tuned model could be read' in forecasts.comparison_verdict(comparison, 'fine-tuned')


def test_two_contexts_that_are_close_tie():
    rows = [
        dict(
            run=str(n), part='context', context_length=n, valid_mae=mae, valid_trajectories=6, notebook='forecast_train'
        )
        for n, mae in ((512, 1.45), (768, 1.47))
    ]
    said = summary.summary_verdict(summary.StudyRows(rows, [], []), None, 0.0)
    assert 'Lowest validation MAE of 2 context lengths: a context of 512 tokens; 1 tie with it.' in said
    said = summary.summary_details(summary.StudyRows(rows, [], []))
    assert 'In validation MAE, ' in said and ' tie: ' in said and 'is best' not in said


def test_a_final_run_that_departs_from_the_winner_says_so():
    shared = dict(valid_trajectories=6, precision=2, notebook='forecast_train')
    search = dict(shared, run='s', part='search', learning_rate=0.01, lora_rank=4, valid_mae=1.0)
    final = dict(shared, run='f', part='final', learning_rate=0.004, lora_rank=8, valid_mae=0.9)
    said = summary.summary_details(summary.StudyRows([search, final], [], []))
    assert 'learning rate 0.004, not 0.01' in said and 'rank 8, not 4' in said


def test_a_four_bit_run_is_measured_against_the_whole_base():
    before, after = judged(False), judged(True)
    worse = dict(after, document_losses=hard_N + 0.1, loss=after['loss'] + 0.1, perplexity=after['perplexity'] * 1.1)
    said = finetuning.finetuning_verdict('qlora', dict(total=5000), fitted, before, worse, after)
    assert 'lowered' in said and ', 10% above the base without quantisation' in said
    assert 'loses to the base without quantisation' in said


def test_a_run_that_made_the_model_worse_does_not_go_on_to_comparisons():
    good, bad = judged(True), judged(False)
    worse = finetuning.finetuning_verdict('lora', dict(total=5000), fitted, good, bad)
    assert worse.endswith('Next: divide learning_rate by three, since the held-out loss rose.')
    assert 'compare methods' in finetuning.finetuning_verdict('lora', dict(total=5000), fitted, bad, good)


def test_few_documents_say_so():
    few = [
        dict(judged(wins), document_losses=hard_N[:3] + far[wins], document_targets=[9] * 3) for wins in (True, False)
    ]
    said = finetuning.finetuning_verdict('lora', dict(total=5000), fitted, few[1], few[0])
    assert 'Too few documents to say' in said and 'n = 3 documents' in said


def test_no_problem_solved_is_said_first():
    none = dict(valid=judged(False), test=judged(False), attempts=[Attempt('p', 0, '', 'wrong', '', 0.1)] * 6)
    metrics = dict(steps=2, planned_steps=2, stopped='finished', best_step=2, eval_loss_before=3.0, eval_loss=2.0)
    data = SimpleNamespace(row_notes=dict(train=dict(targets=41_553, targets_lost=42_099)))
    first, _, last = code.instruct_verdict(metrics, data, none, none).split('\n')
    assert first == '- The one problem is not solved, before or after training.'
    assert '50% of the training targets were lost' in last


def test_a_model_beats_every_rival_only_where_each_is_clearly_worse():
    gaps = dict(A=Difference(0.2, 0.1, 0.3, 40, True), B=Difference(0.5, -0.1, 1.1, 40, False))
    ranking = Ranking(Measure('mean error', items='trajectories'), {'fine-tuned': 1.0, 'A': 1.2, 'B': 1.5}, gaps)
    assert 'does not beat' in forecasts._answer('fine-tuned', ranking)
    sure = replace(ranking, differences=gaps | dict(B=Difference(0.5, 0.2, 1.1, 40, True)))
    assert 'model beats' in forecasts._answer('fine-tuned', sure)


def test_a_model_that_won_is_not_told_to_beat_the_second():
    said = forecasts.comparison_verdict(forecast_comparison('fine-tuned'), 'fine-tuned')
    assert 'model beats every rival' in said and 'until it beats' not in said
    lost = forecasts.comparison_verdict(forecast_comparison('seasonal'), 'fine-tuned')
    assert 'until it beats seasonal' in lost


def test_training_that_goes_on_is_compared_with_the_adapter_it_started_from():
    errors = dict(best=hard_N, before=hard_N + far[False])
    curve = dict(step=20, mae=1.0, trajectories=items)
    outcome = forecast_training.TrainingOutcome(curve, curve, [curve], 20, 1e12, 0.4, 0.0, errors, 50)
    for start, name in (('outputs/forecast_train/x', 'the adapter it started from'), ('', 'untrained')):
        params = SimpleNamespace(valid_horizon=10, max_steps=20, start=start)
        assert f'for {name}, the strongest rival' in forecast_training.training_verdict(params, outcome, fitted.progress)


def tuned(name, tokenizer, bits, bytes_per_token, sha256='same'):
    "A finished fine-tuning run, as `read_result` gives it."
    loss = bits * math.log(2) * bytes_per_token
    quality = dict(perplexity_before=math.exp(loss + 1), perplexity_after=math.exp(loss), bits_per_byte_after=bits)
    cost = dict(time_per_epoch_seconds=1.0, peak_memory_gb=1.0, learning_rate=1e-3, method='lora')
    meta = dict(tokenizer=tokenizer, data=dict(valid=dict(sha256=sha256)))
    record = dict(run=dict(name=name, notebook='finetune'), meta=meta, params=dict(max_length=256, model=tokenizer))
    return dict(record=record, metrics=quality | cost, folder='')


def test_perplexities_of_two_tokenizers_are_not_compared():
    runs = dict(fine=tuned('fine', 'words', 1.0, 4.0), worse=tuned('worse', 'letters', 1.5, 1.5))
    assert not finetune_runs.same_held_out(runs)
    said = finetune_runs.comparison_verdict(runs)
    assert 'perplexities cannot be compared. In held-out bits per byte, fine is best: 1 against 1.50' in said
    assert 'In held-out perplexity' not in said and finetune_runs.best_run(finetune_runs.run_metrics(runs))['run'] == 'fine'
    assert finetune_runs.matrix_of(runs) == {}
    same = dict(fine=tuned('fine', 'words', 1.0, 4.0), worse=tuned('worse', 'words', 1.5, 4.0))
    assert 'In held-out perplexity, fine is best' in finetune_runs.comparison_verdict(same)


def test_scores_of_other_tokens_are_not_paired(tmp_path):
    for name, targets in dict(one=[10, 20, 30], two=[12, 20, 30]).items():
        (tmp_path / name).mkdir()
        judged = dict(document_losses=[1.0, 2.0, 3.0], document_targets=targets)
        keep_judged(tmp_path / name, 'the same text', dict(after=judged))
    folders = {name: tmp_path / name for name in ('one', 'two')}
    assert paired_scores(folders, held_out_loss, 'after') == (None, None)
    assert paired_scores(dict(one=tmp_path / 'one'), held_out_loss, 'after')[1] == [10, 20, 30]
