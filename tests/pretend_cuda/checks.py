"""What a GPU is asked to do: where tensors lie, which attention is chosen, and budgets of kernels, waits and memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import training_runs
from pretend_cuda import device

from llmft.data.batches import MicroBatch
from llmft.inference import decoder
from llmft.inference.generation import generate
from llmft.models import load as models
from llmft.models.adapters import add_lora, trainable_parameters, weights_hash
from llmft.models.load import check_model_settings, load_model
from llmft.models.precisions import check_form
from llmft.training import checkpoints
from llmft.training.fit import fit, train_step
from llmft.training.largest_batch import try_batch
from llmft.training.prepare import prepare
from llmft.training.step import evaluate_loss, step_batches

ampere = device.capability >= (8, 0)
half = 'bf16' if ampere else 'fp16'
newer_only = pytest.mark.skipif(not ampere, reason='a GPU before Ampere has no bf16')
modes = dict(
    lora=('fp32', 'no', True),
    lora_half=(half, 'no', True),
    lora_fp16=('fp16', 'no', True),
    lora_mixed=('fp32', 'bf16', True),
    full=('fp32', 'no', False),
    full_mixed=('fp32', 'bf16', False),
)
each_mode = pytest.mark.parametrize(
    'mode', [pytest.param(name, marks=[newer_only] if 'mixed' in name else []) for name in modes]
)


def trained(mode='lora'):
    "A small model on the device, ready to be trained."
    precision, _, adapted = modes[mode]
    model = load_model('preset:llama-tiny', precision)
    return add_lora(model, 4, 8.0, 0.0, ['q_proj', 'v_proj'], seed=1) if adapted else model


def recipe(mode='lora', **settings):
    "Four steps of two micro-batches."
    return training_runs.recipe(**dict(max_steps=4, save_every=1, mixed_precision=modes[mode][1]) | settings)


def losses(folder):
    "The losses that a run has logged."
    return [json.loads(line)['loss'] for line in (Path(folder) / 'log.jsonl').read_text().splitlines()]


# ---- the device itself


def test_tensors_of_two_devices_do_not_meet():
    here, there = torch.ones(3, device='cuda'), torch.ones(3)
    with pytest.raises(RuntimeError, match='Expected all tensors to be on the same device'):
        here + there
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(3, device='cuda', generator=torch.Generator())
    assert (here + there.to('cuda')).device.type == 'cuda' and (here + 1).cpu().tolist() == [2, 2, 2]


def test_memory_is_counted_and_can_run_out():
    with device.Counts() as counts:
        block = torch.empty(2**20, dtype=torch.uint8, device='cuda')
        half_of_it = block[: 2**19]
        del block
    assert (counts.blocks, counts.peak) == (1, 2**20)
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated() / device.total_memory)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.ones(2**20, device='cuda')
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del half_of_it


def test_kernels_and_waits_are_counted():
    numbers = torch.arange(4.0, device='cuda')
    with device.Counts() as counts, device.watching_waits() as watch:
        total = (numbers * 2).sum()
        float(total)
        numbers.nonzero()
    assert counts.kernels['aten::mul'] == counts.kernels['aten::sum'] == counts.kernels['aten::nonzero'] == 1
    assert sorted(name for name, _ in watch.waits) == ['_local_scalar_dense', 'nonzero']


# ---- training


@each_mode
def test_a_resumed_run_is_the_undisturbed_one(mode, tmp_path):
    train = training_runs.examples(16)
    fit(trained(mode), train, None, tmp_path, recipe(mode))
    straight = losses(tmp_path)
    shutil.rmtree(checkpoints.checkpoints(tmp_path / 'checkpoints')[0])
    model = trained(mode)
    fit(model, train, None, tmp_path, recipe(mode))
    assert losses(tmp_path) == straight and len(straight) == 4 and straight[-1] < straight[0]
    assert next(model.parameters()).device.type == 'cuda'
