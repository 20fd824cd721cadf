"""What a GPU is asked to do: where tensors lie, which attention is chosen, and budgets of kernels, waits and memory."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_runs

from llmft.core import LabError
from llmft.data.batches import MicroBatch
from llmft.inference import decoder
from llmft.inference.generation import generate
from llmft.models import cost
from llmft.models import load as models
from llmft.models.adapters import add_lora, save_and_check, trainable_parameters, weights_hash
from llmft.models.cost import memory_breakdown
from llmft.models.load import check_model_settings, load_model, model_config
from llmft.models.low_rank import add_low_rank, frozen_gpt2
from llmft.models.meter import resident_bytes
from llmft.models.methods import Method
from llmft.models.precisions import check_form
from llmft.models.subspace import SubspaceConfig, attach
from llmft.runs.params import resolve_params
from llmft.runs.run import check_model_params
from llmft.training import checkpoints
from llmft.training import prepare as preparing
from llmft.training.fit import evaluate, fit, train_step
from llmft.training.largest_batch import try_batch, worst_examples
from llmft.training.losses import head_cross_entropy, linear_cross_entropy
from llmft.training.prepare import prepare
from llmft.training.recipe import Recipe, make_optimiser, optimisers
from llmft.training.step import (
    LossModel,
    accumulate,
    evaluate_loss,
    example_losses,
    set_gradient_checkpointing,
    step_batches,
)
from llmft.training.strategies import Processes
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
    lora_half=(1000, 920),
    lora_fp16=(1000, 920),
    lora_mixed=(1090, 1020),
    full=(940, 815),
    full_mixed=(1210, 1090),
)


@each_mode
def test_a_training_step_keeps_its_budgets(mode, tmp_path):
    "The waits are the loss and the norm, once a step, however many micro-batches there are."
    run, batches, targets = warm_step(mode, tmp_path)
    with device.Counts() as counts, device.watching_waits() as watch:
        train_step(run, batches, targets)
    kernels, blocks = step_budgets[mode]
    assert 0.5 * kernels < sum(counts.kernels.values()) <= kernels, counts.kernels.most_common(9)
    assert counts.blocks <= blocks
    places = {place.split(':')[0]: count for (_, place), count in watch.waits.items()}
    assert len(batches) == 2 and places == {'fit.py': 1, 'strategies.py': 1}, watch.waits


@pytest.mark.parametrize('projection', ['kronecker', 'fastfood', 'sparse'])
def test_a_step_in_a_subspace_waits_as_often_as_any_other(tmp_path, projection):
    "With learned gates, whose temperature and steps are counted on the device."
    net = frozen_gpt2(2, 2, 32, 64, 512, scale=0.1).to('cuda')
    config = SubspaceConfig(60, 'learned', projection=projection)
    subspace = attach(net, add_low_rank(net, ['q_proj', 'v_proj'], dropout=0.0), config)
    run = prepare(net, training_runs.examples(16), None, tmp_path, recipe())
    for number in range(3):
        batches, targets = step_batches(run.train, run.plan.step(number), run.recipe)
        with device.watching_waits() as watch:
            train_step(run, batches, targets)
    places = {place.split(':')[0]: count for (_, place), count in watch.waits.items()}
    assert len(batches) == 2 and places == {'fit.py': 1, 'strategies.py': 1}, watch.waits
    assert subspace.gates[-1] == 2 and subspace.v.is_cuda


@each_mode
def test_attention_never_writes_out_its_scores_in_training(mode, tmp_path):
    "Before Ampere no kernel shares heads, so that they are repeated; from Ampere on 16 bits take flash attention."
    run, batches, targets = warm_step(mode, tmp_path)
    device.sdpa_log.clear()
    train_step(run, batches, targets)
    kernels = {kernel for kernel, *_ in device.sdpa_log}
    in_16_bits = modes[mode][0] != 'fp32' or modes[mode][1] != 'no'
    assert kernels == {'varlen' if ampere and in_16_bits else 'efficient'}, device.sdpa_log


def packed_loss(model, lengths):
    "The summed loss of documents of random tokens in one row, and its gradient by the adapter."
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, 500, (1, sum(lengths)), generator=generator).to(model.device)
    model.zero_grad()
    hidden_BTD = models.hidden_states(model, ids_BT, document_lengths=lengths)
    loss, _ = head_cross_entropy(hidden_BTD.flatten(0, 1), models.output_head(model), ids_BT.roll(-1, 1).flatten())
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in trainable_parameters(model).values()])


@newer_only
@pytest.mark.parametrize('window', [None, 7])
def test_one_call_attends_inside_each_document(monkeypatch, window):
    "As the path per document does, forward and backward, under autocast too; the kernel is told the right places."
    shape = dict(query=(1, 4, 60, 16), key=(1, 2, 60, 16), value=(1, 2, 60, 16))
    tensors = [torch.randn(size, device='cuda', dtype=torch.bfloat16, requires_grad=True) for size in shape.values()]
    found = []
    for takes_one_call in (models.takes_one_call, lambda *asked: False):
        monkeypatch.setattr(models, 'takes_one_call', takes_one_call)
        documents = models.DocumentLengths([23, 1, 30, 6])
        device.sdpa_log.clear()
        out, _ = models.documents_attention(None, *tensors, documents=documents, sliding_window=window, scaling=0.3)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        assert ('varlen' in {kernel for kernel, *_ in device.sdpa_log}) == (len(found) == 1) and documents.seen == 1
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.02 * theirs.norm()


@newer_only
@pytest.mark.parametrize('mode', ['lora_half', 'lora_mixed'])
def test_kernels_do_not_grow_with_the_documents(mode):
    "Twelve documents or two in a row: as many kernels, forward and backward, and one call a layer."
    model = trained(mode).train()
    mixed = torch.autocast('cuda', torch.bfloat16, enabled=modes[mode][1] == 'bf16')
    taken = []
    with mixed:
        packed_loss(model, [40, 32])  # the first pass tries the model
    for lengths in ([40, 32], [6] * 12, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 6]):
        device.sdpa_log.clear()
        with device.Counts() as counts, mixed:
            packed_loss(model, lengths)
        taken.append(sum(counts.kernels.values()))
        assert {kernel for kernel, *_ in device.sdpa_log} == {'varlen'} and sum(device.sdpa_log.values()) == 2
    assert len(set(taken)) == 1, taken


@newer_only
@pytest.mark.parametrize('mode', ['lora_half', 'lora_mixed'])
def test_losses_of_one_call_are_those_of_each_document(monkeypatch, mode):
    "The loss to 0.1%, its gradient to 2% of its length."
    model = trained(mode).eval()
    lengths = [11, 30, 2, 1, 20]
    mixed = torch.autocast('cuda', torch.bfloat16, enabled=modes[mode][1] == 'bf16')
    with mixed:
        loss, slope = packed_loss(model, lengths)
        assert ('varlen', 'torch.bfloat16', False, True) in device.sdpa_log
        monkeypatch.setattr(models, 'takes_one_call', lambda *asked: False)
        expected, expected_slope = packed_loss(model, lengths)
    assert abs(loss - expected) < 1e-3 * expected
    assert (slope - expected_slope).norm() < 0.02 * expected_slope.norm()


def test_flash_attention_2_is_told_where_documents_begin(monkeypatch):
    "Without these places it would read them from the positions in every layer, and wait."
    told = []

    def stand_in(module, query, key, value, mask, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None,
                 max_length_k=None, scaling=None, **options):
        if cu_seq_lens_q is None:
            return models.documents_attention(module, query, key, value, mask, scaling=scaling)
        told.append((cu_seq_lens_q.tolist(), max_length_q, cu_seq_lens_k is cu_seq_lens_q, max_length_k))
        documents = models.DocumentLengths(cu_seq_lens_q.diff().tolist())
        return models.documents_attention(module, query, key, value, documents=documents, scaling=scaling)

    model = trained('lora_half').eval()
    net = models.causal_model(model)
    expected = packed_loss(model, [3, 9, 4])[0]
    monkeypatch.setitem(models.AttentionInterface._global_mapping, 'flash_attention_2', stand_in)
    monkeypatch.setattr(net.config, '_attn_implementation_internal', 'flash_attention_2')
    packed_loss(model, [3, 9, 4])
    told.clear()
    assert torch.equal(packed_loss(model, [3, 9, 4])[0], expected)
    assert told == [([0, 3, 12, 16], 9, True, 9)] * 2


@pytest.mark.parametrize('size, chunks', [(None, 1), (2**25, 3)], ids=['as declared', 'as on a CPU'])
def test_chunks_of_the_loss_are_those_that_the_memory_model_counts(monkeypatch, size, chunks):
    "A GPU makes 32 times as many logits at once as a CPU; the loss and the memory model read one declaration."
    if size:
        monkeypatch.setitem(cost.LOSS_CHUNK_BYTES, 'cuda', size)
    config = model_config('preset:llama-tiny')
    config.vocab_size = 200_000
    hidden_ND = torch.randn(96, 64, device='cuda', requires_grad=True)
    weight_VD = torch.randn(200_000, 64, device='cuda')
    targets_N = torch.arange(96, device='cuda')
    with device.Counts() as counts:
        linear_cross_entropy(hidden_ND, weight_VD, targets_N)
    assert counts.kernels['aten::amax'] == 2 * chunks
    assert 0.98 < counts.peak / cost.logit_bytes(config, Method(), cost.StepShape(96, 96)) < 1.02


@newer_only
@pytest.mark.parametrize('mode', ['lora', 'lora_half', 'lora_mixed', 'full_mixed'])
def test_evaluation_multiplies_as_the_training_does_and_scores_in_fp32(mode, tmp_path):
    "It waits once; what is said of each document in the end is not in mixed precision."
    held_out = training_runs.examples(24)
    run = prepare(trained(mode), training_runs.examples(16), held_out, tmp_path, recipe(mode))
    evaluate(run)  # the first one tries the model
    device.sdpa_log.clear()
    with device.watching_waits() as watch:
        evaluate(run)
    in_16_bits = modes[mode][0] != 'fp32' or modes[mode][1] != 'no'
    assert {dtype for _, dtype, *_ in device.sdpa_log} == {'torch.bfloat16' if in_16_bits else 'torch.float32'}
    assert {place.split(':')[0]: count for (_, place), count in watch.waits.items()} == {'step.py': 1}

    loss = run.log.entries()[-1]['valid_loss']
    device.sdpa_log.clear()
    exact = example_losses(run.model, held_out, 4, 24).sum() / held_out.supervised().sum()
    assert abs(loss - exact) < 1e-2 * exact
    assert {dtype for _, dtype, *_ in device.sdpa_log} == {str(models.precisions[modes[mode][0]].dtype)}


def test_a_search_for_the_batch_leaves_the_adapter_as_it_was_when_fp16_overflows():
    model = trained('lora_fp16')
    model.get_input_embeddings().weight.data.mul_(1e5)
    before = weights_hash(trainable_parameters(model))
    assert try_batch(model, recipe('lora_fp16'), 2, 2**33).fits
    assert weights_hash(trainable_parameters(model)) == before


# ---- decoding

# (kernels, blocks) of a further token of two rows of different lengths
token_budgets = dict(fp32=(110, 95), half=(128, 111))


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


def learnt(mode):
    "A model whose adapter does something, in evaluation mode."
    model = trained(mode)
    torch.manual_seed(0)
    for name, weight in trainable_parameters(model).items():
        torch.nn.init.normal_(weight, std=0.3 if 'lora_B' in name else 0.1)
    return model.eval()


@pytest.mark.parametrize('mode', ['lora', 'lora_half'])
def test_steps_repeated_as_a_graph_make_the_tokens_of_single_steps(mode, monkeypatch):
    "Also after rows have left the batch: then the next step is recorded anew. A graph that waits cannot be recorded."
    model, prompts, recorded = learnt(mode), [[1, 2, 3], [4], [5, 6]], []
    capture = decoder._captured
    monkeypatch.setattr(decoder, '_captured', lambda step: recorded.append(step) or capture(step))
    device.sdpa_log.clear()
    found = generate(model, prompts, 24)
    assert len(recorded) == 1 and not [key for key in device.sdpa_log if key[0] == 'math'] and device.sdpa_log
    stops = {found.ids[0][6], found.ids[1][9]} - {*found.ids[2]} or {found.ids[0][6]}
    stopped = generate(model, prompts, 24, stop_ids=stops)
    assert len(recorded) > 2

    monkeypatch.setattr(decoder, '_lean_class', lambda model, steps: decoder.LeanDecoder)
    assert generate(model, prompts, 24).ids == found.ids
    assert generate(model, prompts, 24, stop_ids=stops).ids == stopped.ids != found.ids


def test_adapters_are_merged_and_readers_joined_for_a_long_generation():
    "A step of a bf16 model with an adapter then launches fewer kernels, and its logits move by a rounding."
    model, taken, logits = learnt('lora_half'), [], []
    ids_BT, starts_B = torch.tensor([[5, 6, 7]], device='cuda'), torch.zeros(1, dtype=torch.long, device='cuda')
    with torch.no_grad():
        for steps in (1, 16):
            each = decoder.LeanDecoder(model, 8, 1, steps)
            each.begin(ids_BT, starts_B)
            with device.Counts() as counts:
                logits.append(each.step(ids_BT[:, 0]))
            taken.append(counts.kernels)
    products, fewer = (sum(counts[f'aten::{name}'] for name in ('mm', 'addmm', 'linear')) for counts in taken)
    assert (products, fewer) == (2 * (7 + 4) + 1, 2 * 4 + 1) and taken[1]['aten::cat'] < taken[0]['aten::cat']
    assert 0 < (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()


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
        _, params = resolve_params([path], [], 'small' if path.suffix == '.yaml' else '')
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


@pytest.mark.parametrize('merge', [False, True])
def test_a_run_that_was_trained_where_its_base_fits_once_is_saved_there(tmp_path, merge):
    net = trained()
    ids_BT = torch.randint(0, 500, (1, 20))
    sizes = sum(weight.nbytes for weight in net.parameters())
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + sizes // 2) / device.total_memory)
    try:
        settings = dict(tokenizer=None, merge=merge)
        difference = save_and_check(net, tmp_path, lambda: load_model('preset:llama-tiny'), ids_BT, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert difference == 0 and (tmp_path / 'merged').exists() == merge
    assert {weight.device.type for weight in net.parameters()} == {'cuda'}


def test_peaks_are_measured_in_the_memory_that_is_free(monkeypatch):
    from llmft.models import meter

    sizes = {}
    for free in (80 * 2**30, 4 * 2**30, 2**20):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *device, free=free: (free, 80 * 2**30))
        taken = 5 * 4 * meter._matrix_size() ** 2, 2 * meter._copy_size()
        assert max(taken) <= free / 2 + torch.cuda.memory_reserved()
        sizes[free] = meter._matrix_size(), meter._copy_size()
    assert sizes[80 * 2**30] == (8192, 2**31) and sizes[4 * 2**30] == (8192, 2**30)


# ---- a process of several has its model in main memory until it is wrapped


def waiting(attention):
    "A small model as such a process has it."
    return add_lora(load_model('preset:llama-tiny', attention=attention).to('cpu'), 4, 8.0, 0.0, ['q_proj'], seed=1)


@pytest.fixture
def sdpa_for_gpus(monkeypatch):
    "As if SDPA had kernels for GPUs only, as the package flash-attn has."
    monkeypatch.setitem(models.attentions, 'sdpa', replace(models.attentions['sdpa'], needs=('a CUDA device',)))


def test_rows_are_tried_where_the_attention_has_kernels(monkeypatch, tmp_path, sdpa_for_gpus):
    tried = []

    def check_rows(model, packed):
        tried.append(models.causal_model(model).device.type)
        models.check_rows(model, packed)

    monkeypatch.setattr(preparing, 'check_rows', check_rows)
    for attention in ('sdpa', 'documents'):
        run = prepare(waiting(attention), training_runs.examples(16), None, tmp_path / attention, recipe())
        assert next(run.model.parameters()).is_cuda
    assert tried == ['cuda', 'cpu']


@pytest.mark.parametrize('strategy, afterwards', [('ddp', 'cuda'), ('zero2', 'cuda'), ('fsdp2', 'cpu'), ('zero3', 'cpu')])
def test_weights_that_will_be_cut_go_back_after_the_trial(sdpa_for_gpus, strategy, afterwards):
    model = waiting('sdpa')
    group = SimpleNamespace(device=torch.device('cuda'), processes=Processes(2, strategy))
    with preparing._on_own_gpu(model, group):
        assert next(model.parameters()).device.type == 'cuda'
    assert next(model.parameters()).device.type == afterwards


def test_a_whole_model_that_does_not_fit_is_refused_with_a_way_out(monkeypatch, sdpa_for_gpus):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError('full')

    model = waiting('sdpa')
    monkeypatch.setattr(model, 'to', full)
    group = SimpleNamespace(device=torch.device('cuda'), processes=Processes(2, 'fsdp2'))
    with pytest.raises(LabError, match='does not fit the GPU: use attention=documents$'), \
            preparing._on_own_gpu(model, group):
        pass


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
