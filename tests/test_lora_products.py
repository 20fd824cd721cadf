"""Adapters that multiply in 16 bits, against PEFT's own forward pass in fp32: losses, gradients, memory, files."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from llmft.inference.decoder import LeanDecoder
from llmft.models.adapters import add_lora, save_adapter, trainable_parameters, weights_hash
from llmft.models.load import hidden_states, load_model, output_head
from llmft.models.lora_products import Factor, multiply_as_read
from llmft.models.merging import load_adapter, logits_of
from llmft.training.losses import head_cross_entropy

targets = ['q_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj']
halves = ['bf16', 'fp16'] if torch.cuda.is_available() else ['bf16']


def pair(precision='fp32', quantisation='none', dropout=0.1):
    "(a model with a LoRA as PEFT makes it, a copy of it that multiplies as it reads), with equal numbers."
    models = []
    for change in (lambda model: model, multiply_as_read):
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
        torch.manual_seed(0)
        model = get_peft_model(load_model('preset:llama-6x256', precision, quantisation), config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if 'lora_B' in name:
                torch.nn.init.normal_(parameter, std=0.02)
        models.append(change(model).train())
    return models


def loss_of(model, seed=0):
    "The loss of a few tokens; the draws of dropout depend on the seed."
    torch.manual_seed(seed)
    ids_BT = torch.randint(5, 8000, (2, 48), generator=torch.Generator().manual_seed(seed)).to(model.device)
    hidden_BTD = hidden_states(model, ids_BT)
    loss, count = head_cross_entropy(hidden_BTD.flatten(0, 1), output_head(model), ids_BT.roll(-1, 1).flatten())
    return loss / count


def gradients(model):
    "The gradients of the adapter, one after the other."
    model.zero_grad()
    loss_of(model).backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainable_parameters(model).values()])


@pytest.mark.parametrize('quantisation', ['none', 'nf4', 'int8'])
def test_beside_fp32_not_a_bit_changes(quantisation):
    theirs, ours = pair('fp32', quantisation)
    assert torch.equal(loss_of(theirs), loss_of(ours)) and torch.equal(gradients(theirs), gradients(ours))
    device = ours.device.type
    with torch.autocast(device, torch.bfloat16):
        expected, found = loss_of(theirs), loss_of(ours)
    assert torch.equal(expected, found) if device == 'cpu' else abs(found - expected) < 1e-3 * expected


@pytest.mark.parametrize('precision', halves)
@pytest.mark.parametrize('quantisation', ['none', 'nf4'])
def test_gradients_are_the_former_ones_up_to_the_rounding_of_16_bits(quantisation, precision):
    "Without dropout, whose draws differ between formats; the loss to 0.1%, the gradient to 2% of its length."
    theirs, ours = pair(precision, quantisation, dropout=0.0)
    expected, found = gradients(theirs), gradients(ours)
    assert found.dtype == torch.float32 and 0 < (found - expected).norm() < 0.02 * expected.norm()
    assert abs(loss_of(ours) - loss_of(theirs)) < 1e-3 * loss_of(theirs)


def trained(model, steps=30):
    "The losses of a short training on one batch."
    optimiser = torch.optim.AdamW(trainable_parameters(model).values(), lr=2e-3)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_a_training_takes_the_former_path():
    "Thirty steps, which learn: each loss within 1% of that with products in fp32."
    expected, found = (trained(model) for model in pair('bf16', dropout=0.0))
    assert expected[-1] < 0.8 * expected[0]
    assert ((found - expected).abs() < 0.01 * expected).all(), (found / expected - 1).abs().max()


def kept_of(model):
    "Bytes of fp32 that autograd keeps of a forward pass, weights not counted."
    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.dtype == torch.float32]
    assert loss.requires_grad
    return sum(sizes)


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_no_copy_in_fp32_is_kept(dropout):
    theirs, ours = map(kept_of, pair('bf16', dropout=dropout))
    assert ours < 0.4 * theirs, (ours, theirs)


def test_masters_are_saved_in_fp32_and_read_back(tmp_path):
    model = add_lora(load_model('preset:llama-tiny', 'bf16'), 4, 8.0, 0.0, targets, seed=0)
    for parameter in trainable_parameters(model).values():
        assert parameter.dtype == torch.float32
        torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, tmp_path / 'adapter')
    assert {tensor.dtype for tensor in load_file(tmp_path / 'adapter/adapter_model.safetensors').values()} == {torch.float32}
    again = load_adapter(load_model('preset:llama-tiny', 'bf16'), tmp_path / 'adapter', trainable=True)
    assert weights_hash(trainable_parameters(again)) == weights_hash(trainable_parameters(model))
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))


def test_switched_off_and_merged_layers_are_left_to_peft():
    _, ours = pair('bf16', dropout=0.0)
    plain = logits_of(load_model('preset:llama-6x256', 'bf16'))
    with ours.disable_adapter():
        assert torch.equal(logits_of(ours), plain)
    before = logits_of(ours)
    ours.merge_adapter()
    merged = logits_of(ours)
    assert 0 < (merged - before).abs().max() < 0.04 * before.abs().max()
    ours.unmerge_adapter()
    assert (before - plain).abs().max() > 0


def test_a_half_model_with_an_adapter_decodes_without_calling_modules():
    model = add_lora(load_model('preset:llama-tiny', 'bf16'), 4, 8.0, 0.0, targets, seed=0).eval()
    assert sum(isinstance(module, Factor) for module in model.modules()) == 2 * 2 * len(targets)
    assert not LeanDecoder(model, 8).calls_modules
