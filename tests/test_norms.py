"""One kernel for a norm: the numbers of transformers, in the format of the next products, and only on a GPU."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig

from llmft.models import norms
from llmft.models.load import load_model, model_config
from llmft.models.norms import fuse_norms, is_plain_norm


def made(preset, seed=0):
    "A model on the CPU as transformers makes it, with norms that are not all ones."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config(f'preset:{preset}'))
        for name, weight in model.named_parameters():
            if 'norm' in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def gradients(model, ids_BT):
    "The loss of some tokens, and the gradients of all weights."
    model.zero_grad()
    loss = model(ids_BT, labels=ids_BT).loss
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(norms, '_is_on_gpu', lambda tensor: True)


ids_BT = torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('preset', ['llama-tiny', 'qwen2-tiny'])
def test_loss_and_gradients_are_those_of_transformers(preset, as_on_a_gpu):
    plain = made(preset)
    expected = gradients(plain, ids_BT)
    found = gradients(fuse_norms(copy.deepcopy(plain)), ids_BT)
    for own, wanted in zip(found, expected, strict=True):
        assert (own - wanted).norm() < 1e-5 * wanted.norm()


def test_a_cpu_keeps_every_bit():
    plain = made('llama-tiny')
    for own, wanted in zip(gradients(fuse_norms(copy.deepcopy(plain)), ids_BT), gradients(plain, ids_BT), strict=True):
        assert torch.equal(own, wanted)


class Casts(TorchDispatchMode):
    "Counts tensors of activations that are turned into another format."

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == 'aten::_to_copy' and args[0].dim() == 3:
            self.count += 1
        return func(*args, **(kwargs or {}))


def casts(model):
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad(), Casts() as seen:
        model.model(ids_BT)
    return seen.count


def test_products_share_what_a_norm_gives_under_autocast(as_on_a_gpu):
    "Queries, keys and values cast once instead of three times, gate and up once instead of twice."
    plain = made('llama-tiny')
    for_head = 1  # the last norm casts as well
    saved = 3 * plain.config.num_hidden_layers - for_head
    assert casts(plain) - casts(fuse_norms(copy.deepcopy(plain))) == saved


def test_other_norms_are_left_alone():
    small = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    gemma = AutoModelForCausalLM.from_config(GemmaConfig(**small, num_key_value_heads=1, head_dim=8))
    for model in (gemma, made('gpt2-tiny')):
        kinds = [type(module) for module in model.modules()]
        assert [type(module) for module in fuse_norms(model).modules()] == kinds


def test_every_model_that_is_loaded_has_them():
    norm = load_model('preset:llama-tiny').model.norm
    assert issubclass(type(norm), norms._OneKernel) and type(norm).__name__ == 'LlamaRMSNorm'
    assert not is_plain_norm(torch.nn.LayerNorm)
