"""Methods: read from parameters, applied to a model, and read back from it; what makes no sense is refused in one line."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from training_runs import examples

from llmft.core import LabError
from llmft.models.adapters import add_lora, trainable_parameters, weights_hash
from llmft.models.cost import flops_step, memory_breakdown, trained_tensors
from llmft.models.load import load_model, quantised_share
from llmft.models.low_rank import add_low_rank, frozen_gpt2
from llmft.models.methods import Method, methods
from llmft.models.subspace import SubspaceConfig, attach
from llmft.training.fit import fit
from llmft.training.recipe import Recipe, optimisers

lora = dict(lora_rank=4, lora_alpha=8.0, lora_dropout=0.1, lora_targets=['q_proj', 'v_proj'])
targets = ('q_proj', 'v_proj')


@pytest.mark.parametrize(
    'params, expected',
    [
        ({}, Method()),
        (dict(precision='bf16', quantisation='nf4'), Method(precision='bf16')),
        (dict(method='full', **lora, quantisation='nf4'), Method()),
        (dict(method='lora', **lora, quantisation='nf4'), Method('lora', 4, 8.0, 0.1, targets)),
        (dict(method='qlora', **lora, quantisation='int8'), Method('qlora', 4, 8.0, 0.1, targets, 'int8')),
        (dict(method='qlora', **lora), Method('qlora', 4, 8.0, 0.1, targets, 'nf4')),
        (lora, Method('lora', 4, 8.0, 0.1, targets)),
        (dict(lora, quantisation='none'), Method('lora', 4, 8.0, 0.1, targets)),
        (dict(lora, quantisation='nf4'), Method('qlora', 4, 8.0, 0.1, targets, 'nf4')),
        (dict(lora, lora_targets='all-linear'), Method('lora', 4, 8.0, 0.1, ('all-linear',))),
        (dict(lora, lora_rank=0), Method()),
    ],
)
def test_parameters_mean_a_method(params, expected):
    assert Method.from_params(SimpleNamespace(**params)).check() == expected


@pytest.mark.parametrize(
    'method, words',
    [
        (Method('lorra'), "did you mean 'lora'"),
        (Method('full', quantisation='nf4'), 'choose qlora, or none'),
        (Method('lora', 4, 8, 0.0, targets, 'int8'), 'choose qlora, or none'),
        (Method('qlora', 4, 8, 0.0, targets), 'choose nf4 or int8'),
        (Method('lora', 0, 8, 0.0, targets), 'rank is 0'),
        (Method('lora', 4, float('inf'), 0.0, targets), 'alpha is inf'),
        (Method('lora', 4, 8, -0.1, targets), 'dropout is -0.1'),
        (Method('lora', 4, 8), 'targets is empty'),
    ],
)
def test_what_makes_no_sense_is_refused(method, words):
    with pytest.raises(LabError, match=words) as caught:
        method.check()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize(
    'kind, quantisation', [('full', 'none'), ('lora', 'none'), ('qlora', 'nf4'), ('qlora', 'int8')]
)
def test_what_was_applied_is_read_back(kind, quantisation, precision):
    method = Method(precision=precision)
    if kind != 'full':
        method = Method(kind, 4, 8.0, 0.1, targets, quantisation, precision)
    model = method.check().apply(method.load('preset:llama-tiny', seed=3), seed=5)
    assert Method.of(model) == method
    assert (quantised_share(model)['quantised'] > 0) == (kind == 'qlora')
    if kind == 'full':
        assert all(p.requires_grad for p in model.parameters())
    else:
        again = add_lora(load_model('preset:llama-tiny', precision, quantisation, 3), 4, 8.0, 0.1, list(targets), 5)
        assert weights_hash(trainable_parameters(model)) == weights_hash(trainable_parameters(again))


def test_the_cost_of_a_model_is_that_of_its_method():
    method = Method('lora', 4, 8.0, 0.0, ('all-linear',))
    model = method.apply(method.load('preset:llama-tiny'), seed=0)
    assert Method.of(model).targets != method.targets, 'PEFT is told the names of the layers'
    for count in (
        lambda one: flops_step(model.config, [7, 9], one),
        lambda one: memory_breakdown(model.config, one, tokens=16, longest=9, optimiser=optimisers['adamw']),
        lambda one: trained_tensors(model.config, one),
    ):
        assert count(Method.of(model)) == count(method)


def test_a_subspace_leaves_its_facts_on_the_model():
    net = frozen_gpt2(2, 2, 64, 128, 512)
    factors = add_low_rank(net, ['q_proj', 'v_proj', 'lm_head'], 4, 32.0, 0.1)
    assert Method.of(net) == Method('lora', 4, 32.0, 0.1, ('c_attn',)) and not hasattr(net, 'lends_whole_weights')
    attach(net, factors, SubspaceConfig(40))
    assert Method.of(net) == Method('lora', 4, 32.0, 0.1, ('c_attn',)) and net.lends_whole_weights
    assert Method.of(copy.deepcopy(net)) == Method.of(net)
    plain = frozen_gpt2(2, 2, 64, 128, 512)
    attach(plain, {'weight': plain.transformer.h[0].mlp.c_fc.weight}, SubspaceConfig(40))
    assert Method.of(plain) == Method() and plain.lends_whole_weights


def test_a_method_is_a_value():
    method = Method('lora', 4, 8.0, 0.1, targets)
    assert pickle.loads(pickle.dumps(method)) == method and hash(method) == hash(copy.deepcopy(method))
    with pytest.raises(AttributeError):
        method.rank = 8
    assert all(kind.says for kind in methods.values())


def test_weights_outside_the_known_precisions_have_no_name():
    assert Method.of(load_model('preset:llama-tiny').to(torch.float64)).precision == 'fp32'


def test_the_active_adapter_counts_whatever_its_name():
    model = get_peft_model(load_model('base'), LoraConfig(r=2, lora_alpha=6, target_modules=['q_proj']), 'mine')
    assert Method.of(model) == Method('lora', 2, 6, targets=('q_proj',))

    model.add_adapter('wider', LoraConfig(r=4, lora_alpha=8, target_modules=['v_proj']))
    model.set_adapter('wider')
    assert Method.of(model) == Method('lora', 4, 8, targets=('v_proj',))


@pytest.mark.parametrize('kind, config', [
    ('IA3', IA3Config(target_modules=['v_proj'], feedforward_modules=[])),
    ('LOHA', LoHaConfig(r=2, target_modules=['v_proj'])),
    ('PROMPT_TUNING', PromptTuningConfig(num_virtual_tokens=2, task_type='CAUSAL_LM')),
])
def test_training_refuses_an_adapter_of_another_kind(kind, config, tmp_path):
    model = get_peft_model(load_model('base'), config)
    with pytest.raises(LabError, match=f'an adapter of the kind {kind}: whole models and LoRA are trained here'):
        fit(model, examples(8), None, tmp_path, Recipe(max_steps=1, batch_size=2))
