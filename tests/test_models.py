"""Models: packed documents stay apart, quantised gradients are right, weights depend on the seed alone, and nothing asks the network."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmft.core import LabError, assets
from llmft.data.tokens import load_tokenizer
from llmft.models import load as models
from llmft.models.load import (
    check_model_settings,
    hidden_states,
    load_model,
    model_config,
    output_head,
    presets,
    quantised_share,
)
from llmft.models.precisions import check_form

shapes = ['llama-tiny', 'gpt2-tiny', 'qwen2-tiny']
here = 'cuda' if torch.cuda.is_available() else 'cpu'
each_shape = pytest.mark.parametrize('shape', shapes)
lengths = [7, 12, 12, 1, 30, 5]
packed_slots = sum(lengths)


def tokens(rows=1, slots=packed_slots, seed=0):
    return torch.randint(512, (rows, slots), generator=torch.Generator().manual_seed(seed)).to(here)


def logits_and_gradients(model, pieces, **packed):
    "Logits of `pieces` one after the other, (1, slots, vocabulary), and the gradient of all weights as one vector."
    model.zero_grad()
    logits_BTV = torch.cat([output_head(model)(hidden_states(model, piece, **packed)) for piece in pieces], dim=1)
    logits_BTV.log_softmax(-1)[..., 3].mean().backward()
    return logits_BTV.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---- attention inside documents


@pytest.mark.parametrize('attention', ['documents', 'sdpa', 'eager'])
@each_shape
def test_packed_equals_each_document_alone(shape, attention):
    model, ids = load_model(f'preset:{shape}', attention=attention).eval(), tokens()
    alone, alone_gradient = logits_and_gradients(model, ids.split(lengths, dim=1))
    packed, packed_gradient = logits_and_gradients(model, [ids], document_lengths=lengths)
    assert (packed - alone).abs().max() < 1e-5
    assert (packed_gradient - alone_gradient).abs().max() < 1e-5 * alone_gradient.abs().max()
    ignored, _ = logits_and_gradients(model, [ids])
    assert (ignored - alone).abs().max() > 1e-2, 'without lengths the documents must differ, or this test shows nothing'


@each_shape
def test_nothing_leaks_between_documents(shape):
    model, ids = load_model(f'preset:{shape}').eval(), tokens()
    before = hidden_states(model, ids, document_lengths=lengths)
    for document, start in enumerate([0, 7, 19, 31, 32, 62]):
        after = hidden_states(model, ids.index_fill(1, torch.tensor([start], device=here), 511), document_lengths=lengths)
        changed = (after != before).any(-1)[0].nonzero().flatten().tolist()
        assert changed and min(changed) == start and max(changed) < start + lengths[document]


@each_shape
def test_restarting_positions_without_lengths_are_isolated_too(shape):
    model, ids = load_model(f'preset:{shape}').eval(), tokens()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    torch.testing.assert_close(
        hidden_states(model, ids, positions), hidden_states(model, ids, positions, lengths), atol=1e-5, rtol=1e-5
    )


def test_right_padding_needs_no_mask():
    model, ids = load_model('preset:llama-tiny').eval(), tokens(3, 20)
    padded = hidden_states(model, ids, torch.arange(20).expand(3, 20))
    for row, length in enumerate([20, 11, 4]):
        torch.testing.assert_close(
            padded[row, :length], hidden_states(model, ids[row : row + 1, :length])[0], atol=1e-5, rtol=1e-5
        )


@each_shape
def test_gradient_checkpointing_changes_nothing(shape):
    model, ids = load_model(f'preset:{shape}'), tokens()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain, plain_gradient = logits_and_gradients(model, [ids], document_lengths=lengths)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    again, gradient = logits_and_gradients(model.train(), [ids], document_lengths=lengths)
    assert torch.equal(plain, again) and torch.allclose(plain_gradient, gradient, atol=1e-7)


@each_shape
def test_generation_is_that_of_sdpa(shape):
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long, device=here)
    mask[0, :4] = mask[1, :1] = 0
    ours, theirs = (load_model(f'preset:{shape}', attention=attention).eval() for attention in ('documents', 'sdpa'))
    options = dict(
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    a, b = ours.generate(ids, **options), theirs.generate(ids, **options)
    assert torch.equal(a.sequences, b.sequences) and torch.equal(torch.stack(a.logits), torch.stack(b.logits))


def test_attention_window_inside_documents():
    config = model_config('preset:qwen2-tiny')
    config.update(
        dict(
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=0,
            layer_types=['sliding_attention', 'full_attention'],
        )
    )
    model, ids = AutoModelForCausalLM.from_config(config, attn_implementation='documents').eval(), tokens()
    alone, _ = logits_and_gradients(model, ids.split(lengths, dim=1))
    packed, _ = logits_and_gradients(model, [ids], document_lengths=lengths)
    assert (packed - alone).abs().max() < 1e-5


def test_rows_that_cannot_be_packed_are_refused():
    model = load_model('preset:llama-tiny')
    with pytest.raises(LabError, match='one row'):
        hidden_states(model, tokens(2, 10), document_lengths=[5, 5])
    with pytest.raises(LabError, match='sum to 9'):
        hidden_states(model, tokens(1, 10), document_lengths=[5, 4])
    with pytest.raises(LabError, match='positions'):
        hidden_states(load_model('preset:gpt2-tiny'), tokens(1, 513))
    hidden_states(model, tokens(1, 2200), document_lengths=[1000, 1200])  # only documents must fit, rows may be longer
    model.config.layer_types = ['full_attention', 'linear_attention']
    with pytest.raises(LabError, match='linear_attention'):
        hidden_states(model, tokens(1, 10), document_lengths=[5, 5])


@pytest.mark.skipif(here == 'cuda', reason='the attention of a GPU refuses the mask that is made here')
def test_an_architecture_that_ignores_lengths_is_refused(monkeypatch):
    model = load_model('preset:llama-tiny')
    monkeypatch.setattr(model.config, '_attn_implementation_internal', 'sdpa')
    for layer in model.model.layers:
        layer.self_attn.config = model_config('preset:llama-tiny')
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = 'sdpa'
    monkeypatch.setattr(model.config, '_attn_implementation_internal', 'documents')
    with pytest.raises(LabError, match='did not respect'):
        hidden_states(model, tokens(1, 10), document_lengths=[5, 5])


@pytest.mark.skipif(here == 'cuda', reason='what is compared is processor time')
def test_packed_rows_are_faster_than_under_a_mask():
    "Processor time, not the clock, so that other work on the machine does not decide."
    ragged = [20, 61, 88, 109, 111, 137, 177, 321]
    ids, threads, times = torch.randint(8000, (1, sum(ragged))), torch.get_num_threads(), dict(documents=[], sdpa=[])
    ours = load_model('preset:llama-6x256')
    pair = dict(documents=ours, sdpa=load_model('preset:llama-6x256', attention='sdpa'))
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            for attention, model in pair.items():
                start = time.process_time()
                hidden_states(model, ids, document_lengths=ragged).sum().backward()
                times[attention].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    ratio = min(times['sdpa']) / min(times['documents'])
    print(f'documents: {ratio:.2f} times as fast as sdpa with a block mask')
    assert ratio > 1.2


# ---- quantisation


def gradient_after_evaluation(model, ids):
    with torch.no_grad():
        model.eval()(ids), model(ids[:, :1])
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    model.zero_grad()
    hidden_states(model, ids).square().mean().backward()
    return embedding.grad.flatten()


@pytest.mark.parametrize('quantisation', ['nf4', 'int8'])
@each_shape
def test_quantised_gradients_after_an_evaluation(shape, quantisation):
    ids = tokens()
    model, exact = (
        load_model(f'preset:{shape}', quantisation=quantisation),
        load_model(f'preset:{shape}', quantisation=quantisation).dequantize(),
    )
    assert (
        torch.cosine_similarity(gradient_after_evaluation(model, ids), gradient_after_evaluation(exact, ids), dim=0)
        > 0.999
    )


@each_shape
def test_nf4_decodes_one_token_as_written_out(shape):
    ids = tokens(1, 1)
    model, exact = (
        load_model(f'preset:{shape}', quantisation='nf4').eval(),
        load_model(f'preset:{shape}', quantisation='nf4').dequantize().eval(),
    )
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, exact(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('shape', ['llama-tiny', 'qwen2-tiny'])
def test_nf4_weights_are_the_nearest_codes_in_every_row(shape):
    "Rows of 176 numbers are no whole number of blocks of 64."
    exact, held = (
        load_model(f'preset:{shape}').state_dict(),
        load_model(f'preset:{shape}', quantisation='nf4').dequantize().state_dict(),
    )
    names = [name for name in exact if 'proj.weight' in name]
    assert len(names) == 14 and all((held[name] - exact[name]).std() < 0.1 * exact[name].std() for name in names)


@pytest.mark.parametrize('quantisation', ['nf4', 'int8'])
@each_shape
def test_quantised_share_counts_layers(shape, quantisation):
    model, share = (
        load_model(f'preset:{shape}'),
        quantised_share(load_model(f'preset:{shape}', quantisation=quantisation)),
    )
    blocks = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ('.layers.' in name or '.h.' in name)
    )
    assert share['total'] == sum(p.numel() for p in model.parameters())
    assert share['quantised'] in (0, blocks) and (shape.startswith('gpt2') or share['quantised'] == blocks)
    assert share['share'] == share['quantised'] / share['total']


# ---- what cannot work is refused before anything is loaded


class Gpu:
    "PyTorch's answers on a machine with a GPU that has bf16, or only emulates it."

    def __init__(self, monkeypatch, emulates):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: 'pretended')
        monkeypatch.setattr(
            torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation or not emulates
        )


def no_model(*_, **__):
    raise AssertionError('a model was loaded')


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(precision='fp15'), 'fp16'),
        (dict(quantisation='nf5'), 'nf4'),
        (dict(attention='flash_attention'), "did you mean 'flash_attention_2'"),
        (dict(attention='flex_attention'), 'choose from documents'),
        (
            dict(attention='flash_attention_2'),
            'needs the package flash-attn.*precision bf16 or fp16: use attention=doc',
        ),
    ],
)
def test_settings_that_cannot_work_are_one_line_before_loading(monkeypatch, settings, words):
    monkeypatch.setattr(models.importlib.util, 'find_spec', lambda name: None)
    for name in ('_weights', '_pretrained', 'model_config'):
        monkeypatch.setattr(models, name, no_model)
    with pytest.raises(LabError, match=words) as caught:
        load_model('preset:llama-tiny', **settings)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('missing', ['package', 'gpu', 'precision', None])
def test_flash_attention_needs_all_of_three(monkeypatch, missing):
    Gpu(monkeypatch, emulates=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: missing != 'gpu')
    monkeypatch.setattr(models.importlib.util, 'find_spec', lambda name: None if missing == 'package' else object())
    settings = dict(precision='fp32' if missing == 'precision' else 'fp16', attention='flash_attention_2')
    if missing is None:
        return check_model_settings(**settings)
    words = dict(package='the package flash-attn', gpu='a CUDA device', precision='precision bf16 or fp16')[missing]
    with pytest.raises(LabError, match=f'^attention flash_attention_2 needs {words}: use attention=documents$'):
        check_model_settings(**settings)


@pytest.mark.parametrize('precision, mixed', [('bf16', 'no'), ('fp32', 'bf16'), ('bf16', None)])
def test_emulated_bf16_is_refused(monkeypatch, precision, mixed):
    Gpu(monkeypatch, emulates=True)
    with pytest.raises(LabError, match='pretended.* has no bf16'):
        check_model_settings(precision, mixed)
    Gpu(monkeypatch, emulates=False)
    check_model_settings(precision, mixed)


def test_a_cpu_answers_in_fp16_and_does_not_train_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    check_model_settings('fp16')
    for mixed, words in (('no', 'there is no GPU'), ('bf16', 'a run uses one of them')):
        with pytest.raises(LabError, match=words):
            check_model_settings('fp16', mixed)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'bitsandbytes', None)
    with pytest.raises(LabError, match='bitsandbytes is not installed'):
        check_model_settings(quantisation='nf4')
    check_model_settings()


def test_every_choice_says_what_it_is():
    for declared in (models.precisions, models.quantisations, models.attentions):
        assert all(choice.says and isinstance(choice.needs, tuple) for choice in declared.values())


# ---- loading


@each_shape
def test_weights_depend_on_the_seed_alone(shape):
    torch.manual_seed(3)
    first = load_model(f'preset:{shape}', seed=5).state_dict()
    torch.rand(17)
    state = torch.get_rng_state()
    again, other = (
        load_model(f'preset:{shape}', seed=5).state_dict(),
        load_model(f'preset:{shape}', seed=6).state_dict(),
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first) and any(
        not torch.equal(first[name], other[name]) for name in first
    )


@pytest.mark.parametrize('precision', models.precisions)
@each_shape
def test_a_folder_is_read_back(shape, precision, tmp_path):
    model = load_model(f'preset:{shape}', precision)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), precision)
    assert again.dtype == model.dtype == models.precisions[precision].dtype
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.get_input_embeddings().weight is output_head(again).weight
    assert again.config._attn_implementation == 'documents' and again.name_or_path == str(tmp_path)


def test_incomplete_and_broken_weights_are_one_line(tmp_path):
    load_model('preset:llama-tiny').save_pretrained(tmp_path / 'whole')
    for name, spoil in dict(
        none=lambda file: file.unlink(),
        cut=lambda file: file.write_bytes(file.read_bytes()[:5000]),
        empty=lambda file: file.write_bytes(b''),
    ).items():
        shutil.copytree(tmp_path / 'whole', tmp_path / name)
        spoil(tmp_path / name / 'model.safetensors')
        with pytest.raises(LabError, match='cannot be loaded') as caught:
            load_model(str(tmp_path / name))
        assert '\n' not in str(caught.value)
    config = model_config('preset:llama-tiny')
    config.num_hidden_layers = 3
    shutil.copytree(tmp_path / 'whole', tmp_path / 'short')
    config.save_pretrained(tmp_path / 'short')
    with pytest.raises(LabError, match='lacks 9 weights'):
        load_model(str(tmp_path / 'short'))


@pytest.mark.parametrize(
    'name', ['Qwen/Qwen2.5-0.5B-Instruct', 'nobody/nothing', 'preset:llama-3.2-3', './nowhere', 'llama-tiny', 'a/b/c']
)
def test_a_model_that_is_not_there_is_one_line_at_once(name):
    start = time.perf_counter()
    with pytest.raises(LabError, match='preset|folder') as caught:
        load_model(name)
    assert time.perf_counter() - start < 5 and '\n' not in str(caught.value)


def test_an_unreachable_hub_is_noticed_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    for module in (huggingface_hub, huggingface_hub.utils._http):  # what llmft asks, and what the library asks by itself
        monkeypatch.setattr(module, 'get_session', lambda: (_ for _ in ()).throw(OSError('no route')))
    start = time.perf_counter()
    with pytest.raises(LabError, match='the hub cannot be reached'):
        model_config('nobody/nothing')
    with pytest.raises(LabError, match="there is no model 'nobody/nothing'"):
        load_tokenizer('nobody/nothing')
    assert time.perf_counter() - start < 5


def test_local_models_ask_no_network_even_when_they_may(tmp_path):
    "The guard on every socket (tests/offline) notes each attempt, also in this process of its own, where HF_HUB_OFFLINE is not set."
    code = f"""
from llmft.models.load import load_model, model_config
from llmft.data.tokens import load_tokenizer
load_model('preset:llama-tiny').save_pretrained({str(tmp_path)!r})
for quantisation in ('none', 'int8', 'nf4'): load_model({str(tmp_path)!r}, quantisation=quantisation)
model_config('meta-llama/Llama-3.2-3B-Instruct'), model_config({str(tmp_path)!r})"""
    env = {name: value for name, value in os.environ.items() if name != 'HF_HUB_OFFLINE'}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_preset_has_a_configuration():
    assert len(presets) >= 12
    for name in presets:
        assert model_config(f'preset:{name}').vocab_size >= 512
    assert all(preset in presets for preset in models.hub_presets.values()) and len(models.hub_presets) >= 12


@pytest.mark.skipif(not (assets / 'base' / 'config.json').exists(), reason='the base model is not in the assets yet')
def test_the_shipped_base_loads():
    model = load_model('base').eval()
    assert sum(p.numel() for p in model.parameters()) < 5e6
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize(
    'gpu, rank, moves',
    [
        (True, False, ['cuda']),
        (True, True, []),
        (False, False, []),
    ],
)
def test_a_model_goes_to_the_gpu_where_there_is_one(monkeypatch, gpu, rank, moves):
    class Model:
        went = []

        def to(self, device):
            self.went = [*self.went, device]
            return self

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    if rank:
        monkeypatch.setenv('RANK', '1')
    else:
        monkeypatch.delenv('RANK', raising=False)
    model = Model()
    assert models.placed(model) is model and model.went == moves


def test_a_model_that_does_not_fit_the_gpu_says_so(monkeypatch):
    model = torch.nn.Linear(2**10, 2**10, bias=False)

    def refuse(device):
        raise torch.cuda.OutOfMemoryError('full')

    monkeypatch.setattr(model, 'to', refuse)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=2**21))
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(LabError, match='take 0.00391 GiB and do not fit the GPU of 0.00195 GiB: use quantisation nf4'):
        models.placed(model)


@pytest.mark.parametrize('capability, fits', [((7, 5), False), ((8, 0), True)])
def test_four_fast_bits_are_refused_before_ampere(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *device: 'T4')
    with contextlib.nullcontext() if fits else pytest.raises(LabError, match='int4_fast has no kernel for this GPU'):
        check_form('int4_fast')


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    'dtype, masked, capability, repeated',
    [
        (torch.float32, False, (9, 0), True),
        (torch.float32, True, (9, 0), True),
        (torch.bfloat16, True, (9, 0), True),
        (torch.bfloat16, False, (8, 0), False),
        (torch.float16, False, (7, 5), True),
    ],
)
def test_shared_heads_are_repeated_where_cuda_would_write_out_the_scores(
    monkeypatch, dtype, masked, capability, repeated
):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    query, key, value = (torch.randn(1, heads, 5, 8, dtype=dtype) for heads in (4, 2, 2))
    assert models.shared_heads(query, key, value, masked)[2] and not models.shared_heads(query, query, query, masked)[2]
    keys, values, grouped = models.shared_heads(query.as_subclass(OnGpu), key, value, masked)
    assert (keys.shape[1] == 4) == repeated != grouped
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        attend(query, keys, values, is_causal=True, enable_gqa=grouped),
        attend(query, key, value, is_causal=True, enable_gqa=True),
    )


def test_a_cached_model_that_cannot_be_loaded_is_not_called_absent(tmp_path, monkeypatch):
    cache = tmp_path / 'models--me--odd'
    (cache / 'refs').mkdir(parents=True)
    (cache / 'refs/main').write_text('a' * 40)
    (cache / f'snapshots/{"a" * 40}').mkdir(parents=True)
    (cache / f'snapshots/{"a" * 40}/config.json').write_text('{"model_type": "not_known"}')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(LabError, match='not_known') as caught:
        model_config('me/odd')
    assert 'cannot be reached' not in str(caught.value)
