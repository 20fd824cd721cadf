"The search for the largest batch: exact, bounded in trials, and without a trace."

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.models.adapters import add_lora, trainable_parameters, weights_hash
from llmft.models.load import load_model
from llmft.models.meter import resident_bytes
from llmft.training import largest_batch as module
from llmft.training.largest_batch import Trial, bisect_batch, largest_batch, memory_limit, split_step, try_batch
from llmft.training.recipe import Recipe


@pytest.fixture(scope='module')
def net():
    return add_lora(load_model('preset:llama-tiny'), 4, 8, 0.1, ['q_proj', 'v_proj'], seed=1)


@given(st.integers(1, 64), st.integers(0, 512), st.integers(0, 600))
def test_the_search_is_exact_and_bounded(safe, more, true):
    asked, most = [], safe + more
    assert bisect_batch(lambda batch: not asked.append(batch) and batch <= true, safe, most) == min(true, most)
    assert len(asked) == len(set(asked)) and len(asked) <= 1 + math.log2(max(most - safe, safe - 1, 1)) + 2


def test_the_reference_log():
    asked = []
    assert bisect_batch(lambda batch: not asked.append(batch) and batch <= 19, 2, 32) == 19 and asked == [
        2,
        17,
        25,
        21,
        19,
        20,
    ]


def state(net):
    return (
        weights_hash(dict(net.named_parameters())),
        torch.get_rng_state().tolist(),
        net.training,
        [p.grad for p in net.parameters() if p.grad is not None],
    )


@pytest.mark.parametrize('optimiser', ['adamw', 'paged_adamw_8bit', 'muon'])
def test_gradients_that_are_not_finite_leave_the_adapter_as_it_was(optimiser):
    own = add_lora(load_model('preset:llama-tiny'), 4, 8, 0.0, ['q_proj', 'v_proj'], seed=1)
    own.get_input_embeddings().weight.data[:] = math.nan
    before = weights_hash(trainable_parameters(own))
    assert try_batch(own, Recipe(max_length=16, optimiser=optimiser), 2, 2**40).fits
    assert weights_hash(trainable_parameters(own)) == before


@pytest.mark.parametrize('broken', [None, 'forward', 'optimiser', 'other'])
def test_a_trial_leaves_nothing_behind(net, monkeypatch, broken):
    "Whatever stops it: nothing, memory in the forward pass, memory in the optimiser's step, an error that is none of memory."
    net.eval()
    before = state(net)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError('out of memory') if broken != 'other' else RuntimeError('shapes')

    if broken in ('forward', 'other'):
        monkeypatch.setattr(module.LossModel, 'forward', fail)
    if broken == 'optimiser':
        monkeypatch.setattr(torch.optim.AdamW, 'step', fail)
    if broken == 'other':
        with pytest.raises(RuntimeError, match='shapes'):
            try_batch(net, Recipe(max_length=32), 2, 2**30)
    else:
        trial = try_batch(net, Recipe(max_length=32), 2, 2**30, accumulation=2)
        assert (trial.fits, trial.why) == ((True, '') if broken is None else (False, 'out of memory'))
    assert state(net) == before


def test_the_worst_batch_takes_a_whole_step(net, monkeypatch):
    "Forward, backward and optimiser see rows of full length, all of them targets."
    seen, real = [], module.accumulate
    monkeypatch.setattr(
        module,
        'accumulate',
        lambda model, batches, targets: (
            seen.append(
                (sum(batch.slots for batch in batches), targets, {n for batch in batches for n in batch.lengths})
            )
            or real(model, batches, targets)
        ),
    )
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        'step',
        lambda self, *rest: (
            steps.append([p.grad is not None for group in self.param_groups for p in group['params']])
            or step(self, *rest)
        ),
    )
    try_batch(net, Recipe(max_length=48), 3, 2**30)
    assert seen == [(144, 144, {48})] and len(steps) == 1 and all(steps[0])


def test_memory_grows_with_the_batch_and_is_given_back(net):
    small, large = (try_batch(net, Recipe(max_length=256), batch, 2**34) for batch in (4, 64))
    again = try_batch(net, Recipe(max_length=256), 4, 2**34)
    assert large.peak_bytes > 3 * small.peak_bytes and again.peak_bytes < 1.5 * small.peak_bytes + 2**23, (
        small,
        large,
        again,
    )
    assert large.predicted_bytes > small.predicted_bytes


def test_a_batch_of_one_that_does_not_fit_is_one_line(net):
    with pytest.raises(LabError, match='not one row of 32 positions fits') as raised:
        largest_batch(net, Recipe(max_length=32), 2, 8, limit_gb=1e-5, say=lambda line: None)
    assert '\n' not in str(raised.value)
    for arguments in ((0, 4), (8, 4)):
        with pytest.raises(LabError, match='smallest <= largest'):
            largest_batch(net, Recipe(max_length=32), *arguments, say=lambda line: None)


def test_what_would_take_the_machine_down_is_not_run(net, monkeypatch):
    tried = []
    monkeypatch.setattr(
        module,
        'try_batch',
        lambda model, recipe, batch, *rest, **facts: tried.append(batch) or Trial(batch, True, batch * 2**40),
    )
    best, trials = largest_batch(net, Recipe(), 2, 2**12, say=lambda line: None)
    assert (
        len(tried) <= 3
        and any(trial.why.startswith('not run') for trial in trials)
        and not any(trial.fits for trial in trials if trial.why)
    )


def test_a_run_that_goes_on_keeps_its_batch(net, tmp_path, monkeypatch):
    first = largest_batch(net, Recipe(max_length=32), 1, 2, 0.5, say=lambda line: None, folder=tmp_path)
    monkeypatch.setattr(module, 'try_batch', lambda *rest, **facts: pytest.fail('searched again'))
    assert largest_batch(net, Recipe(max_length=32), 1, 2, 0.5, say=lambda line: None, folder=tmp_path) == first


@given(st.integers(1, 256), st.integers(1, 300))
def test_the_effective_batch_does_not_depend_on_the_machine(target, largest):
    batch, accumulation = split_step(target, largest)
    assert batch * accumulation == target and batch <= largest


def test_limits():
    assert memory_limit(0.25) == 2**28 and memory_limit() > 2**20
    for wrong in (-1.0, 1e9):
        with pytest.raises(LabError, match='memory_limit_gb'):
            memory_limit(wrong)


def with_free(monkeypatch, size):
    "A machine on which so many bytes are free."
    monkeypatch.setattr(module.psutil, 'virtual_memory', lambda: SimpleNamespace(available=int(size)))


@pytest.mark.skipif(torch.cuda.is_available(), reason='main memory is what counts on a machine without a GPU')
def test_the_memory_of_the_loaded_model_counts_once(net, monkeypatch):
    held = resident_bytes(net)
    step = try_batch(net, Recipe(max_length=32), 1, 2**40).peak_bytes - held
    with_free(monkeypatch, 1.5 * step)  # room for a step, and none for the model once more
    batch, _ = largest_batch(net, Recipe(max_length=32), 1, 1, say=lambda line: None)
    assert batch == 1
    with_free(monkeypatch, 0.5 * step)
    with pytest.raises(LabError, match='not one row'):
        largest_batch(net, Recipe(max_length=32), 1, 1, say=lambda line: None)


def test_what_a_second_model_may_take_is_what_the_first_leaves(monkeypatch):
    gpu = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (4 * 2**30, 16 * 2**30),
                          memory_reserved=lambda: 12 * 2**30, memory_allocated=lambda: 11 * 2**30)
    monkeypatch.setattr(torch, 'cuda', gpu)
    assert memory_limit() == int(0.9 * 5 * 2**30)
    assert memory_limit(held=11 * 2**30) == int(0.9 * 16 * 2**30)
