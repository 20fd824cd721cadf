"""What a GPU is asked to do: where tensors lie, which attention is chosen, and budgets of kernels, waits and memory."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import training_runs

from llmft.core import LabError
from llmft.data.batches import MicroBatch
from llmft.inference import decoder
from llmft.inference.generation import generate
from llmft.models import load as models
from llmft.models.adapters import add_lora, trainable_parameters, weights_hash
from llmft.models.cost import memory_breakdown
from llmft.models.load import check_model_settings, load_model, model_config
from llmft.models.meter import resident_bytes
from llmft.models.methods import Method
from llmft.models.precisions import check_form
from llmft.runs.params import resolve_params
from llmft.runs.run import check_model_params
from llmft.training import checkpoints
from llmft.training.fit import fit, train_step
from llmft.training.largest_batch import try_batch, worst_examples
from llmft.training.prepare import prepare
from llmft.training.recipe import Recipe, make_optimiser, optimisers
from llmft.training.step import LossModel, accumulate, evaluate_loss, set_gradient_checkpointing, step_batches
from pretend_cuda import device

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


def warm_step(mode, folder):
    "(a run after three steps, the micro-batches of its fourth, their targets)."
    run = prepare(trained(mode), training_runs.examples(16), None, folder, recipe(mode))
    for number in range(4):
        batches = step_batches(run.train, run.plan.step(number), run.recipe)
        if number < 3:
            train_step(run, *batches)
    return run, *batches


# (kernels, blocks of memory) of one step: two layers, two micro-batches of three documents and one
step_budgets = dict(
    lora=(830, 750),
    lora_half=(1010, 920),
    lora_fp16=(1060, 960),
    lora_mixed=(1090, 1020),
    full=(940, 815),
    full_mixed=(1210, 1090),
)


@each_mode
def test_a_training_step_keeps_its_budgets(mode, tmp_path):
    "The waits are the loss and the norm, once a step, and the rows that have a target, once a micro-batch."
    run, batches, targets = warm_step(mode, tmp_path)
    with device.Counts() as counts, device.watching_waits() as watch:
        train_step(run, batches, targets)
    kernels, blocks = step_budgets[mode]
    assert 0.5 * kernels < sum(counts.kernels.values()) <= kernels, counts.kernels.most_common(9)
    assert counts.blocks <= blocks
    places = {place.split(':')[0]: count for (_, place), count in watch.waits.items()}
    assert places == {'losses.py': len(batches), 'fit.py': 1, 'strategies.py': 1}, watch.waits


@each_mode
def test_attention_never_writes_out_its_scores_in_training(mode, tmp_path):
    "Before Ampere no kernel shares heads, so that they are repeated; from Ampere on 16 bits take flash attention."
    run, batches, targets = warm_step(mode, tmp_path)
    device.sdpa_log.clear()
    train_step(run, batches, targets)
    kernels = {kernel for kernel, *_ in device.sdpa_log}
    in_16_bits = modes[mode][0] != 'fp32' or modes[mode][1] != 'no'
    assert kernels == {'flash' if ampere and in_16_bits else 'efficient'}, device.sdpa_log


def test_a_search_for_the_batch_leaves_the_adapter_as_it_was_when_fp16_overflows():
    model = trained('lora_fp16')
    model.get_input_embeddings().weight.data.mul_(1e5)
    before = weights_hash(trainable_parameters(model))
    assert try_batch(model, recipe('lora_fp16'), 2, 2**33).fits
    assert weights_hash(trainable_parameters(model)) == before


# ---- decoding

# (kernels, blocks) of a further token of two rows of different lengths
token_budgets = dict(fp32=(110, 95), half=(145, 130))


@pytest.mark.parametrize('precision', token_budgets)
def test_a_decoded_token_keeps_its_budgets(precision):
    "The processor waits twice a token: for the token, and for what it was drawn from."
    model = trained('lora' if precision == 'fp32' else 'lora_half').eval()
    taken = []
    device.sdpa_log.clear()
    for tokens in (3, 13):
        with device.Counts() as counts, device.watching_waits() as watch:
            generate(model, [[1, 2, 3], [4]], tokens)
        taken.append((sum(counts.kernels.values()), counts.blocks, sum(watch.waits.values())))
    kernels, blocks, waits = ((long - short) / 10 for short, long in zip(*taken, strict=True))
    assert 0.5 * token_budgets[precision][0] < kernels <= token_budgets[precision][0]
    assert blocks <= token_budgets[precision][1] and waits == 2
    assert not [key for key in device.sdpa_log if key[0] == 'math'] and device.sdpa_log


@pytest.mark.parametrize('padded', [False, True])
def test_prompts_never_write_out_their_scores(padded):
    "By either decoder, with a mask and without one."
    for make in (decoder.LeanDecoder, decoder.ModelDecoder):
        device.sdpa_log.clear()
        net = trained('lora_half').eval()
        ids_BT = torch.ones((2, 5), dtype=torch.long, device='cuda')
        with torch.no_grad():
            make(net, 8).begin(ids_BT, torch.tensor([0, 2 * padded], device='cuda'))
        assert device.sdpa_log and not [key for key in device.sdpa_log if key[0] == 'math'], device.sdpa_log


# ---- memory


def stepped(method, recipe):
    "(loss of a step, bytes that the process held at most) of four rows of one length; the optimiser has moments."
    net = method.apply(method.load('preset:llama-6x256'), seed=0).train()
    set_gradient_checkpointing(net, recipe.gradient_checkpointing, recipe.activation_offload)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimiser = make_optimiser(parameters, recipe)
    batches, targets = step_batches(worst_examples(4, recipe.max_length, 512), range(4), recipe)
    batches = [batch.to('cuda') for batch in batches]
    for _ in range(2):  # the first makes the moments
        optimiser.zero_grad()
        with device.Counts() as counts:
            loss = accumulate(LossModel(net), batches, targets)
            optimiser.step()
    return float(loss), resident_bytes(net, optimiser) + counts.peak


each_method = pytest.mark.parametrize(
    'method', [Method(), Method('lora', 8, 16.0, 0.0, ('q_proj', 'v_proj'))], ids=['full', 'lora']
)


@each_method
def test_the_memory_plan_is_near_what_the_device_gives_out(method):
    "In fp32, where the CPU's kernels make no copies that a GPU's do not make."
    for again, offload in ((False, False), (True, False), (True, True)):
        recipe = Recipe(batch_size=4, max_length=128, gradient_checkpointing=again, activation_offload=offload)
        _, measured = stepped(method, recipe)
        config = model_config('preset:llama-6x256')
        predicted = memory_breakdown(
            config,
            method,
            tokens=4 * 128,
            longest=128,
            optimiser=optimisers['adamw'],
            gradient_checkpointing=again,
            activation_offload=offload,
        )['total']
        assert predicted == pytest.approx(measured, rel=0.12), (again, offload)


def test_activations_in_main_memory_change_no_loss_and_take_less_of_the_device():
    method = Method('lora', 8, 16.0, 0.0, ('q_proj', 'v_proj'))
    kept, away = (
        stepped(method, Recipe(batch_size=4, max_length=128, gradient_checkpointing=True, activation_offload=offload))
        for offload in (False, True)
    )
    assert away[0] == kept[0]
    inputs_of_five_layers = 5 * 4 * 128 * 256 * 4
    assert kept[1] - away[1] > 0.9 * inputs_of_five_layers


def test_a_run_with_activations_in_main_memory_has_the_same_losses(tmp_path):
    train = training_runs.examples(16)
    for name, offload in (('kept', False), ('away', True)):
        settings = dict(gradient_checkpointing=True, activation_offload=offload)
        fit(trained(), train, None, tmp_path / name, recipe(**settings))
    assert losses(tmp_path / 'kept') == losses(tmp_path / 'away') and len(losses(tmp_path / 'away')) == 4


# ---- what a GPU lacks


def test_defaults_and_small_files_ask_for_no_precision_that_this_gpu_lacks():
    "What is about such a precision is refused in one line, before anything is loaded."
    root = Path(__file__).parents[2]
    looked = 0
    for path in [*root.glob('nbs/experiments/*.ipynb'), *root.glob('params/*/[!_]*.yaml')]:
        if path.parent.name == 'sweeps':
            continue
        _, params = resolve_params([path], [], small=path.suffix == '.yaml')
        looked += 1
        if path.stem in ('bf16', 'int4_fast') and not ampere:  # what they are about
            with pytest.raises(LabError, match='has no bf16'):
                check_model_params(params)
        else:
            check_model_params(params)
    assert looked > 60


def test_full_scale_files_say_what_to_add_where_there_is_no_bf16():
    root = Path(__file__).parents[2]
    looked = 0
    for path in root.glob('params/*/[!_]*.yaml'):
        line = next((line for line in path.read_text().splitlines() if line.startswith('# T4:')), '')
        if line and 'does not fit' not in line:
            looked += 1
            _, params = resolve_params([path], re.findall(r'-p (\S+?)\.?(?= |$)', line))
            check_model_params(params)
    assert looked > 35




def test_what_this_gpu_lacks_is_one_line():
    if ampere:
        check_model_settings('bf16', 'bf16')
        check_form('int4_fast')
        return
    for wrong in (dict(precision='bf16'), dict(mixed_precision='bf16')):
        with pytest.raises(LabError, match='has no bf16: use precision fp16, or fp32'):
            check_model_settings(**wrong)
    with pytest.raises(LabError, match='has no bf16|has no kernel for this GPU'):
        check_form('int4_fast')


def test_a_model_that_does_not_fit_says_so():
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**16) / device.total_memory)
    try:
        with pytest.raises(LabError, match='do not fit the GPU of'):
            load_model('preset:llama-tiny')
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_peaks_are_measured_in_the_memory_that_is_free(monkeypatch):
    from llmft.models import meter

    sizes = {}
    for free in (80 * 2**30, 4 * 2**30, 2**20):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *device, free=free: (free, 80 * 2**30))
        taken = 5 * 4 * meter._matrix_size() ** 2, 2 * meter._copy_size()
        assert max(taken) <= free / 2 + torch.cuda.memory_reserved()
        sizes[free] = meter._matrix_size(), meter._copy_size()
    assert sizes[80 * 2**30] == (8192, 2**31) and sizes[4 * 2**30] == (8192, 2**30)


# ---- planted mistakes: each of these must be found


def resume_at_step_two(folder):
    "Train, lose the last checkpoint, and train on."
    train = training_runs.examples(16)
    fit(trained(), train, None, folder, recipe(max_steps=2))
    shutil.rmtree(checkpoints.checkpoints(folder / 'checkpoints')[0])
    fit(trained(), train, None, folder, recipe(max_steps=2))


def evaluate_and_stream(folder):
    "A held-out loss, and a token that must have been on the device."
    model = trained()
    evaluate_loss(model, training_runs.examples(8), 4, 24)
    generate(model, [[1]], 2)
    assert next(model.parameters()).is_cuda


def decode_ragged(folder):
    "Two rows of different lengths."
    generate(load_model('preset:llama-tiny').eval(), [[1, 2, 3], [4]], 3)


def host_mask(starts_B, slots):
    "A mask made in main memory."
    slot = torch.arange(slots)
    return (slot[None] <= slot[:, None]).expand(len(starts_B), 1, -1, -1)


mistakes = {
    'micro-batches stay in main memory': (MicroBatch, 'to', lambda self, device: self, resume_at_step_two),
    'counts of a fused optimiser are restored to main memory': (
        checkpoints,
        'counter_device',
        lambda optimiser, parameter: torch.device('cpu'),
        resume_at_step_two,
    ),
    'the model is not moved': (models, 'placed', lambda model: model, evaluate_and_stream),
    'a mask of the decoder is made in main memory': (decoder, 'prefill_mask', host_mask, decode_ragged),
}


@pytest.mark.parametrize('mistake', mistakes)
def test_planted_mistakes_are_found(monkeypatch, tmp_path, mistake):
    where, name, wrong, work = mistakes[mistake]
    work(tmp_path / 'right')
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((RuntimeError, AssertionError)):
        work(tmp_path / 'wrong')
