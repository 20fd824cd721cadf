"""What a run trained leaves in other forms, as the same model, or not at all."""

import json
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmft.cli import call
from llmft.core import LabError, read_json, write_json
from llmft.data.sources import fetched
from llmft.data.tokens import load_tokenizer, turn_ends
from llmft.inference import asking
from llmft.inference.asking import chat_tokens, printable, talk_with
from llmft.inference.generation import complete
from llmft.models import export, gguf_writing
from llmft.models.adapters import add_lora, save_adapter, save_and_check
from llmft.models.export import export_model
from llmft.models.gguf_writing import chat_turns, modelfile_text, packings, word_cut, write_gguf
from llmft.models.load import load_model, model_config
from llmft.models.merging import logits_of, write_out


def moved(net):
    "A model whose adapter does something."
    torch.manual_seed(0)
    for name, weight in net.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(weight, std=0.03)
    return net


def finished(folder, **params):
    "Make `folder` that of a finished run."
    run = dict(status='done', notebook='finetune', name=folder.name)
    write_json(folder / 'run.json', dict(run=run, params=dict(model='base', precision='fp32', **params)))
    return str(folder)


def adapted(folder, quantisation='none', **params):
    "A run that trained an adapter on the shipped base."
    kind = 'lora' if quantisation == 'none' else 'qlora'
    net = moved(add_lora(load_model('base', quantisation=quantisation), 4, 16, 0.0, ['q_proj', 'down_proj'], seed=0))
    save_adapter(net, folder / 'adapter', load_tokenizer('base'))
    return finished(folder, method=kind, quantisation=quantisation, lora_rank=4, **params), net


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp('runs') / 'mine')


def gap(model, net):
    "The largest difference of logits, relative to the largest."
    expected = logits_of(net)
    return float((logits_of(model) - expected).abs().max() / expected.abs().max())


# ---- forms


@pytest.mark.parametrize(
    'form, numbers, allowed',
    [
        ('merged', 'fp32', 1e-5),
        ('merged', 'bf16', 4e-2),
        ('merged', 'fp16', 1e-2),
        ('gguf', 'f32', 1e-5),
        ('gguf', 'f16', 1e-2),
        ('gguf', 'q8_0', 8e-2),
        ('adapter', '', 1e-5),
    ],
)
def test_every_form_is_the_model_of_the_run(run, form, numbers, allowed, tmp_path):
    name, net = run
    made = export_model(name, form, numbers, tmp_path / 'out')
    assert gap(load_model(made['place']), net) <= allowed
    assert made['difference'] <= made['allowed'] and made['bytes'] > 1000
    own, found = load_tokenizer('base'), load_tokenizer(made['place'])
    text = "I'll print 12345\n\n\tnaïve <|user|>"
    assert found(text)['input_ids'] == own(text)['input_ids'] and found.chat_template == own.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out']


@pytest.mark.parametrize('quantisation', ['nf4', 'int8'])
def test_an_adapter_on_quantised_weights_takes_them_along(quantisation, tmp_path):
    name, net = adapted(tmp_path / 'mine', quantisation)
    made = export_model(name, 'gguf')
    assert gap(load_model(made['place']), net) < 5e-2
    assert gap(load_model(made['place']), net) < gap(
        load_model(name), net
    )  # on the base in 32 bits it is another model


@pytest.mark.parametrize('preset', ['llama-tiny', 'qwen2-tiny', 'gpt2-tiny'])
def test_architectures_that_are_written(preset, tmp_path):
    tokenizer = load_tokenizer('base')
    config = model_config(f'preset:{preset}')
    config.max_position_embeddings = 1024  # a GPT-2 has as many in a GGUF file
    model = AutoModelForCausalLM.from_config(config)
    model.resize_token_embeddings(len(tokenizer) + 3)
    for weight in model.parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 1.0, 0.1)  # a scale or a bias that is lost is seen
    save_and_check(model, tmp_path / 'full', None, None, tokenizer=tokenizer)
    name = finished(tmp_path / 'full', method='full')
    made = export_model(name, 'gguf', 'f32')
    assert gap(load_model(made['place']), load_model(name)) < 1e-5


def test_weights_are_packed_as_the_package_packs_them(tmp_path):
    model = load_model('base')
    path = write_gguf(tmp_path / 'one.gguf', model, load_tokenizer('base'), 'q8_0')
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    down = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(down, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    )
    found = tensors['blk.1.ffn_down.weight']
    assert np.array_equal(gguf.quants.dequantize(found.data, found.tensor_type), expected)
    assert tensors['blk.1.attn_norm.weight'].tensor_type.name == 'F32'


# ---- what is refused, and what is kept then


def test_other_architectures_and_tokenizers_are_refused_by_one_line(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        'gpt_neox', hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=4096
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / 'neox')
    load_tokenizer('base').save_pretrained(tmp_path / 'neox')
    with pytest.raises(LabError, match='the architecture gpt_neox is not written as GGUF here') as caught:
        export_model(str(tmp_path / 'neox'), 'gguf', folder=tmp_path / 'out')
    assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()

    from tokenizers import pre_tokenizers

    tokenizer = load_tokenizer('base')
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(LabError, match='the tokenizer is not written as GGUF'):
        word_cut(tokenizer)


def test_an_export_is_one_line_without_bars(run, tmp_path, capfd):
    capfd.readouterr()
    assert call(['export', run[0], '--to', 'merged', '--out', str(tmp_path / 'out')]) == 0
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and 'no logit' in out and err == ''


def test_what_stands_there_stays(run, tmp_path, capsys):
    place = tmp_path / 'out'
    place.mkdir()
    (place / 'precious').write_text('x')
    assert call(['export', run[0], '--to', 'merged', '--out', str(place)]) == 2
    assert 'exists already' in capsys.readouterr().err
    assert (place / 'precious').read_text() == 'x' and list(place.iterdir()) == [place / 'precious']


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*rest, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', full)
    with pytest.raises(LabError, match='No space left on device') as caught:
        export_model(run[0], 'gguf', folder=tmp_path / 'out')
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())

    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, 'disk_usage', lambda place: usage)
    with pytest.raises(LabError, match='GiB free and the export takes'):
        export_model(run[0], 'merged', folder=tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_a_missing_base_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    name, _ = adapted(tmp_path / 'mine')
    config = read_json(tmp_path / 'mine/adapter/adapter_config.json')
    write_json(tmp_path / 'mine/adapter/adapter_config.json', config | dict(base_model_name_or_path='/nowhere/base'))
    monkeypatch.setattr(export, 'load_model', None)
    with pytest.raises(LabError, match='the base of the adapter .* is missing'):
        export_model(name, 'merged')
    assert not (tmp_path / 'mine/exports').exists()


@pytest.mark.parametrize('loss', ['template', 'tokens', 'weights'])
def test_an_artefact_that_is_not_the_model_is_thrown_away(run, loss, tmp_path, monkeypatch):
    if loss == 'template':
        monkeypatch.setattr(gguf.GGUFWriter, 'add_chat_template', lambda *rest: None)
    if loss == 'tokens':
        write = gguf.GGUFWriter.add_token_merges
        monkeypatch.setattr(gguf.GGUFWriter, 'add_token_merges', lambda self, merges: write(self, merges[:200]))
    if loss == 'weights':
        monkeypatch.setattr(gguf_writing, 'interleaved', lambda weight, heads: weight)
    words = dict(template='the chat template is missing', tokens='gives other tokens', weights='is not the model')[loss]
    with pytest.raises(LabError, match=words):
        export_model(run[0], 'gguf', folder=tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_the_hub_is_asked_for_and_private(run, capsys, monkeypatch):
    assert call(['export', run[0], '--to', 'hub', '--repo', 'me/mine']) == 2
    assert 'the hub does not answer' in capsys.readouterr().err
    asked = []

    class Hub:
        def create_repo(self, repo, private):
            asked.append((repo, private))
            return f'https://hub/{repo}'

        def upload_folder(self, repo_id, folder_path):
            asked.append(sorted(os.listdir(folder_path)))

    monkeypatch.setattr(export, 'check_hub', lambda repo: Hub())
    assert call(['export', run[0], '--to', 'hub', '--repo', 'me/mine']) == 0
    assert asked[0] == ('me/mine', True) and 'tokenizer.json' in asked[1]
    assert call(['export', run[0], '--to', 'hub', '--repo', 'me/open', '--public']) == 0
    assert asked[2] == ('me/open', False)


# ---- the Modelfile


def go_rendered(modelfile, turns):
    "What Ollama makes of turns by the template of a Modelfile."
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, flags=re.DOTALL)[1]
    body, answer = re.fullmatch(r'\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)', template, flags=re.DOTALL).groups()
    cases = dict(re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', body, flags=re.DOTALL))
    return ''.join(cases[turn['role']].replace('{{ .Content }}', turn['content']) for turn in turns) + answer


chatml = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize('template', [None, chatml, '{{ bos_token }}' + chatml])
def test_ollama_writes_what_the_chat_template_writes(template):
    tokenizer = load_tokenizer('base')
    tokenizer.chat_template = template or tokenizer.chat_template
    turns = [dict(role=role, content=f'"{role}" 1') for role in ('system', 'user', 'assistant', 'user')]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    written = go_rendered(modelfile_text('a.gguf', tokenizer), turns)
    assert written == expected.removeprefix(tokenizer.bos_token)  # which llama.cpp writes itself
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | trim | upper }}{% endfor %}"
    assert chat_turns(tokenizer) == {} and modelfile_text('a.gguf', tokenizer) == ''


# ---- asking


def test_try_shows_both_and_marks_what_differs(run, capsys):
    assert call(['try', run[0], 'The "with" statement', '--tokens', '8', '--json']) == 0
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])['answers']
    assert {way: list(texts) for way, texts in answers.items()} == dict(
        greedy=['base', 'tuned'], sampled=['base', 'tuned']
    )
    own = complete(load_model('base'), load_tokenizer('base'), ['The "with" statement'], 8)
    assert answers['greedy']['base'] == own[0]
    assert call(['try', run[0], 'The "with" statement', '--tokens', '8']) == 0
    assert '[' in capsys.readouterr().out
    assert call(['try', './nowhere', 'x']) == 2


def test_a_conversation_goes_on_and_begins_again(run, monkeypatch):
    seen, lines = [], iter(['One', 'Two', '/reset', 'Three', '/system Be kind.', 'Four', '/quit'])
    lengths, asked, stream = [], [], asking.stream_answer

    def heard(model, tokenizer, ids, show, **options):
        asked.append(tokenizer.decode(ids))
        return stream(model, tokenizer, ids, show, **options)

    monkeypatch.setattr(asking, 'stream_answer', heard)

    def read():
        lengths.append(len(seen))
        return next(lines)

    turns = talk_with(run[0], read, seen.append, max_new_tokens=6, temperature=0)
    assert [turn['content'] for turn in turns[:2]] == ['Be kind.', 'Four'] and turns[2]['role'] == 'assistant'
    assert ['One' in text for text in asked] == [True, True, False, False]
    assert ['Three' in text for text in asked] == [False, False, True, False] and 'Be kind.' in asked[3]
    tokenizer = load_tokenizer('base')
    two = chat_tokens(
        [dict(role='user', content='One'), dict(role='assistant', content='x'), dict(role='user', content='Two')],
        tokenizer,
    )
    assert tokenizer.decode(two).count('<|user|>') == 2
    assert max(np.diff(lengths)) > 2, 'an answer comes in pieces'
    assert printable('\x1b]0;x\x07') == ' ]0;x '


def test_a_long_conversation_ends_in_a_line_and_goes_on(run):
    seen, lines = [], iter(['word ' * 5000, 'Hello', '/quit'])
    turns = talk_with(run[0], lambda: next(lines), seen.append, max_new_tokens=2)
    assert '/reset begins again' in ''.join(seen) and len(turns) == 2


# ---- a real model


def test_smollm2_is_exported_and_talks(tmp_path):
    if fetched('smollm2') is None:
        pytest.skip('SmolLM2 is not on this machine: llmft fetch smollm2')
    made = export_model('smollm2', 'gguf', 'q8_0', tmp_path / 'out')
    assert made['difference'] < packings['q8_0'].tolerance
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM' in (tmp_path / 'out/Modelfile').read_text()

    told, lines = [], iter(['What is the capital of France?', '/quit'])
    talk_with(made['place'], lambda: next(lines), told.append, max_new_tokens=12, temperature=0)
    assert 'Paris' in ''.join(told)


def test_a_merged_export_ends_where_the_run_does(run, tmp_path):
    tokenizer = load_tokenizer('base')
    place = export_model(run[0], 'merged', 'fp32', tmp_path / 'new')['place']
    settings = AutoModelForCausalLM.from_pretrained(place).generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    assert set(ends) == turn_ends(tokenizer) and tokenizer.eos_token_id in ends


def test_a_merged_export_of_a_quantised_run_has_a_card_of_its_own(tmp_path):
    folder, _ = adapted(tmp_path / 'rounded', 'nf4')
    code = "model = load_model(folder, 'fp32', 'nf4', seed=0).eval()"
    (tmp_path / 'rounded/adapter/README.md').write_text(f"---\nlibrary_name: peft\n---\nfolder = 'x'\n{code}\n")
    card = (Path(export_model(folder, 'merged', 'fp32', tmp_path / 'new')['place']) / 'README.md').read_text()
    assert "folder = '.'" in card and "load_model(folder, 'fp32', 'none', seed=0)" in card
    assert 'library_name: transformers' in card and 'peft' not in card


def test_small_changes_to_a_quantised_base_in_16_bits_survive_an_export():
    net = add_lora(load_model('base', 'bf16', 'nf4'), 8, 16.0, 0.0, ['q_proj'], 0).eval()
    for name, weight in net.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(weight, std=2e-4)
    delta = net.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight('default').float()
    base = write_out(load_model('base', 'bf16', 'nf4'), torch.float32).model.layers[0].self_attn.q_proj.weight
    merged = export.plain_model(net).model.layers[0].self_attn.q_proj.weight
    assert float(((merged - base) - delta).abs().max()) < 0.02 * float(delta.abs().max())
