"Instruction tuning and the study of PDFs, end to end and as small as they go."

import json
import re
from types import SimpleNamespace

import pytest
from verifying import assert_computed_again

from llmft.core import project_root
from llmft.runs.execute import execute_run
from llmft.runs.numbers import show_number
from llmft.runs.params import resolve_params
from llmft.studies.code.published import course_figure, course_table, reference_losses
from llmft.studies.code.setup import task_data

root = project_root()


def overrides(**values):
    return [f'{name}={value if isinstance(value, str) else json.dumps(value)}' for name, value in values.items()]


def execute(config, outputs, scale='small', **values):
    notebook, params = resolve_params([root / config], overrides(outputs=str(outputs), **values), scale)
    return execute_run(notebook, params, on_line=lambda line: None), outputs / notebook.stem / params['name']


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp('outputs')


@pytest.fixture(scope='module')
def instruct(outputs):
    "Rows of one's own, early stopping after two evaluations without a better one, two problems that are run."
    rows = [
        dict(
            input=f'Return {n}.',
            solution=f'return {n}' if n < 24 else 'zebra ' * 5,
            split='train' if n < 24 else 'valid' if n < 28 else 'test',
            tests=['assert f() == 1'] * (n > 29),
        )
        for n in range(32)
    ]
    rows += [dict(input='Return f.', solution='def f(): return 1', split='test', tests=['assert f() == 1'])]
    data = outputs / 'rows.jsonl'
    data.write_text('\n'.join(map(json.dumps, rows)))
    return execute(
        'params/instruct/diverse.yaml',
        outputs,
        data=str(data),
        num_samples=0,
        max_length=96,
        batch_size=4,
        gradient_accumulation=1,
        learning_rate=0.05,
        eval_every=1,
        save_every=1,
        num_problems=3,
        sample_tokens=8,
        max_steps=12,
    )


def test_instruct_stops_early_and_keeps_the_best(instruct):
    record, folder = instruct
    assert record['run']['status'] == 'done', record['run']['error']
    metrics, log = (
        json.loads((folder / 'metrics.json').read_text()),
        [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()],
    )
    held_out = {row['step']: row['valid_loss'] for row in log if 'valid_loss' in row}
    assert metrics['stopped'] == 'early stopping' and metrics['steps'] < metrics['planned_steps'] == 12
    assert metrics['best_step'] == min(held_out, key=held_out.get) == metrics['steps'] - 2
    assert metrics['eval_loss'] == pytest.approx(held_out[metrics['best_step']], abs=1e-4)
    assert metrics['problems'] == 1, 'of the three problems only one has a reference solution that passes'
    assert [row['step'] for row in record['train']['checkpoints']] == [0, *held_out]


def test_the_losses_of_instruct_are_computed_again(instruct):
    assert_computed_again('instruct', instruct[1])


def test_instruct_reports(instruct):
    _, folder = instruct
    page = (folder / 'report.html').read_text()
    assert (
        all(
            words in page
            for words in ('pass@1', '.8158', 'real tokens', 'left out because their reference solution fails')
        )
        or '0.81580' in page
    )
    assert {path.name for path in (folder / 'figures').iterdir()} == {
        'lengths.png',
        'loss.png',
        'learning_rate.png',
        'courses.png',
    } and (folder / 'adapter' / 'adapter_model.safetensors').exists()
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert f"diverse, step 0: held-out loss {show_number(metrics['eval_loss_before'])}" in page
    assert metrics['fill'] == 1.0 and metrics['padded_fill'] < 0.9 and metrics['pass_at_1'] in (0.0, 1.0)


def test_the_best_so_far_means_the_same_for_both_courses():
    log = [dict(step=step, valid_loss=loss) for step, loss in reference_losses.items()]
    page = course_table('ours', SimpleNamespace(model='base', loss_on='all'), log, 1)
    marks = re.findall(r'<td[^>]*>(yes|no)<', page)
    assert marks == ['yes'] * 5 + ['no'] * 2 + ['yes'] * 5 + ['no'] * 2


def test_courses_lie_within_their_panels():
    log = [dict(step=step, valid_loss=9 - step) for step in (1, 2, 3)]
    plot = course_figure('ours', log, 3)
    plot.draw_without_rendering()
    for axes, evaluations in zip(plot.axes, (len(reference_losses), len(log)), strict=True):
        shares, losses = axes.lines[0].get_data()
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert len(shares) == evaluations and left <= min(shares) and max(shares) <= right
        assert low < min(losses) and max(losses) < high and high - low < 2 * (max(losses) - min(losses))


@pytest.fixture(scope='module')
def pdfs(outputs):
    "In two processes, which build their data from what the notebook has extracted."
    return execute(
        'params/pdf_finetune/all.yaml',
        outputs,
        nproc=2,
        strategy='ddp',
        max_pages=1,
        max_length=96,
        chunk_characters=300,
        largest_batch=4,
        target_effective_batch=8,
        max_steps=3,
        eval_every=3,
    )


def test_pdfs_leave_the_artefacts_of_the_study(pdfs):
    record, folder = pdfs
    assert record['run']['status'] == 'done', record['run']['error']
    metrics = json.loads((folder / 'metrics.json').read_text())
    split, search = (json.loads((folder / name).read_text()) for name in ('split_info.json', 'batch_search.json'))
    assert (
        set(split) == {'train_files', 'test_files', 'train_size', 'test_size', 'created_at'}
        and split['train_size'] == metrics['train_files']
    )
    assert (
        search['batch'] == metrics['max_batch_size']
        and metrics['effective_batch_size'] == 8
        and metrics['batch_size'] <= search['batch']
    )
    log = (folder / 'training.log').read_text().splitlines()
    assert len(log) == 4 and 'loss=' in log[0] and 'valid_perplexity=' in log[-1]
    stats = dict(line.split(': ', 1) for line in (folder / 'training_stats.txt').read_text().splitlines())
    assert (
        float(stats['Final perplexity']) == pytest.approx(metrics['perplexity_after'], abs=1e-3)
        and stats['Effective batch size'] == '8'
    )
    assert json.loads(stats['Arguments'])['max_pages'] == 1 and set(stats) == {
        'Training completed at',
        'Maximum batch size',
        'Gradient accumulation steps',
        'Effective batch size',
        'Final perplexity',
        'Training time',
        'Arguments',
    }


def test_two_processes_trained_it(pdfs):
    _, folder = pdfs
    order = json.loads((folder / 'launch' / 'order.json').read_text())
    assert order['processes']['nproc'] == 2 and (folder / 'launch' / 'result.json').exists()
    log = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert log[0]['step'] == 1 and 'valid_loss' in log[-1]


def test_the_losses_of_pdfs_are_computed_again(pdfs):
    assert_computed_again('pdf_finetune', pdfs[1])


def test_the_studys_report_has_no_blank(pdfs):
    _, folder = pdfs
    report = (folder / 'report.md').read_text()
    for blank in (
        'Per device batch size',
        'Gradient accumulation steps',
        'Effective batch size',
        'GPU',
        'Memory usage',
        'Training time',
        'Perplexity on test set',
        'Interpretation',
        'Conclusion',
    ):
        assert f'**{blank}' in report
    assert 'FILL' not in report and 'None' not in report and 'nan' not in report
    page = (folder / 'report.html').read_text()
    assert all(f'{name}.pdf' in page for name in ('encrypted', 'broken', 'scanned', 'empty', 'short')) and {
        'lengths.png',
        'batch_search.png',
        'loss.png',
    } == {path.name for path in (folder / 'figures').iterdir()}


def test_the_histogram_has_the_chunks_before_the_cut(pdfs):
    record, folder = pdfs
    notes = record['meta']['notes']['train']
    page = (folder / 'report.html').read_text()
    assert notes['too_long'] and f"n = {notes['documents']:,} · " in page
    assert f"limit 96: {notes['too_long']:,} longer" in page
    assert 'all, step 0: held-out loss ' in page


def test_rows_that_are_dropped_are_in_the_histogram(tmp_path):
    rows = [dict(input='Return it.', solution='return 1' + ' + 1' * 9 * n, split='train') for n in range(8)]
    rows += [dict(input='Return 2.', solution='return 2', split=split) for split in ('valid', 'test')]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    values = overrides(data=str(tmp_path / 'rows.jsonl'), max_length=96, num_samples=0, too_long='drop', model='base')
    _, params = resolve_params([root / 'params/instruct/diverse.yaml'], values, 'small')
    data = task_data(SimpleNamespace(**params))
    assert 0 < len(data.examples['train']) < len(data.lengths) == 8
    assert (data.lengths > 96).sum() == data.row_notes['train']['too_long'] == 8 - len(data.examples['train'])


def test_the_comparison_reads_it(pdfs, outputs):
    record, folder = execute('nbs/experiments/pdf_compare.ipynb', outputs, scale='')
    assert record['run']['status'] == 'done', record['run']['error']
    assert json.loads((folder / 'metrics.json').read_text())['widest'] == 'all'


@pytest.mark.parametrize(
    'config, rows, per_epoch, total, warmup, trainable',
    [
        ('diverse', 4530, 284, 852, 26, 36_929_536),
        ('diverse_high_capacity', 4530, 284, 1136, 57, 73_859_072),
        ('diverse_reasoning', 4530, 284, 852, 26, 36_929_536),
        ('diverse_fast', 4530, 284, 852, 26, 36_929_536),
    ],
)
def test_full_scale_files_hold_the_studys_numbers(config, rows, per_epoch, total, warmup, trainable):
    from types import SimpleNamespace

    from llmft.models.cost import lora_parameter_count, parameter_count
    from llmft.models.load import model_config
    from llmft.training.prepare import planned_steps
    from llmft.training.recipe import Recipe, warmup_steps

    _, params = resolve_params([root / f'params/instruct/{config}.yaml'])
    recipe, shape = Recipe.from_params(SimpleNamespace(**params)), model_config(params['model'])
    assert (
        planned_steps(rows, Recipe(**{**vars(recipe), 'num_epochs': 1.0})),
        planned_steps(rows, recipe),
        warmup_steps(recipe, total),
    ) == (per_epoch, total, warmup)
    assert (
        lora_parameter_count(shape, params['lora_rank'], params['lora_targets']) == trainable
        and parameter_count(shape)['total'] == 1_543_714_304
    )
    assert (
        params['lora_alpha'],
        params['lora_dropout'],
        recipe.weight_decay,
        recipe.clip,
        recipe.beta1,
        recipe.beta2,
        recipe.patience,
        params['eval_every'],
        params['log_every'],
        params['num_samples'],
    ) == (2.0 * params['lora_rank'], 0.1, 0.01, 1.0, 0.9, 0.999, 2, 100, 20, rows)


def test_the_pdf_files_hold_the_studys_numbers():
    for config, changed in dict(
        all={},
        lora_only=dict(quantisation='none', gradient_checkpointing=False, optimiser='adamw'),
        int8=dict(quantisation='int8'),
        r16=dict(lora_rank=16, lora_alpha=64.0),
        bf16=dict(precision='bf16'),
        wide_search=dict(smallest_batch=1, largest_batch=128),
    ).items():
        _, params = resolve_params([root / f'params/pdf_finetune/{config}.yaml'])
        expected = dict(
            quantisation='nf4',
            precision='fp16',
            optimiser='paged_adamw_8bit',
            gradient_checkpointing=True,
            lora_rank=8,
            lora_alpha=32.0,
            lora_dropout=0.1,
            lora_targets=['q_proj', 'k_proj', 'v_proj', 'o_proj'],
            max_length=512,
            max_pages=30,
            min_characters=500,
            target_effective_batch=32,
            test_share=0.1,
            seed=42,
            smallest_batch=2,
            largest_batch=32,
        )
        assert {key: params[key] for key in expected} == expected | changed, config
