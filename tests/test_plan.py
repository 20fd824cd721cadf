"""A plan against the study's figures and against what runs do: parameters, steps, tokens, operations, memory."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmft.cli import call
from llmft.core import LabError, project_root
from llmft.data.batches import Plan, micro_batches
from llmft.data.sources import fetched
from llmft.data.tokens import Examples
from llmft.models.adapters import add_lora
from llmft.models.cost import memory_breakdown
from llmft.models.load import load_model, model_config
from llmft.models.methods import Method
from llmft.runs import plan as planning
from llmft.runs.params import resolve_params
from llmft.runs.plan import (
    count_memory,
    count_rows,
    count_steps,
    count_work,
    find_device,
    make_plan,
    padded_lengths,
    plan_text,
    read_lengths,
    settings_of,
    trains_a_model,
)
from llmft.training.fit import fit
from llmft.training.recipe import Recipe, optimisers

root = project_root()
attention = ['q_proj', 'k_proj', 'v_proj', 'o_proj']


def params_of(config, *overrides, scale=''):
    return resolve_params([root / 'params' / config], overrides, scale)[1]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    "Any attempt to read weights fails."
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError('weights were asked for')

    monkeypatch.setattr(transformers.AutoModelForCausalLM, 'from_pretrained', refuse)
    monkeypatch.setattr('llmft.models.load.load_model', refuse)


@pytest.mark.parametrize(
    'config, trainable, weights',
    [
        ('full', 3_212_749_824, 5.98),
        ('lora', 4_587_520, 5.98),
        ('qlora', 4_587_520, 2.09),
        ('qlora_gc', 4_587_520, 2.09),
    ],
)
def test_figures_of_the_matrix_study(nothing_is_loaded, config, trainable, weights):
    plan = make_plan(params_of(f'finetune/{config}.yaml', 'precision=fp16', 'mixed_precision=no'), gpu='rtx5090')
    assert (plan['parameters'], plan['trainable']) == (3_212_749_824, trainable)
    own = plan['memory']['weights'] - (0 if config == 'full' else 4 * trainable)
    assert abs(own / 2**30 / weights - 1) < 0.01
    assert (plan['rows'], plan['steps_per_epoch'], plan['steps']) == (4000, 1000, 2000)
    assert plan['quantised_share'] == (
        0 if weights > 3 else 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192) / 3_212_749_824
    )


def test_figures_of_the_instruction_study(nothing_is_loaded):
    plan = make_plan(
        dict(
            model='Qwen/Qwen2.5-Coder-1.5B-Instruct',
            method='lora',
            precision='bf16',
            lora_rank=32,
            lora_targets=[*attention, 'gate_proj', 'up_proj', 'down_proj'],
            lora_dropout=0.1,
            batch_size=4,
            gradient_accumulation=4,
            num_epochs=3.0,
            max_length=1024,
            warmup_ratio=0.03,
            gradient_checkpointing=True,
            num_samples=0,
        ),
        gpu='a100-40gb',
        rows=4530,
    )
    assert (plan['parameters'], plan['trainable']) == (1_543_714_304, 36_929_536)
    assert (plan['steps_per_epoch'], plan['steps'], plan['warmup_steps'], plan['rows_from']) == (284, 852, 26, 'stated')


@pytest.mark.parametrize(
    'overrides, trainable, computed',
    [
        ([], 200, 14_336),
        (['projection=identity'], 14_336, None),
        (['lora_targets=[]', 'intrinsic_dim=7'], 7, 3_901_696),
    ],
)
def test_the_plan_of_a_subspace_counts_its_coordinates(nothing_is_loaded, overrides, trainable, computed):
    plan = make_plan(params_of('sublora_train/finetune.yaml', *overrides))
    assert (plan['trainable'], plan['computed']) == (trainable, computed)
    assert plan['method'] == ('full' if 'lora_targets=[]' in overrides else 'lora')


def test_plan_command_needs_no_weights_and_no_network(nothing_is_loaded, capsys):
    assert call(['plan', str(root / 'params/finetune/qlora.yaml'), '--gpu', 'h100', '--json']) == 0
    (plan,) = json.loads(capsys.readouterr().out)['plans']
    assert plan['run'] == 'finetune/qlora' and plan['steps'] == 2000 and plan['device']['peak_flops'] == 989e12
    assert (
        plan['seconds'] == pytest.approx(plan['flops'] / (989e12 * plan['share_of_peak']))
        and plan['memory']['total'] < 16 * 2**30
    )
    assert call(['plan', str(root / 'params/finetune/qlora.yaml'), '--gpu', 'h100', '--share', '0.2', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['plans'][0]['seconds'] == pytest.approx(2 * plan['seconds'])
    assert call(['plan', str(root / 'params/sweeps/finetune_matrix.yaml'), '--gpu', 't4']) == 0
    out = capsys.readouterr().out
    assert (
        'finetune/matrix-full' in out
        and 'False' in out.split('matrix-full')[1].splitlines()[0]
        and 'True' in out.split('matrix-qlora_gc')[1].splitlines()[0]
    )


@pytest.mark.parametrize(
    'words, message',
    [
        (['--gpu', 'h1000'], "did you mean 'h100'"),
        (['--share', '1.5'], '--share 1.5'),
        (['--rows', '0'], '--rows 0'),
        (['-p', 'lora_targets=[q_prj]'], 'q_proj'),
        (['-p', 'model=nobody/nothing'], 'nobody/nothing'),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words, message, capsys):
    assert call(['plan', str(root / 'params/finetune/lora.yaml'), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith('llmft: ') and '\n' not in error


with_a_model = [
    path
    for path in sorted((root / 'params').glob('*/[!_]*.yaml'))
    if path.parent.name != 'sweeps' and trains_a_model(resolve_params([path])[1])
]


@pytest.mark.parametrize('path', with_a_model, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_config_can_be_planned(path):
    "Whichever notebook it belongs to, a number of rows is all that may be missing."
    plan = make_plan(resolve_params([path])[1], gpu='h100', rows=4530)
    assert (
        len(with_a_model) >= 25
        and all(plan[key] for key in ('parameters', 'trainable', 'steps', 'flops', 'seconds'))
        and 2**20 < plan['memory']['total'] < 80 * 2**30
    )
    if path.stem == 'diverse':
        assert (plan['trainable'], plan['steps_per_epoch'], plan['steps'], plan['warmup_steps']) == (
            36_929_536,
            284,
            852,
            26,
        )


def test_runs_without_a_model_are_refused(capsys):
    assert (
        call(['plan', str(root / 'params/bench/training.yaml')]) == 2 and 'nothing to plan' in capsys.readouterr().err
    )


def test_what_is_not_known_is_none():
    plan = make_plan(dict(model='preset:gpt2', num_epochs=3.0), gpu='t4')
    assert [
        plan[key] for key in ('rows', 'steps', 'steps_per_epoch', 'warmup_steps', 'tokens', 'flops', 'seconds')
    ] == [None] * 7 and plan['parameters'] == 124_439_808
    assert '0 FLOPs' not in plan_text(plan) and 'time        –' in plan_text(plan)


def test_an_unknown_architecture_reads_its_config(tmp_path):
    "Parameters are counted on the meta device; what would need formulas is unknown."
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        'gemma',
        vocab_size=300,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    plan = make_plan(
        dict(
            model=str(tmp_path),
            method='lora',
            lora_rank=4,
            lora_targets=['q_proj', 'v_proj'],
            batch_size=4,
            num_samples=20,
            num_epochs=2.0,
        ),
        gpu='l4',
    )
    assert plan['parameters'] == sum(parameter.numel() for parameter in model.parameters())
    assert plan['trainable'] == sum(
        parameter.numel()
        for parameter in add_lora(model, 4, 8, 0.0, ['q_proj', 'v_proj'], 0).parameters()
        if parameter.requires_grad
    )
    assert (plan['steps'], plan['memory'], plan['flops'], plan['fits']) == (
        10,
        None,
        None,
        None,
    ) and 'time        –' in plan_text(plan)


def examples(lengths):
    ends = np.cumsum([length + 1 for length in lengths])
    return Examples(
        np.random.default_rng(0).integers(5, 500, ends[-1]).astype(np.uint16), ends - np.array(lengths) - 1, ends
    )


@pytest.mark.parametrize('layout', ['packed', 'bucketed', 'padded'])
def test_planned_work_is_the_work_done(layout, tmp_path):
    "Rows, steps, tokens, slots and operations of a plan are those that `fit` counts."
    lengths = [5, 31, 8, 32, 17, 4, 29, 12, 9, 30, 3]
    values = dict(
        model='preset:llama-tiny',
        method='lora',
        lora_rank=4,
        lora_targets=attention,
        batch_size=2,
        gradient_accumulation=2,
        max_length=32,
        layout=layout,
        num_epochs=2.0,
        warmup_ratio=0.1,
        gradient_checkpointing=True,
    )
    settings = settings_of(values)
    config = model_config('preset:llama-tiny')
    steps = count_steps(settings, len(lengths))
    work = count_work(config, settings, steps, len(lengths), lengths)
    net = add_lora(load_model('preset:llama-tiny'), 4, 8, 0.0, attention, 0)
    done = fit(
        net,
        examples(lengths),
        None,
        tmp_path,
        Recipe(
            batch_size=2,
            gradient_accumulation=2,
            max_length=32,
            layout=layout,
            num_epochs=2.0,
            warmup_ratio=0.1,
            gradient_checkpointing=True,
        ),
    )
    assert (
        (steps['total'], steps['per_epoch'], steps['warmup'])
        == (done.steps, done.steps_per_epoch, done.warmup)
        == (6, 3, 1)
    )
    assert work['tokens'] == done.progress.tokens == 2 * sum(lengths)
    if layout == 'packed':
        assert work['slots'] == done.progress.slots
    assert work['flops'] == pytest.approx(done.progress.flops, rel=0.02)


@pytest.mark.parametrize('layout', ['bucketed', 'padded'])
def test_padding_of_an_epoch_is_that_of_its_batches(layout):
    lengths = [5, 31, 8, 32, 17, 4, 29, 12, 9, 30, 3]
    settings = settings_of(dict(batch_size=2, gradient_accumulation=2, layout=layout, seed=7))
    some = examples(lengths)
    order = Plan(len(lengths), 4, 7)
    slots = sum(
        batch.slots
        for step in range(order.steps_per_epoch)
        for batch in micro_batches(some, order.step(step), 2, 32, layout)
    )
    assert sum(padded_lengths(settings, lengths)) == slots > sum(lengths)


def test_rows_of_local_text_are_those_of_the_run():
    "The plan of a small config counts what the notebook's own Data cell would train on."
    from llmft.data.corpora import load_corpus
    from llmft.data.tokens import cut, encode, load_tokenizer

    params = params_of('finetune/lora.yaml', 'num_samples=9', 'max_length=64', scale='small')
    train, _ = cut(
        encode(load_corpus('builtin:topics', num_samples=9).train.texts, load_tokenizer('base')), 64, 'split'
    )
    assert read_lengths(settings_of(params)) == train.slots.tolist()
    assert count_rows(settings_of(params), None, train.slots) == (len(train), 'counted in the data')


def test_more_processes_hold_less_and_do_the_same():
    study = params_of('finetune/full.yaml')
    plans = {
        strategy: make_plan(study | dict(nproc=2 * (strategy != 'none') or 1, strategy=strategy), gpu='h100')
        for strategy in ('none', 'ddp', 'zero2', 'zero3')
    }
    assert len({(plan['steps'], plan['flops'], plan['parameters']) for plan in plans.values()}) == 1
    assert plans['ddp']['seconds'] == pytest.approx(plans['none']['seconds'] / 2)
    memory = {name: plan['memory'] for name, plan in plans.items()}
    assert (
        memory['zero2']['optimiser'] * 2 == memory['none']['optimiser']
        and memory['zero2']['weights'] == memory['none']['weights']
    )
    assert (
        memory['zero3']['weights'] * 2 == memory['none']['weights']
        and memory['ddp']['total'] > memory['zero2']['total'] > memory['zero3']['total']
    )
    with pytest.raises(LabError, match='share the work'):
        make_plan(study | dict(nproc=2), gpu='h100')


def test_devices():
    assert (
        find_device('A100-80GB', 'bf16')['peak_flops'] == 312e12
        and find_device('a100-80gb', 'fp32')['peak_flops'] == 19.5e12
    )
    for name in ('NVIDIA H100', 'nvidia h100', 'NVIDIA-H100', 'nvidia_h100', 'H100'):
        assert find_device(name) == find_device('h100'), name
    assert find_device('NVIDIA RTX 4090')['name'] == 'rtx4090'
    here = find_device()
    assert (
        here['name'] == 'this machine'
        and here['memory_bytes'] > 2**30
        and here['source'].startswith(('measured here', 'never measured'))
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='the count of tensors is for the CPU')
@pytest.mark.parametrize('row', ['full', 'lora', 'lora_gc', 'qlora', 'qlora_gc'])
def test_predicted_memory_is_within_15_percent_of_the_measured(row, tmp_path):
    "Every row of the small matrix: the shipped model, what its sweep says, three steps of real training."
    from llmft.runs.sweep_file import sweep_points

    params = next(
        point.params
        for point in sweep_points(root / 'params/sweeps/finetune_matrix.yaml', 'small')
        if point.params['name'] == f'matrix-{row}'
    )
    net = load_model('base', params['precision'], params['quantisation'] if params['method'] == 'qlora' else 'none')
    if params['method'] != 'full':
        net = add_lora(
            net, params['lora_rank'], params['lora_alpha'], params['lora_dropout'], params['lora_targets'], 0
        )
    full = np.random.default_rng(0).integers(200, 257, 12).tolist()
    done = fit(
        net,
        examples(full),
        None,
        tmp_path,
        Recipe.from_params(type('Params', (), params | dict(max_steps=3, num_epochs=1.0))),
    )
    predicted = memory_breakdown(
        net.config,
        Method.of(net),
        tokens=done.watched['slots'],
        longest=done.watched['longest'],
        optimiser=optimisers['adamw'],
        gradient_checkpointing=params['gradient_checkpointing'],
        device='cpu',
    )
    assert done.watched['step'] == 3 and done.peak_bytes == done.watched['bytes']
    assert abs(predicted['total'] / done.peak_bytes - 1) < 0.08, {
        name: round(value / 2**20, 1) for name, value in predicted.items()
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason='the count of tensors is for the CPU')
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('again', [False, True], ids=['', 'checkpointing'])
def test_predicted_memory_of_dora_is_within_15_percent_of_the_measured(again, dropout, tmp_path):
    net = add_lora(load_model('base'), 8, 16.0, dropout, attention, 0, dora=True)
    full = np.random.default_rng(0).integers(200, 257, 12).tolist()
    recipe = Recipe(batch_size=4, max_length=256, max_steps=3, gradient_checkpointing=again)
    done = fit(net, examples(full), None, tmp_path, recipe)
    step = dict(tokens=done.watched['slots'], longest=done.watched['longest'], optimiser=optimisers['adamw'])
    predicted = memory_breakdown(net.config, Method.of(net), gradient_checkpointing=again, device='cpu', **step)
    assert abs(predicted['total'] / done.peak_bytes - 1) < 0.15, predicted


@pytest.mark.skipif(torch.cuda.is_available(), reason='the count of tensors is for the CPU')
@pytest.mark.parametrize('mixed', ['no', 'bf16'])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('quantisation', ['nf4', 'int8'])
def test_predicted_memory_of_quantised_layers_is_near_the_measured(quantisation, dropout, mixed, tmp_path):
    net = add_lora(load_model('base', quantisation=quantisation), 8, 16.0, dropout, ['q_proj', 'v_proj'], 0)
    full = np.random.default_rng(0).integers(200, 257, 12).tolist()
    recipe = Recipe(batch_size=4, max_length=256, max_steps=3, mixed_precision=mixed)
    done = fit(net, examples(full), None, tmp_path, recipe)
    step = dict(tokens=done.watched['slots'], longest=done.watched['longest'], optimiser=optimisers['adamw'])
    predicted = memory_breakdown(net.config, Method.of(net), mixed=mixed == 'bf16', device='cpu', **step)
    assert abs(predicted['total'] / done.peak_bytes - 1) < 0.08, predicted


def test_full_fine_tuning_keeps_weights_that_its_rate_can_move(capsys):
    memory = make_plan(params_of('finetune/full.yaml'), gpu='h100')['memory']
    assert memory['weights'] == memory['gradients'] == memory['optimiser'] / 2 == 4 * 3_212_749_824
    assert 50 < memory['total'] / 2**30 < 60 and memory['copies'] > 0
    held_in_bf16 = ['precision=bf16', 'mixed_precision=no']
    with pytest.raises(LabError, match='use precision fp32 with mixed_precision bf16, or a rate of 0.0001 or more'):
        make_plan(params_of('finetune/full.yaml', *held_in_bf16), gpu='h100')
    make_plan(params_of('finetune/full.yaml', *held_in_bf16, 'learning_rate=1e-4'), gpu='h100')
    make_plan(params_of('finetune/lora.yaml', *held_in_bf16, 'learning_rate=1e-5'), gpu='h100')


@pytest.mark.parametrize('scale, gpu', [('', 'h100'), ('laptop', '')])
def test_memory_that_the_first_pages_name_is_what_the_plan_says(scale, gpu):
    if scale == 'laptop' and fetched('smollm2') is None:
        pytest.skip('SmolLM2 is not on this machine: llmft fetch smollm2')
    files = [str(root / f'params/finetune/{method}.yaml') for method in ('full', 'lora', 'qlora')]
    plans = [make_plan(resolve_params([file], [], scale)[1], gpu=gpu) for file in files]
    sizes = [f"{plan['memory']['total'] / 2**30:.3g}" for plan in plans]
    row = r'\| {} GiB \| {} GiB[^|]*\| {} GiB \|'.format(*sizes)
    assert re.search(row, (root / 'nbs/guides/get-started.qmd').read_text()), sizes
    for page in ('README.md', 'nbs/index.ipynb'):
        text = (root / page).read_text()
        assert all(size in text for size in sizes), f'{page}: {sizes}'


def test_short_rows_fill_the_micro_batches_of_a_packed_step():
    params = params_of('finetune/lora.yaml', 'model=preset:llama-50m', 'max_length=512', 'batch_size=4')
    settings = settings_of(params | dict(gradient_accumulation=8, layout='packed'))
    config = model_config('preset:llama-50m')
    short = [60] * 32
    filled = count_memory(config, settings, 'cpu', short)['total']
    assert filled == count_memory(config, replace(settings, batch_size=16, gradient_accumulation=2), 'cpu', short)['total']
    padded = count_memory(config, replace(settings, layout='padded'), 'cpu', short)['total']
    assert padded < filled < count_memory(config, settings, 'cpu')['total']


def test_processes_on_one_processor_share_its_speed_and_its_memory():
    params = params_of('finetune/lora.yaml', 'model=base', 'strategy=ddp', 'nproc=2')
    two, one = make_plan(params), make_plan(params | dict(strategy='none', nproc=1))
    if two['device']['kind'] == 'cuda':
        pytest.skip('a GPU each')
    assert two['seconds'] == pytest.approx(one['seconds'], rel=0.05)
    device = dict(two['device'], memory_bytes=1.5 * two['memory']['total'])
    assert not planning._card_facts(two['memory'], device, 2)['fits'] and planning._card_facts(two['memory'], device, 1)['fits']
