"""The formulas of llmft.models.cost against real models: their parameters, PyTorch's count of operations, the tensors autograd keeps, bytes of quantised weights and optimisers, measured peaks."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import flop_counter
from transformers import AutoModelForCausalLM

from llmft.core import LabError
from llmft.models.adapters import add_lora
from llmft.models.cost import (
    flops_forward,
    flops_step,
    lora_parameter_count,
    memory_breakdown,
    optimiser_bytes,
    parameter_count,
    quantised_bytes,
    trained_tensors,
    weight_bytes,
    word_bytes,
)
from llmft.models.load import hidden_states, load_model, model_config, output_head, precisions, presets, quantisations
from llmft.models.methods import Method
from llmft.training.losses import head_cross_entropy
from llmft.training.recipe import Recipe, make_optimiser, optimisers
from llmft.training.strategies import strategies

aten = torch.ops.aten
fused = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, out_shape=None, **kw: (
        flop_counter.sdpa_flop_count(q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *rest, out_shape=None, **kw: (
        flop_counter.sdpa_backward_flop_count(g, q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))
    ),
}


def configuration(name):
    "A tiny configuration by name; qwen2-tiny is untied, with heads that do not add up to the width."
    if name != 'qwen2-tiny':
        return model_config(f'preset:{name}')
    config = model_config('preset:qwen2.5-0.5b')
    config.update(
        dict(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=144,
            vocab_size=320,
            head_dim=16,
            tie_word_embeddings=False,
            layer_types=['full_attention'] * 3,
            max_window_layers=3,
        )
    )
    return config


def build(name, attention='documents', **changes):
    config = configuration(name)
    config.update(changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize('name', [*presets, 'qwen2-tiny'])
def test_parameters_are_those_of_the_real_model(name):
    config = configuration(name)
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(config)
    assert parameter_count(config)['total'] == sum(parameter.numel() for parameter in model.parameters())
    full = trained_tensors(config, Method())
    assert sorted(size for size, count, _ in full for _ in range(count)) == sorted(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    'name, targets',
    [
        ('llama-3.2-3b', ['q_proj', 'k_proj', 'v_proj', 'o_proj']),
        ('qwen2.5-1.5b', ['all-linear']),
        ('qwen2-tiny', ['mlp.down_proj', 'q_proj']),
        ('gpt2', ['c_attn']),
        ('gpt2', ['c_proj']),
        ('gpt2', ['mlp.c_proj']),
        ('gpt2', ['all-linear']),
    ],
)
def test_adapter_parameters_are_those_of_peft(name, targets):
    config = configuration(name)
    with torch.device('meta'):
        model = add_lora(AutoModelForCausalLM.from_config(config), 8, 16, 0.0, targets, seed=0)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert lora_parameter_count(config, 8, targets) == sum(trained)
    assert sorted(
        size
        for size, count, _ in trained_tensors(config, Method('lora', 8, targets=tuple(targets)))
        for _ in range(count)
    ) == sorted(trained)


def test_figures_of_the_specification():
    llama, qwen = model_config('meta-llama/Llama-3.2-3B-Instruct'), model_config('preset:qwen2.5-1.5b')
    assert parameter_count(llama)['total'] == 3_212_749_824 and parameter_count(qwen)['total'] == 1_543_714_304
    assert (
        lora_parameter_count(llama, 8, ['q_proj', 'k_proj', 'v_proj', 'o_proj']) == 4_587_520
        and lora_parameter_count(qwen, 32, 'all-linear') == 36_929_536
    )
    assert (
        round(weight_bytes(llama, 'fp16') / 2**30, 2) == 5.98
        and round(weight_bytes(llama, 'fp16', 'nf4') / 2**30, 2) == 2.09
    )
    full = memory_breakdown(llama, Method(precision='fp16'), tokens=2048, longest=512, optimiser=optimisers['adamw'])
    assert round((full['weights'] + full['gradients'] + full['optimiser']) / 2**30, 1) == 23.9


def counted(work):
    "Operations that PyTorch's counter sees in `work`, fused attention of the CPU included."
    with flop_counter.FlopCounterMode(display=False, custom_mapping=fused) as counter:
        work()
    return counter.get_total_flops()


def step(model, lengths, labels=None):
    "Forward and backward of a packed row."
    ids = torch.randint(5, 300, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    hidden = hidden_states(model, ids, position_ids_BT=positions, document_lengths=lengths)
    head_cross_entropy(hidden.flatten(0, 1), output_head(model), (ids if labels is None else labels).flatten())[
        0
    ].backward()


query_value = {'llama-tiny': ['q_proj', 'v_proj'], 'qwen2-tiny': ['q_proj', 'v_proj'], 'gpt2-tiny': ['c_attn']}
behind = {'llama-tiny': ['o_proj', 'down_proj'], 'qwen2-tiny': ['up_proj'], 'gpt2-tiny': ['c_proj']}


@pytest.mark.parametrize('again', [False, True], ids=['', 'checkpointing'])
@pytest.mark.parametrize('adapter', ['full', 'query', 'all-linear', 'behind'])
@pytest.mark.parametrize('name', ['llama-tiny', 'qwen2-tiny', 'gpt2-tiny'])
def test_operations_of_a_step(name, adapter, again):
    quiet = dict(attn_pdrop=0.0) if name == 'gpt2-tiny' else {}
    model, lengths = build(name, **quiet), [61, 100, 33]
    targets = {'full': (), 'query': query_value[name], 'all-linear': ['all-linear'], 'behind': behind[name]}[adapter]
    method = Method() if adapter == 'full' else Method('lora', 4, targets=tuple(targets))
    if targets:
        model = add_lora(model, 4, 8, 0.0, targets, seed=0)
    if again:
        model.gradient_checkpointing_enable({'use_reentrant': False})
    model.train()
    labels = torch.randint(5, 300, (1, 194))
    labels[0, ::2] = -100
    expected = counted(lambda: step(model, lengths, labels))
    predicted = flops_step(model.config, lengths, method, targets_tokens=97, gradient_checkpointing=again)
    assert abs(predicted / expected - 1) < 0.01, f'{predicted / expected:.4f}'


@pytest.mark.parametrize('again', [False, True], ids=['', 'checkpointing'])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('targets', ['query', 'all-linear', 'behind'])
@pytest.mark.parametrize('name', ['llama-tiny', 'qwen2-tiny'])
def test_operations_of_a_step_with_dora(name, targets, dropout, again):
    "What the lengths of the outputs cost: the product of the factors written out, and with dropout a second product."
    chosen = {'query': query_value[name], 'all-linear': ['all-linear'], 'behind': behind[name]}[targets]
    model, lengths = add_lora(build(name), 4, 8, dropout, chosen, seed=0, dora=True), [61, 100, 33]
    if again:
        model.gradient_checkpointing_enable({'use_reentrant': False})
    model.train()
    method = Method('lora', 4, 8.0, dropout, tuple(chosen), dora=True)
    expected = counted(lambda: step(model, lengths))
    predicted = flops_step(model.config, lengths, method, gradient_checkpointing=again)
    assert abs(predicted / expected - 1) < 0.01, f'{predicted / expected:.4f}'
    twice = flops_step(model.config, lengths, method, gradient_checkpointing=again, passes=2)
    assert twice > predicted


@pytest.mark.parametrize('name', ['llama-tiny', 'qwen2-tiny', 'gpt2-tiny'])
@pytest.mark.parametrize('attention', ['eager', 'sdpa', 'documents'])
def test_operations_of_a_forward_pass(name, attention):
    model = build(name, attention).eval()
    ids = torch.randint(5, 300, (3, 70))
    with torch.no_grad():
        expected = counted(lambda: model(ids, use_cache=False))
    assert abs(flops_forward(model.config, [70] * 3) / expected - 1) < 0.01
    model = add_lora(model, 4, 8, 0.0, ['all-linear'], seed=0).eval()
    with torch.no_grad():
        expected = counted(lambda: model(ids, use_cache=False))
    assert abs(flops_forward(model.config, [70] * 3, Method('lora', 4, targets=('all-linear',))) / expected - 1) < 0.01


def test_documents_cost_their_own_squares():
    config = configuration('llama-tiny')
    assert flops_forward(config, [512]) - flops_forward(config, [256, 256]) == 2 * 4 * 64 * (512**2 - 2 * 256**2)


def kept(model, lengths, mixed=False):
    "Bytes of the distinct tensors that autograd keeps after a forward pass, those of the model itself left out."
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(5, 300, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast('cpu', torch.bfloat16, enabled=mixed):
        hidden = hidden_states(
            model, ids, position_ids_BT=positions, document_lengths=lengths if len(lengths) > 1 else None
        )
    return sum(found.values()) + (0 if hidden.untyped_storage().data_ptr() in found else hidden.nbytes)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize(
    'method', ['full', 'lora', 'lora dropout', 'lora all', 'packed', 'checkpointing', 'lora checkpointing']
)
@pytest.mark.parametrize('name', ['llama-tiny', 'llama-6x256', 'gpt2-tiny'])
def test_activations_are_what_autograd_keeps(name, method, precision):
    model, dropout = load_model(f'preset:{name}', precision=precision), 0.1 * ('dropout' in method)
    targets = ['all-linear'] if 'all' in method else ['c_attn'] if name == 'gpt2-tiny' else ['q_proj', 'v_proj']
    if 'lora' in method:
        model = add_lora(model, 8, 16, dropout, targets, seed=0)
    if 'checkpointing' in method:
        model.gradient_checkpointing_enable({'use_reentrant': False})
    model.train()
    lengths = [96, 96] if method == 'packed' else [192]
    predicted = memory_breakdown(
        model.config,
        Method('lora', 8, 16, dropout, tuple(targets), precision=precision)
        if 'lora' in method
        else Method(precision=precision),
        tokens=192,
        longest=lengths[0],
        optimiser=optimisers['adamw'],
        gradient_checkpointing='checkpointing' in method,
        device='cpu',
    )['activations']
    expected = kept(model, lengths)
    assert abs(predicted / expected - 1) < (0.05 if name == 'gpt2-tiny' else 0.02), f'{predicted / expected:.4f}'


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('dropout', [0.0, 0.1])
@pytest.mark.parametrize('targets', [('q_proj', 'v_proj'), ('all-linear',)])
def test_activations_with_dora(targets, dropout, precision):
    name = 'llama-6x256'
    model = add_lora(load_model(f'preset:{name}', precision=precision), 8, 16, dropout, list(targets), 0, dora=True)
    method = Method('lora', 8, 16, dropout, targets, precision=precision, dora=True)
    shape = dict(tokens=192, longest=192, optimiser=optimisers['adamw'], device='cpu')
    predicted = memory_breakdown(model.config, method, **shape)['activations']
    layers = [module for module in model.modules() if hasattr(module, 'lora_A')]
    passing = sum(4 * layer.in_features * (layer.in_features + 8) for layer in layers)  # gone with each product
    expected = kept(model.train(), [192]) - passing
    assert abs(predicted / expected - 1) < 0.03, f'{predicted / expected:.4f}'


@pytest.mark.parametrize('method', ['full', 'lora', 'lora dropout', 'packed'])
@pytest.mark.parametrize('name', ['llama-tiny', 'llama-6x256'])
def test_activations_of_mixed_precision(name, method):
    "What autograd keeps under autocast: 16-bit copies of inputs and weights, fp32 norms."
    model, dropout, targets = load_model(f'preset:{name}'), 0.1 * ('dropout' in method), ['q_proj', 'v_proj']
    if 'lora' in method:
        model = add_lora(model, 8, 16, dropout, targets, seed=0)
    model.train()
    lengths = [96, 96] if method == 'packed' else [192]
    parts = memory_breakdown(
        model.config,
        Method('lora', 8, 16, dropout, tuple(targets)) if 'lora' in method else Method(),
        tokens=192,
        longest=lengths[0],
        optimiser=optimisers['adamw'],
        mixed=True,
        device='cpu',
    )
    expected = kept(model, lengths, mixed=True)
    assert abs((parts['activations'] + parts['copies']) / expected - 1) < 0.05, (
        f"{(parts['activations'] + parts['copies']) / expected:.4f}"
    )


@pytest.mark.parametrize('quantisation', ['nf4', 'int8'])
def test_bytes_of_quantised_weights(quantisation):
    model = load_model('preset:llama-6x256', precision='bf16', quantisation=quantisation)
    bytes_held = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, 'weight', None), 'quant_state', None)
        if state is not None:
            bytes_held += state.absmax.nbytes + state.state2.absmax.nbytes
        scale = getattr(module, 'state', None)
        if quantisation == 'int8' and scale is not None:
            bytes_held += 4 * module.out_features
    assert abs(weight_bytes(model.config, 'bf16', quantisation) / bytes_held - 1) < 0.005


def test_gpt2_is_not_quantised():
    config = configuration('gpt2')
    assert weight_bytes(config, 'fp16', 'nf4') == weight_bytes(config, 'fp16')


@pytest.mark.parametrize('name', ['llama-tiny', 'gpt2-tiny'])
@pytest.mark.parametrize('kind', ['adamw', 'adamw_8bit', 'muon'])
def test_bytes_of_an_optimiser(name, kind):
    model = load_model(f'preset:{name}')
    optimiser = make_optimiser(list(model.parameters()), Recipe(optimiser=kind))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    held = sum(
        value.nbytes
        for state in optimiser.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key != 'step' and not key.startswith('qmap')
    )
    assert abs(optimiser_bytes(trained_tensors(model.config, Method()), optimisers[kind]) / held - 1) < 0.01


def test_planning_needs_no_pytorch():
    code = 'import sys, llmft.models.cost, llmft.models.methods; print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])'
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
    )


def test_what_is_cut_is_smaller_and_what_is_gathered_is_counted():
    config, shape = configuration('llama-3.2-3b'), dict(tokens=1024, longest=256, optimiser=optimisers['adamw'])
    alone = memory_breakdown(config, Method(), **shape)
    for name, sharing in strategies.items():
        if name == 'none':
            continue
        parts = memory_breakdown(config, Method(), sharing=sharing, nproc=4, **shape)
        for part in ('weights', 'gradients', 'optimiser'):
            assert parts[part] == (-(-alone[part] // 4) if part in sharing.cuts else alone[part]), (name, part)
        assert ('gathered' in parts) == (name != 'zero2')
    assert memory_breakdown(config, Method(), sharing=strategies['fsdp2'], nproc=1, **shape) == alone


def test_unknown_arguments_are_not_swallowed():
    with pytest.raises(TypeError, match='longset'):
        memory_breakdown(
            configuration('llama-tiny'), Method(), tokens=1, longest=1, optimiser=optimisers['adamw'], longset=2
        )


@pytest.mark.parametrize(
    'method, hint',
    [
        (Method(precision='fp17'), 'fp16'),
        (Method('lorra'), 'lora'),
        (Method('qlora', 8, targets=('q_proj',), quantisation='nf5'), 'nf4'),
        (Method('lora', 8, targets=('q_prj',)), 'q_proj'),
    ],
)
def test_wrong_words_are_named(method, hint):
    with pytest.raises(LabError, match=f"did you mean '{hint}'"):
        memory_breakdown(configuration('llama-tiny'), method, tokens=1, longest=1, optimiser=optimisers['adamw'])


def test_widths_are_those_of_the_declared_formats():
    assert word_bytes == {name: precision.dtype.itemsize for name, precision in precisions.items()}
    assert ['none', *sorted(quantised_bytes)] == ['none', *sorted(set(quantisations) - {'none'})]


measure = '''
import json, sys, torch
from llmft.models.adapters import add_lora
from llmft.models.cost import memory_breakdown
from llmft.models.methods import Method
from llmft.training.losses import head_cross_entropy
from llmft.training.recipe import optimisers
from llmft.models.meter import Meter, return_freed_memory
from llmft.models.load import hidden_states, load_model, output_head
return_freed_memory()
name, method, rows, slots, again = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == 'again'
def train(name, rows, slots, steps):
    model = load_model(name)
    if method == 'lora': model = add_lora(model, 8, 16, .05, ['q_proj', 'v_proj'], seed=0)
    if again: model.gradient_checkpointing_enable({'use_reentrant': False})
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    for _ in range(steps):
        ids_BT = torch.randint(5, 500, (rows, slots))
        head_cross_entropy(hidden_states(model, ids_BT).flatten(0, 1), output_head(model), ids_BT.flatten())[0].backward()
        optimiser.step(); optimiser.zero_grad()
    return model.config
train('preset:llama-tiny', 2, 64, 2)
with Meter() as meter: config = train(name, rows, slots, 2)
how = Method('lora', 8, 16, .05, ('q_proj', 'v_proj')) if method == 'lora' else Method()
plan = memory_breakdown(config, how, tokens=rows*slots, longest=slots, optimiser=optimisers['adamw'], gradient_checkpointing=again, device='cpu')
print(json.dumps(dict(measured=meter.growth_bytes, **plan)))
'''


@pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc' or torch.cuda.is_available(),
    reason='the peak is that of resident memory under glibc',
)
@pytest.mark.parametrize('again', ['', 'again'])
@pytest.mark.parametrize('method', ['full', 'lora'])
def test_predicted_peak_is_near_the_measured_one(method, again):
    "Two steps of the 6-layer model on 2 rows of 512, in a fresh process."
    found = json.loads(
        subprocess.run(
            [sys.executable, '-c', measure, 'preset:llama-6x256', method, '2', '512', again],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert 0.85 < found['total'] / found['measured'] < 1.15, {
        name: round(value / 2**20) for name, value in found.items()
    }
