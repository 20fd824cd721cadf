"The training benches: who learns from what in which step, the time to one loss, and a side that learned less."

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest

from llmft.bench import peers, training
from llmft.bench.peers import Setting, log_normal_documents, step_rows, trainers
from llmft.bench.training import Block, compare, end_difference, largest_end_difference, train_block
from llmft.bench.turns import Target, ratios, targets_verdict
from llmft.core import LabError
from llmft.data.tokens import Examples
from llmft.models.load import causal_model
from llmft.runs.rivals import Measure, ranked

with_trl = importlib.util.find_spec('trl') is not None
each_trainer = pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=pytest.mark.skipif(not with_trl, reason='needs the extra bench'))
        if trainer.needs
        else name
        for name, trainer in trainers.items()
    ],
)
setting = Setting('preset:llama-tiny', rank=4, rows=2, accumulation=2, max_length=32, learning_rate=1e-2)
first_token = 2  # 0 is padding and 1 the end of text


def numbered_documents(count=10):
    "Documents of different lengths, each of one token that tells its number."
    sizes = np.arange(count) + 5
    ends = np.cumsum(sizes)
    return Examples(np.repeat(np.arange(count) + first_token, sizes).astype(np.uint16), ends - sizes, ends)


def watch_documents(monkeypatch):
    "A list that gets the numbers of the documents that each optimiser step of a `train_block` read."
    steps, read = [], set()
    note, build = Block.note, peers.adapted_model

    def look(module, inputs):
        if module.training:
            read.update(np.unique(inputs[0].cpu().numpy()).tolist())

    def watched_model(*arguments):
        model = build(*arguments)
        causal_model(model).get_input_embeddings().register_forward_pre_hook(look)
        return model

    def noted(block, *arguments):
        steps.append({token - first_token for token in read - {0}})
        read.clear()
        note(block, *arguments)

    monkeypatch.setattr(Block, 'note', noted)
    for module in (peers, training):
        monkeypatch.setattr(module, 'adapted_model', watched_model)
    return steps


@each_trainer
def test_every_side_learns_from_the_same_examples_in_each_step(monkeypatch, name):
    documents = numbered_documents()
    steps = watch_documents(monkeypatch)
    train_block(name, setting, documents, documents)
    planned = [set(rows.tolist()) for rows in step_rows(setting, len(documents))]
    assert [len(rows) for rows in planned] == [4, 4, 2]
    assert steps == planned


def test_a_side_that_shuffles_is_refused(monkeypatch):
    documents = numbered_documents()
    batches_of = peers.planned_batches

    def shuffled(*arguments):
        rows, batches = batches_of(*arguments)
        return rows, batches[::-1]

    monkeypatch.setattr(peers, 'planned_batches', shuffled)
    steps = watch_documents(monkeypatch)
    with pytest.raises(LabError, match='hf_trainer did not follow the plan of steps'):
        train_block('hf_trainer', setting, documents, documents)
    assert steps != [set(rows.tolist()) for rows in step_rows(setting, len(documents))]


@pytest.fixture(scope='module')
def words():
    "Training documents, and the first ten of them, whose loss a few steps lower."
    documents = log_normal_documents(30, 512, 3, median=15, high=32)
    return documents, documents.select(slice(0, 10))


@each_trainer
def test_every_side_learns_as_much_after_each_step(words, name):
    ours, other = (train_block(each, setting, *words) for each in ('ours', name))
    assert other.tokens == ours.tokens and len(ours.held_out) == 8
    assert np.allclose(other.losses, ours.losses, atol=1e-3)
    assert np.allclose(other.held_out, ours.held_out, atol=1e-3)


def test_a_side_that_learned_less_misses_its_target(words):
    def target(turns):
        return Target('difference of the losses at the end in nats', end_difference(turns), largest_end_difference, 'low')

    turns = {name: [train_block(name, setting, *words)] for name in ('ours', 'hf_trainer')}
    assert target(turns).met == 'met'
    turns['lazy'] = [train_block('hf_trainer', replace(setting, learning_rate=5e-3), *words)]
    assert target(turns).met == 'missed'
    assert 'missed: difference of the losses at the end in nats' in targets_verdict([target(turns)])

    diligent, lazy = turns['hf_trainer'][0], turns['lazy'][0]
    turns['lazy'] = [replace(lazy, started=diligent.started, ended=diligent.ended)]  # one clock: other work cannot decide
    before = training.loss_before(setting, words[1])
    compared = compare(turns, before, skip=1)
    assert compared['lazy']['goal'] == turns['lazy'][0].valid_loss == compared['ours']['goal']
    assert compared['lazy']['seconds'] > compared['hf_trainer']['seconds']


def block(seconds, losses):
    return Block(started=100.0, ended=[100.0 + second for second in seconds], held_out=losses)


@pytest.mark.parametrize(
    'losses, loss, seconds',
    [
        ([9.0, 8.0], 9.5, 0.5),  # within the first step
        ([9.0, 8.0], 9.0, 1.0),  # at the end of a step
        ([9.0, 8.0], 8.25, 2.5),  # three quarters of the second step, which takes two seconds
        ([9.0, 8.0], 7.9, None),  # never
        ([8.0, 9.0], 8.5, 0.75),  # reached, and lost again
        ([11.0, 8.0], 9.0, 1 + 2 * 2 / 3),  # worse at first
    ],
)
def test_time_to_a_loss_lies_on_a_line_between_two_steps(losses, loss, seconds):
    assert block([1.0, 3.0], losses).time_to(loss, 10.0) == (seconds and pytest.approx(seconds))


def test_the_time_to_a_loss_does_not_count_the_measuring_of_it(monkeypatch):
    now = iter([10.0, 12.0, 20.0, 23.0, 30.0])
    monkeypatch.setattr(training.time, 'perf_counter', lambda: next(now))
    measured = Block()
    measured.begin()
    measured.note(9.5, lambda: 9.0)  # ends at 12, measured until 20
    measured.note(9.0, lambda: 8.0)  # ends at 23, three seconds later
    assert [end - measured.started for end in measured.ended] == [2.0, 5.0]
    assert measured.time_to(8.5, 10.0) == 3.5


def test_the_loss_that_all_reach_is_that_of_the_side_that_learned_least():
    turns = dict(ours=[block([1.0, 2.0], [9.0, 8.0])], peer=[block([2.0, 4.0], [9.5, 9.0])])
    seconds = training.loss_seconds(turns, 10.0)
    assert seconds == dict(ours=[1.0], peer=[4.0])
    stuck = training.loss_seconds(turns | dict(stuck=[block([1.0, 2.0], [10.5, 11.0])]), 10.0)
    assert stuck == seconds | dict(stuck=None)


@pytest.mark.parametrize('rounds', [3, 6])
def test_targets_and_verdict_give_one_ratio(rounds):
    rng = np.random.default_rng(rounds)
    seconds = dict(ours=rng.lognormal(2, 0.3, rounds).tolist(), peer=rng.lognormal(3, 0.3, rounds).tolist())
    shown = ratios({name: [1 / each for each in values] for name, values in seconds.items()}, 'ours')['peer']
    logs = {name: np.log(values) for name, values in seconds.items()}
    said = ranked(logs, Measure('time', 's', log=True, items='rounds'), median=True)
    assert math.isclose(math.exp(said.differences['peer'].value), shown)
