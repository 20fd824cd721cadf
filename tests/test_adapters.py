"""Adapters: one seed is one start in every process, what is saved is what was trained, and merging changes no logit."""

import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from llmft.core import LabError
from llmft.data.tokens import load_tokenizer
from llmft.models.adapters import (
    add_lora,
    check_adapter,
    save_adapter,
    save_and_check,
    trainable_parameters,
    weights_hash,
)
from llmft.models.load import hidden_states, load_model, output_head, quantised_share
from llmft.models.merging import merge_adapter

targets = {'llama-tiny': ['q_proj', 'down_proj'], 'gpt2-tiny': ['c_attn', 'c_fc'], 'qwen2-tiny': ['q_proj', 'v_proj']}
each_shape = pytest.mark.parametrize('shape', targets)
each_quantisation = pytest.mark.parametrize('quantisation', ['none', 'int8', 'nf4'])
ids = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
ids = ids.to('cuda' if torch.cuda.is_available() else 'cpu')


def trained(shape='llama-tiny', quantisation='none', names=None, precision='fp32', seed=0):
    "A model with an adapter whose weights are far from zero, as after training."
    model = add_lora(load_model(f'preset:{shape}', precision, quantisation), 4, 8, 0.0, names or targets[shape], seed)
    for number, parameter in enumerate(trainable_parameters(model).values()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.copy_(drawn * 0.1)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


# ---- adding


def test_two_processes_with_one_seed_start_alike_and_ask_no_network(tmp_path):
    code = """
import sys, torch
from llmft.models.adapters import *
from llmft.models.load import load_model
noise, seed, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(noise)
def load():
    model = load_model('preset:llama-tiny', quantisation='nf4')
    model.name_or_path = 'nobody/nothing'  # as if it came from the hub, which saving must not ask
    return model
model = add_lora(load(), 4, 8, .1, ['all-linear'], seed)
print(weights_hash(trainable_parameters(model)))
check_adapter(save_adapter(model, folder) and model, folder, load, torch.arange(20)[None])"""

    def start(noise, seed):
        env = {name: value for name, value in os.environ.items() if name != 'HF_HUB_OFFLINE'} | dict(
            PYTHONHASHSEED=str(noise)
        )
        done = subprocess.run(
            [sys.executable, '-c', code, str(noise), str(seed), str(tmp_path / f'{noise}-{seed}')],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    first, second = start(1, 7), start(2, 7)
    assert first == second
    here = [
        weights_hash(
            trainable_parameters(
                add_lora(load_model('preset:llama-tiny', quantisation='nf4'), 4, 8, 0.1, ['all-linear'], seed)
            )
        )
        for seed in (7, 8)
    ]
    assert here[0] == first and here[0] != here[1]


@each_quantisation
@each_shape
def test_a_new_adapter_changes_nothing_but_what_is_trained(shape, quantisation):
    torch.manual_seed(99)
    before, state = logits(load_model(f'preset:{shape}', quantisation=quantisation).eval()), torch.get_rng_state()
    model = add_lora(load_model(f'preset:{shape}', quantisation=quantisation), 4, 8, 0.0, targets[shape], seed=0).eval()
    assert torch.equal(state, torch.get_rng_state()), 'the global generator was used'
    assert torch.equal(logits(model), before)
    assert set(trainable_parameters(model)) == {
        name for name, _ in model.named_parameters() if 'lora_' in name
    } and trainable_parameters(model)
    assert not any(getattr(module, 'gradient_checkpointing', False) for module in model.modules())
    assert len(trainable_parameters(model)) == 2 * 2 * len(targets[shape])


def test_k_bit_preparation_keeps_the_dtypes():
    model = add_lora(load_model('preset:llama-tiny', 'bf16', 'nf4'), 4, 8, 0.0, ['all-linear'], seed=0)
    assert model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16
    output_head(model)(hidden_states(model, ids)).float().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())


def test_every_target_must_match():
    for names, message in (
        (['q_proj', 'nothing'], 'nothing'),
        (['c_attn'], 'q_proj'),
        ([], 'empty'),
        (['q_proj', 'all-linear'], 'all-linear'),
        (['lm_head'], 'shares'),
        (['embed_tokens'], 'shares'),
    ):
        with pytest.raises(LabError, match=message):
            add_lora(load_model('preset:llama-tiny'), 4, 8, 0.0, names, seed=0)
    for rank, alpha, dropout in ((0, 8, 0.0), (4, 0, 0.0), (4, 8, 1.0), (4, 8, -0.1)):
        with pytest.raises(LabError):
            add_lora(load_model('preset:llama-tiny'), rank, alpha, dropout, ['q_proj'], seed=0)
    with pytest.raises(LabError, match='already'):
        add_lora(trained(), 4, 8, 0.0, ['q_proj'], seed=0)


def test_the_hash_sees_everything():
    one = dict(a=torch.zeros(2, 3), b=torch.ones(2))
    same = [dict(reversed(one.items()))]
    other = [
        dict(a=torch.zeros(3, 2), b=torch.ones(2)),
        dict(a=torch.zeros(2, 3), c=torch.ones(2)),
        dict(one, b=torch.ones(2).bfloat16()),
        dict(one, b=torch.tensor([1.0, 1.0000001])),
        dict(one, s=torch.tensor(1.0)),
    ]
    assert {weights_hash(params) for params in same} == {weights_hash(one)}
    assert len({weights_hash(params) for params in other} | {weights_hash(one)}) == len(other) + 1


@each_shape
def test_nf4_adapter_gradients_after_an_evaluation(shape):
    model, gradients = trained(shape, 'nf4'), []
    plain = add_lora(
        load_model(f'preset:{shape}', quantisation='nf4').dequantize(), 4, 8, 0.0, targets[shape], seed=0
    ).eval()
    for a, b in zip(trainable_parameters(plain).values(), trainable_parameters(model).values(), strict=True):
        a.data.copy_(b.data)
    for each in (model, plain):
        logits(each), each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        hidden_states(each, ids).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainable_parameters(each).values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


# ---- saving


@each_quantisation
@each_shape
def test_a_saved_adapter_is_read_back_exactly(shape, quantisation, tmp_path):
    model = trained(shape, quantisation).train()
    folder = save_adapter(model, tmp_path / 'adapter')
    assert check_adapter(model, folder, lambda: load_model(f'preset:{shape}', quantisation=quantisation), ids) == 0
    assert model.training, 'the mode of the model was changed'
    theirs = PeftModel.from_pretrained(load_model(f'preset:{shape}', quantisation=quantisation), folder).eval()
    assert torch.equal(logits(theirs), logits(model.eval()))


@pytest.mark.parametrize(
    'damage, message',
    [
        ('empty', 'is empty'),
        ('missing', 'lacks 1 tensors'),
        ('nan', 'not finite'),
        ('other', 'not what the model holds'),
        ('cut', 'cannot be read'),
        ('gone', 'cannot be read'),
    ],
)
def test_a_damaged_adapter_is_named(damage, message, tmp_path):
    model = trained()
    file = save_adapter(model, tmp_path / 'adapter') / 'adapter_model.safetensors'
    tensors = load_file(file)
    name = sorted(tensors)[1]
    if damage == 'empty':
        tensors[name] = torch.empty(0)
    if damage == 'missing':
        del tensors[name]
    if damage == 'nan':
        tensors[name][0, 0] = float('nan')
    if damage == 'other':
        tensors[name][0, 0] += 1e-3
    if damage == 'cut':
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == 'gone':
        file.unlink()
    else:
        save_file(tensors, file)
    with pytest.raises(LabError, match=message) as caught:
        check_adapter(model, tmp_path / 'adapter', lambda: load_model('preset:llama-tiny'), ids)
    assert damage in ('cut', 'gone') or name in str(caught.value)
    assert '\n' not in str(caught.value)


def test_another_base_is_noticed(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / 'adapter')
    with pytest.raises(LabError, match='is not the one'):
        check_adapter(model, tmp_path / 'adapter', lambda: load_model('preset:llama-tiny', seed=1), ids)


def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = trained()
    folder = save_adapter(model, tmp_path / 'adapter')
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(place, **_):
        os.makedirs(place)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(model, 'save_pretrained', half)
    with pytest.raises(OSError):
        save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old and [
        path.name for path in tmp_path.iterdir()
    ] == ['adapter']


# ---- what a run leaves


@pytest.mark.parametrize('merge', [False, True])
def test_an_adapter_is_saved_read_back_and_merged_where_asked(merge, tmp_path):
    model = trained()
    tokenizer = load_tokenizer('base')
    assert save_and_check(model, tmp_path, lambda: load_model('preset:llama-tiny'), ids, tokenizer=tokenizer, merge=merge) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['adapter', 'merged'][: 1 + merge]
    for folder in tmp_path.iterdir():
        assert (folder / 'tokenizer.json').is_file()
        assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    if merge:
        assert (logits(load_model(str(tmp_path / 'merged')).eval()) - logits(model)).abs().max() < 1e-4


def test_all_weights_are_saved_with_their_tokenizer(tmp_path):
    model = load_model('preset:llama-tiny', seed=3).eval()
    assert save_and_check(model, tmp_path, None, ids, tokenizer=load_tokenizer('base')) is None
    assert (tmp_path / 'model/tokenizer.json').exists() and not (tmp_path / 'adapter').exists()
    assert torch.equal(logits(load_model(str(tmp_path / 'model')).eval()), logits(model))


def test_an_adapter_of_another_base_is_not_saved_silently(tmp_path):
    with pytest.raises(LabError, match='is not the one'):
        save_and_check(trained(), tmp_path, lambda: load_model('preset:llama-tiny', seed=1), ids, tokenizer=None)


# ---- merging


@each_quantisation
@pytest.mark.parametrize(
    'shape, names', [(shape, names) for shape in targets for names in (targets[shape], ['all-linear'])]
)
def test_merging_reproduces_the_logits(shape, names, quantisation):
    model = trained(shape, quantisation, names)
    before, hashed = logits(model), weights_hash(dict(model.named_parameters()))
    merged = merge_adapter(model)
    base = (
        load_model(f'preset:{shape}', quantisation=quantisation).dequantize().eval()
        if quantisation != 'none'
        else load_model(f'preset:{shape}').eval()
    )
    moved = (logits(merged) - logits(base)).abs().max()
    assert moved > 0.02, 'the adapter did nothing, so this test shows nothing'
    tolerance = (
        1e-4 if quantisation != 'int8' else 0.05 * moved
    )  # int8 layers round their inputs, a written-out one does not
    assert (logits(merged) - before).abs().max() < tolerance
    assert not quantised_share(merged)['quantised'] and not any('lora' in name for name, _ in merged.named_modules())
    assert weights_hash(dict(model.named_parameters())) == hashed and torch.equal(logits(model), before), (
        'merging changed the model'
    )


@pytest.mark.parametrize('quantisation', ['none', 'nf4'])
def test_a_merged_model_is_saved_and_loaded_as_a_plain_one(quantisation, tmp_path):
    merged = merge_adapter(trained(quantisation=quantisation))
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path)).eval()), logits(merged))


@pytest.mark.parametrize('shape', ['llama-tiny', 'gpt2-tiny'])
def test_all_linear_is_known_by_short_names_however_few_the_layers(shape):
    model = add_lora(load_model(f'preset:{shape}'), 2, 4, 0.0, ['all-linear'], seed=0)
    names = set(model.peft_config['default'].target_modules)
    assert len(names) >= 3 and not any('.' in name for name in names) and 'lm_head' not in names
    adapted = {name for name, module in model.named_modules() if hasattr(module, 'lora_A')}
    assert len(adapted) == sum(
        name.rsplit('.', 1)[-1] in names for name, _ in load_model(f'preset:{shape}').named_modules()
    )
