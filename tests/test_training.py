"The promises of the fit loop: exact resume after kill -9, damaged checkpoints found, steps that do not depend on their layout."

import errno
import json
import math
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training_runs
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmft.core import LabError, share_of
from llmft.data.batches import micro_batches
from llmft.data.tokens import Examples
from llmft.inference.decoder import is_lean
from llmft.models.adapters import add_lora
from llmft.models.load import load_model, presets
from llmft.training import checkpoints
from llmft.training import fit as training
from llmft.training.fit import fit
from llmft.training.recipe import Recipe, make_optimiser, warmup_steps
from llmft.training.step import LossModel, accumulate, evaluate_loss, set_gradient_checkpointing, step_batches

examples = training_runs.examples
timing = ('seconds', 'tokens_per_sec')


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp('straight')
    assert training_runs.run(folder) == 0
    return folder


def log_of(folder):
    rows = [json.loads(line) for line in (Path(folder) / 'log.jsonl').read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


def final(folder):
    newest = checkpoints.checkpoints(Path(folder) / 'checkpoints')[0]
    return newest.name, {file.stem: load_file(file) for file in newest.glob('*.safetensors')}


def assert_same_run(one, other):
    (name, groups), (other_name, other_groups) = final(one), final(other)
    assert name == other_name == f'step-{training_runs.STEPS:06d}'
    assert set(groups) == {'weights', 'optimiser', 'random'}
    for stem, tensors in groups.items():
        assert len(tensors) > 0 and set(tensors) == set(other_groups[stem])
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other_groups[stem][key]), (stem, key)
    assert log_of(one) == log_of(other)


@pytest.mark.parametrize(
    'point',
    [
        'inside an epoch',
        'at the end of an epoch',
        'in the first step',
        'between writing and renaming',
        'during an evaluation',
    ],
)
def test_killed_and_resumed_is_the_same_run(straight, tmp_path, point):
    assert training_runs.run(tmp_path, point) == -signal.SIGKILL
    assert training_runs.run(tmp_path) == 0
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize('point, newest', [('Ctrl-C', 12), ('Ctrl-C twice', 10)])
def test_ctrl_c_saves_the_step_it_came_in_and_a_second_one_does_not_wait(straight, tmp_path, point, newest):
    assert training_runs.run(tmp_path, point) == 1  # ended by KeyboardInterrupt
    assert final(tmp_path)[0] == f'step-{newest:06d}'
    assert training_runs.run(tmp_path) == 0
    assert_same_run(straight, tmp_path)


def test_the_log_has_every_step_once(straight):
    steps = [row['step'] for row in log_of(straight) if 'loss' in row]
    assert steps == list(range(1, training_runs.STEPS + 1))
    assert [row['step'] for row in log_of(straight) if 'valid_loss' in row] == [10, 20, 30, 40]


def test_another_seed_is_another_run(straight, tmp_path):
    assert training_runs.run(tmp_path, seed=7) == 0
    assert log_of(tmp_path)[0]['loss'] != log_of(straight)[0]['loss']


def test_another_recipe_is_refused(straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    with pytest.raises(LabError, match='belongs to another run .recipe differ'):
        train_here(tmp_path / 'run', learning_rate=5e-3)


def test_other_data_of_the_same_size_is_refused(straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    train, valid = examples(), examples(6, seed=1)
    other = Examples(train.ids[::-1].copy(), train.starts, train.ends)
    with pytest.raises(LabError, match='belongs to another run .content differ'):
        train_here(tmp_path / 'run', train=other)
    other = Examples(valid.ids + 1, valid.starts, valid.ends)
    with pytest.raises(LabError, match='belongs to another run .content differ'):
        train_here(tmp_path / 'run', valid=other)


def forge(log):
    lines = log.read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | dict(loss=0.5))
    log.write_text('\n'.join(lines) + '\n')


log_harms = dict(
    forged=(forge, 'log.jsonl was changed'),
    cut=(lambda log: log.write_text(''.join(log.read_text().splitlines(keepends=True)[:-3])), 'has 41 of them'),
    gap=(lambda log: log.write_text(''.join(log.read_text().splitlines(keepends=True)[3:])), 'has 41 of them'),
    emptied=(lambda log: log.write_text(''), 'has 0 of them'),
    deleted=(Path.unlink, 'has 0 of them'),
    binary=(lambda log: log.write_bytes(b'\xff' * 4000), 'has 1 of them'),
)


@pytest.mark.parametrize('harm', log_harms)
def test_a_log_that_was_altered_before_a_resume_is_refused(straight, tmp_path, harm):
    shutil.copytree(straight, tmp_path / 'run')
    change, words = log_harms[harm]
    change(tmp_path / 'run' / 'log.jsonl')
    with pytest.raises(LabError, match=words) as caught:
        train_here(tmp_path / 'run')
    assert '\n' not in str(caught.value) and 'restore the log' in str(caught.value)


def train_here(folder, model=None, train=None, valid=None, ledger=None, on_log=None, **settings):
    model = model or training_runs.tiny_lora()
    recipe = training_runs.recipe(**settings)
    return fit(model, train or examples(), valid or examples(6, seed=1), folder, recipe, on_log, ledger)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize('harm', [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize('name', ['weights.safetensors', 'optimiser.safetensors', 'state.json', 'manifest.json'])
def test_damage_is_found_and_the_one_before_is_used(straight, tmp_path, harm, name):
    shutil.copytree(straight, tmp_path / 'run')
    newest, before = checkpoints.checkpoints(tmp_path / 'run' / 'checkpoints')[:2]
    harm(newest / name)
    said = []
    assert checkpoints.latest_checkpoint(tmp_path / 'run' / 'checkpoints', said.append) == before
    assert len(said) == 1 and newest.name in said[0] and 'damaged' in said[0]


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    flip_a_bit(checkpoints.checkpoints(tmp_path / 'run' / 'checkpoints')[0] / 'weights.safetensors')
    assert training_runs.run(tmp_path / 'run') == 0
    assert_same_run(straight, tmp_path / 'run')


def test_an_empty_manifest_is_damage(straight, tmp_path):
    shutil.copytree(checkpoints.checkpoints(straight / 'checkpoints')[0], tmp_path / 'step-000001')
    (tmp_path / 'step-000001' / 'manifest.json').write_text('{}')
    assert 'state.json' in checkpoints.damage(tmp_path / 'step-000001')


def test_pickles_are_refused(tmp_path):
    step = checkpoints.save_checkpoint(tmp_path, 3, dict(weights=dict(a=torch.ones(2))), dict(step=3))
    (step / 'weights.pkl').write_bytes(b'cos\nsystem\n')
    manifest = json.loads((step / 'manifest.json').read_text())
    (step / 'manifest.json').write_text(
        json.dumps(dict(manifest, **{'weights.pkl': checkpoints.sha256_of(step / 'weights.pkl')}))
    )
    with pytest.raises(LabError, match='neither safetensors nor JSON'):
        checkpoints.load_checkpoint(step)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    first = checkpoints.save_checkpoint(tmp_path, 1, dict(weights=dict(a=torch.ones(2))), dict(step=1))

    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(checkpoints, 'save_file', full)
    with pytest.raises(LabError, match='the disk is full'):
        checkpoints.save_checkpoint(tmp_path, 2, dict(weights=dict(a=torch.ones(2))), dict(step=2))
    assert checkpoints.latest_checkpoint(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.fixture(scope='module')
def ragged():
    return examples(8, 60, seed=3)


def there(batches, model):
    "Micro-batches where the model is."
    return [batch.to(model.device) for batch in batches]


def loss_and_gradient(ragged, layout, size):
    model = load_model('preset:llama-tiny')
    batches, targets = step_batches(
        ragged, np.arange(8), Recipe(batch_size=size, gradient_accumulation=8 // size, max_length=60, layout=layout)
    )
    loss = accumulate(LossModel(model), there(batches, model), targets)
    return float(loss), torch.cat([p.grad.flatten() for p in model.parameters()]), batches


def test_a_step_does_not_depend_on_its_layout(ragged):
    loss, gradient, _ = loss_and_gradient(ragged, 'padded', 8)
    packs = 0
    for layout in ('padded', 'bucketed', 'packed'):
        for size in (8, 4, 2, 1):
            other_loss, other, batches = loss_and_gradient(ragged, layout, size)
            packs += sum(len(batch.lengths or []) > 1 for batch in batches)
            assert math.isclose(loss, other_loss, rel_tol=1e-5)
            assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-6) and math.isclose(
                gradient.norm(), other.norm(), rel_tol=1e-5
            )
    assert packs >= 3


def test_a_mean_of_means_would_be_noticed(ragged):
    model = load_model('preset:llama-tiny')
    losses = [
        (float(LossModel(model)(batch.to(model.device)).detach()), batch.supervised)
        for batch in micro_batches(ragged, np.arange(8), 2, 60, 'padded')
    ]
    assert len(losses) == 4
    honest = sum(loss for loss, _ in losses) / sum(targets for _, targets in losses)
    mean_of_means = np.mean([loss / targets for loss, targets in losses])
    assert abs(honest - mean_of_means) > 1e-4


@pytest.mark.parametrize('world', [2, 3])
def test_processes_share_a_step_without_changing_it(ragged, world):
    recipe = Recipe(batch_size=2, gradient_accumulation=4, max_length=60)
    shares = [step_batches(ragged, np.arange(7), recipe, world, rank) for rank in range(world)]
    assert len({len(batches) for batches, _ in shares}) == 1 and len({targets for _, targets in shares}) == 1
    model = load_model('preset:llama-tiny')
    loss = sum(float(accumulate(LossModel(model), there(batches, model), targets)) for batches, targets in shares)
    alone = load_model('preset:llama-tiny')
    batches, targets = step_batches(ragged, np.arange(7), recipe)
    assert math.isclose(loss, float(accumulate(LossModel(alone), there(batches, alone), targets)), rel_tol=1e-5)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('adapt', [False, True])
def test_gradient_checkpointing_changes_nothing_and_is_off_when_it_says_off(ragged, adapt):
    found = {}
    for on in (False, True):
        model = load_model('preset:llama-tiny')
        if adapt:
            model = add_lora(model, 4, 8, 0.0, ['q_proj', 'v_proj'], seed=1)
        for name, parameter in model.named_parameters():
            if 'lora_B' in name:
                drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.data.copy_(0.02 * drawn)
        set_gradient_checkpointing(model, not on)
        set_gradient_checkpointing(model, on)
        model.train()
        assert any(getattr(module, 'gradient_checkpointing', False) for module in model.modules()) == on
        batches, targets = step_batches(ragged, np.arange(8), Recipe(batch_size=8, max_length=60))
        accumulate(LossModel(model), there(batches, model), targets)
        found[on] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert len(found[True]) == len(found[False]) > 0 and torch.allclose(found[True], found[False], rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    model = load_model('preset:llama-tiny')
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    before['lm_head.weight'] = None
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float('nan')
    with pytest.raises(LabError, match='step 1: the loss is nan'):
        train_here(tmp_path, model)
    for name, parameter in model.named_parameters():
        if name != 'model.layers.0.mlp.up_proj.weight':
            assert torch.equal(parameter, before[name]), name
    assert not list((tmp_path / 'checkpoints').glob('step-*'))


def test_a_held_out_loss_that_is_not_finite_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'evaluate_loss', lambda *args: dict(loss=math.nan, perplexity=math.nan, targets=1))
    with pytest.raises(LabError, match='the held-out loss is nan'):
        train_here(tmp_path, keep_best=True, eval_every=3)


def test_examples_without_a_target_never_reach_a_batch():
    from llmft.data.tokens import cut

    whole = examples(10)
    masked = Examples(whole.ids, whole.starts, whole.ends, np.zeros(len(whole.ids), bool))
    kept, notes = cut(masked, 24)
    assert len(kept) == 0 and notes['without_target'] == 10
    with pytest.raises(LabError, match='no training example with a target'):
        fit(load_model('preset:llama-tiny'), kept, None, '.', Recipe(max_length=24))


def test_early_stopping_stops_and_ends_with_the_best_weights(tmp_path):
    model = load_model('preset:llama-tiny')
    result = train_here(
        tmp_path,
        model,
        learning_rate=3e-2,
        num_epochs=30,
        patience=2,
        keep_best=True,
        eval_every=5,
        schedule='constant',
    )
    losses = [row['valid_loss'] for row in result.log if 'valid_loss' in row]
    assert result.progress.stopped == 'early stopping' and result.progress.step < result.steps
    assert min(losses[-2:]) > min(losses) and len(losses) == losses.index(min(losses)) + 3
    assert math.isclose(evaluate_loss(model, examples(6, seed=1), 2, 24)['loss'], min(losses), rel_tol=1e-6)


def test_a_flop_budget_is_never_overdrawn(tmp_path):
    free = train_here(tmp_path / 'free')
    budget = free.progress.flops / 3
    bound = train_here(tmp_path / 'bound', max_flops=budget)
    assert bound.progress.stopped == 'FLOP budget' and free.progress.stopped == 'finished'
    flops = [row['flops'] for row in bound.log if 'flops' in row]
    assert (
        flops[-1] <= budget < flops[-1] + max(after - before for before, after in zip([0, *flops], flops, strict=False))
    )
    with pytest.raises(LabError, match='one optimiser step takes'):
        train_here(tmp_path / 'tiny', max_flops=1.0)


class Purse:
    "A ledger that can pay for so many steps."

    def __init__(self, steps):
        self.steps, self.booked = steps, []

    def allows(self, flops, step, lengths):
        return len(self.booked) < self.steps

    def book(self, step, tokens, lengths, flops):
        self.booked.append((step, tokens, sum(lengths), flops))


def test_a_ledger_is_told_of_every_step_and_ends_the_run(tmp_path):
    purse = Purse(3)
    result = train_here(tmp_path, ledger=purse)
    assert result.progress.stopped == 'FLOP budget' and [row[0] for row in purse.booked] == [1, 2, 3]
    assert (
        sum(row[3] for row in purse.booked) == result.progress.flops
        and sum(row[1] for row in purse.booked) == result.progress.tokens
    )
    assert result.log[-1]['step'] == 3 and 'valid_loss' in result.log[-1]


def test_ctrl_c_at_the_end_of_a_budget_is_obeyed(tmp_path):
    class Interrupted(Purse):
        def allows(self, flops, step, lengths):
            if len(self.booked) == self.steps:
                signal.raise_signal(signal.SIGINT)
            return super().allows(flops, step, lengths)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a scheduler's package puts its own on import
    try:
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path, ledger=Interrupted(3))
    finally:
        signal.signal(signal.SIGINT, before)
    assert final(tmp_path)[0] == 'step-000003'


def test_a_parameter_may_have_a_rate_and_a_decay_of_its_own():
    still, moving, decayed = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    still.learning_rate_ratio, decayed.decayed = 0.0, True
    groups = make_optimiser([still, moving, decayed], Recipe(learning_rate=0.1, weight_decay=0.5)).param_groups
    assert {(group['ratio'], group['weight_decay']) for group in groups} == {(0.0, 0.0), (1.0, 0.0), (1.0, 0.5)}


@pytest.mark.parametrize('name', ['llama-tiny', 'gpt2-tiny', 'qwen2-tiny'])
def test_muon_turns_matrices_between_hidden_states_and_leaves_the_rest_to_adamw(name):
    model = load_model(f'preset:{name}')
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = (
            torch.nn.init.orthogonal_(torch.empty_like(weight)) * 0.01 if weight.ndim == 2 else torch.ones_like(weight)
        )
    make_optimiser(list(model.parameters()), Recipe(optimiser='muon', learning_rate=1.0, weight_decay=0.0)).step()
    turned = set()
    for key, weight in model.named_parameters():
        moved = weight.detach() - before[key]
        if (moved.abs().median() - 1).abs() < 1e-3:
            continue  # AdamW's first step has the size of the learning rate
        sizes = torch.linalg.svdvals(moved) / (0.2 * math.sqrt(max(moved.shape)))
        assert 0.6 < sizes.min() and sizes.max() < 1.3, key
        turned.add(key)
    layers = {
        key
        for key, weight in before.items()
        if weight.ndim == 2 and not any(word in key for word in ('embed', 'lm_head', 'wte', 'wpe'))
    }
    assert turned == layers and len(layers) >= 8


@pytest.mark.parametrize('optimiser', ['adamw', 'adamw_8bit', 'muon'])
def test_the_schedule_reaches_the_weights(tmp_path, optimiser):
    "The first of ten steps of warm-up moves every weight by a tenth of what it moves without."
    first = {}
    for rise in (0.99, 0.0):
        model = load_model('preset:llama-tiny')
        before = {key: weight.detach().clone() for key, weight in model.named_parameters()}

        def on_log(entry, rise=rise, model=model, before=before):
            if entry['step'] == 1 and 'loss' in entry:
                weights = model.named_parameters()
                first[rise] = {key: float((weight.detach() - before[key]).norm()) for key, weight in weights}

        train_here(
            tmp_path / str(rise),
            model,
            optimiser=optimiser,
            learning_rate=1e-2,
            max_steps=10,
            warmup_ratio=rise,
            schedule='constant',
            on_log=on_log,
        )
    assert len(first[0.0]) > 8
    for key, moved in first[0.0].items():
        assert moved > 0 and first[0.99][key] == pytest.approx(moved / 10, rel=0.02), key


def test_evaluation_keeps_no_logits():
    model, held = load_model('preset:llama-tiny'), []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: held.append(output.shape))
    few, many = evaluate_loss(model, examples(6), 2, 24), evaluate_loss(model, examples(60), 2, 24)
    hook.remove()
    assert held == [] and many['targets'] > 5 * few['targets']


@pytest.mark.parametrize('optimiser', ['adamw', 'adamw_8bit', 'paged_adamw_8bit', 'muon'])
def test_every_optimiser_learns_and_resumes(tmp_path, optimiser):
    whole = train_here(tmp_path / 'whole', load_model('preset:llama-tiny'), optimiser=optimiser, learning_rate=3e-3)
    losses = [row['loss'] for row in whole.log if 'loss' in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    shutil.rmtree(checkpoints.checkpoints(tmp_path / 'again' / 'checkpoints')[0])
    train_here(tmp_path / 'again', load_model('preset:llama-tiny'), optimiser=optimiser, learning_rate=3e-3)
    assert log_of(tmp_path / 'whole') == log_of(tmp_path / 'again')


@pytest.mark.parametrize(
    'setting, place',
    [(dict(fused=True), 'meta'), (dict(capturable=True), 'meta'), (dict(fused=False), 'cpu'), ({}, 'cpu')],
)
def test_step_counts_of_a_fused_optimiser_lie_beside_their_parameter(setting, place):
    other, parameter = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2, device='meta'))
    optimiser = SimpleNamespace(
        param_groups=[dict(params=[other]), dict(params=[parameter], **setting)], state=defaultdict(dict)
    )
    checkpoints.restore_optimiser(
        optimiser,
        {parameter: 'w', other: 'o'},
        {'w|step': torch.tensor(3.0), 'w|exp_avg': torch.ones(2), 'o|step': torch.tensor(3.0)},
        {},
    )
    assert (
        optimiser.state[parameter]['step'].device.type == place
        and optimiser.state[parameter]['exp_avg'].device.type == 'meta'
        and float(optimiser.state[other]['step']) == 3
    )


def test_one_process_may_train_in_two_precisions(tmp_path):
    for precision in ('no', 'bf16', 'no'):
        assert (
            train_here(
                tmp_path / f'{precision}{len(list(tmp_path.iterdir()))}', mixed_precision=precision, max_steps=2
            ).progress.step
            == 2
        )


def test_fp16_weights_are_not_trained(tmp_path):
    with pytest.raises(LabError, match='weights in fp16 would be trained'):
        train_here(tmp_path, load_model('preset:llama-tiny', 'fp16'), max_steps=2)


def test_a_first_step_counts_the_moments_that_it_makes_once(tmp_path):
    model = load_model('preset:llama-tiny')
    first, later = (train_here(tmp_path / str(steps), model, max_steps=steps).watched['bytes'] for steps in (1, 5))
    assert 4 * sum(p.numel() * 4 for p in model.parameters()) < first <= later


def test_an_evaluation_leaves_every_module_in_its_mode():
    model = load_model('preset:llama-tiny').train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    for layout in ('packed', 'padded'):
        evaluate_loss(model, examples(6), 2, 24, layout)
    assert modes == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize('side', ['train', 'valid'])
def test_a_token_beyond_the_vocabulary_is_refused_before_the_first_step(tmp_path, side):
    strange, logged = examples(12), []
    strange.ids[-3] = 600
    with pytest.raises(LabError, match='a token 600 and the model knows 0 to 511'):
        train_here(tmp_path, on_log=logged.append, **{side: strange})
    assert logged == []


@pytest.mark.parametrize('side', ['train', 'valid'])
def test_documents_beyond_the_positions_are_refused_before_the_first_step(tmp_path, side):
    ids = np.full(700, 7, np.uint16)
    long, logged = Examples(ids, np.array([0, 20]), np.array([20, 700])), []
    with pytest.raises(LabError, match='679 tokens does not fit the 512 positions'):
        train_here(tmp_path, load_model('preset:gpt2-tiny'), on_log=logged.append, max_length=1024, **{side: long})
    assert logged == []


def test_an_architecture_without_formulas_trains_and_its_operations_are_unknown(tmp_path):
    config = AutoConfig.for_model('mamba', vocab_size=512, hidden_size=32, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / 'model')
    settings = dict(layout='bucketed', num_epochs=1, max_steps=4)
    model = load_model(str(tmp_path / 'model'), attention='eager')
    result = train_here(tmp_path / 'run', model, **settings)
    assert result.metrics()['flops'] is None and result.flops_per_sec is None and result.progress.step == 4
    assert [row['flops'] for row in result.log if 'flops' in row] == [None] * 4
    with pytest.raises(LabError, match='max_flops is 1e.09 and there are no cost formulas'):
        train_here(tmp_path / 'bound', model, max_flops=1e9, **settings)


def test_weights_that_are_broken_are_not_taken_for_an_architecture_that_leaks(tmp_path):
    model = load_model('preset:llama-tiny')
    with torch.no_grad():
        model.model.norm.weight[0] = float('nan')
    with pytest.raises(LabError, match='step 1: the loss is nan'):
        train_here(tmp_path, model)


def test_checkpointing_leaves_no_trace_after_training(tmp_path):
    "A hook left on the embedding would send every later generation to the slower decoder."
    model = training_runs.tiny_lora()
    assert is_lean(model)
    set_gradient_checkpointing(model, True)
    set_gradient_checkpointing(model, True)
    assert not is_lean(model)
    recipe = training_runs.recipe(gradient_checkpointing=True, max_steps=2)
    fit(model, examples(), None, tmp_path, recipe)
    assert is_lean(model) and not any(getattr(each, 'gradient_checkpointing', False) for each in model.modules())


def test_a_run_that_resumes_after_its_last_step_keeps_the_peak_it_measured(tmp_path):
    first = train_here(tmp_path, max_steps=6).metrics()
    again = train_here(tmp_path, max_steps=6).metrics()
    names = ('peak_memory_gb', 'watched_slots', 'steps')
    assert first['peak_memory_gb'] > 0 and [again[name] for name in names] == [first[name] for name in names]


@pytest.fixture
def worse(monkeypatch):
    "Every evaluation finds a higher loss than the one before."
    monkeypatch.setattr(
        training, '_held_out_scores', lambda run: dict(loss=float(run.progress.step), perplexity=1.0, targets=1)
    )


def test_the_end_of_a_budget_evaluates_no_step_twice(tmp_path, worse):
    result = train_here(tmp_path, ledger=Purse(6), eval_every=3, patience=2)
    judged = [entry['step'] for entry in result.log if 'valid_loss' in entry]
    assert judged == [3, 6] and result.progress.best_step == 3 and result.progress.bad_evaluations == 1
    assert result.progress.stopped == 'FLOP budget'


def test_patience_that_runs_out_at_the_last_step_does_not_say_why_the_run_ended(tmp_path, worse):
    result = train_here(tmp_path, max_steps=6, eval_every=3, patience=1)
    assert result.progress.bad_evaluations == 1 and result.progress.stopped == 'finished'


@pytest.mark.parametrize('valid', [slice(0, 0), slice(0, 1)])
def test_held_out_examples_without_a_target_are_refused_before_the_first_step(tmp_path, valid):
    held_out = examples(6, seed=1).select(valid)
    held_out.loss = np.zeros(len(held_out.ids), bool)
    with pytest.raises(LabError, match='the held-out examples have no target'):
        fit(training_runs.tiny_lora(), examples(), held_out, tmp_path / 'run', training_runs.recipe())
    assert not (tmp_path / 'run').exists()


def test_checkpoints_are_in_the_order_of_their_steps_however_many_digits(tmp_path):
    for step in (999_800, 999_900, 1_000_000):
        (tmp_path / f'step-{step:06d}').mkdir()
    checkpoints.prune_checkpoints(tmp_path, 2, saved_step=1_000_000)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ['step-1000000', 'step-999900']


def test_checkpoints_of_an_attempt_that_cannot_be_continued_give_their_place_to_good_ones(tmp_path):
    for step in (40, 45, 100):
        (tmp_path / f'step-{step:06d}').mkdir()
    checkpoints.prune_checkpoints(tmp_path, 1, best_step=40, saved_step=45)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ['step-000045', 'step-000040']


@pytest.mark.parametrize('share, count, steps', [(0.07, 100, 7), (0.28, 25, 7), (0.03, 420, 13), (1.0, 9, 9), (0.0, 9, 0)])
def test_a_share_of_the_steps_is_not_one_too_many_by_rounding(share, count, steps):
    assert share_of(share, count) == steps
    assert warmup_steps(Recipe(warmup_ratio=share), count) == steps


@pytest.mark.parametrize('targets', [['q_proj', 'lm_head'], ['layers.0.self_attn.q_proj']])
def test_an_adapter_without_cost_formulas_trains_and_counts_no_operations(tmp_path, monkeypatch, targets):
    shape = presets['llama-tiny'] | dict(tie_word_embeddings=False)
    monkeypatch.setitem(presets, 'llama-untied', shape)
    net = add_lora(load_model('preset:llama-untied'), 4, 8.0, 0.0, targets, 1)
    result = train_here(tmp_path, net, max_steps=2)
    assert result.progress.step == 2 and result.metrics()['flops'] is None
    net = add_lora(load_model('preset:llama-untied'), 4, 8.0, 0.0, targets, 1)
    with pytest.raises(LabError, match='there are no cost formulas for adapters on .*: set max_flops to 0'):
        train_here(tmp_path / 'budget', net, max_flops=1e12)
