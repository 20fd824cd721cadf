"""Adapters made elsewhere: the same logits after loading, merging and reading back, or a refusal in one line."""

import copy
import json
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llmft.core import LabError
from llmft.inference.generation import generate
from llmft.models.adapters import save_merged
from llmft.models.load import hidden_states, load_model, output_head, quantised_share
from llmft.models.lora_products import multiply_as_read
from llmft.models.merging import load_adapter, logits_of, merge_adapter, merge_in_place

ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
linear = ['q_proj', 'v_proj', 'down_proj']
lora = dict(r=4, lora_alpha=8, target_modules=linear, task_type='CAUSAL_LM')
other = dict(target_modules=linear, task_type='CAUSAL_LM')


def kinds():
    "Name -> configuration of an adapter as people train them elsewhere."
    return {
        'LoRA': LoraConfig(**lora),
        'LoRA with biases': LoraConfig(**lora, lora_bias=True),
        'rsLoRA': LoraConfig(**lora, use_rslora=True),
        'DoRA': LoraConfig(**lora, use_dora=True),
        'ranks by pattern': LoraConfig(**lora, rank_pattern=dict(q_proj=2), alpha_pattern=dict(v_proj=3)),
        'some layers': LoraConfig(**lora, layers_to_transform=[1]),
        'PiSSA': LoraConfig(**lora, init_lora_weights='pissa'),
        'OLoRA': LoraConfig(**lora, init_lora_weights='olora'),
        'gaussian': LoraConfig(**lora, init_lora_weights='gaussian'),
        'IA3': peft.IA3Config(**other, feedforward_modules=['down_proj']),
        'LoHa': peft.LoHaConfig(**other, r=4, alpha=8),
        'LoKr': peft.LoKrConfig(**other, r=4, alpha=8),
        'VeRA': peft.VeraConfig(r=4, target_modules=['q_proj', 'o_proj'], task_type='CAUSAL_LM'),
        'norms saved': LoraConfig(**lora, modules_to_save=['input_layernorm', 'norm']),
        'head saved': LoraConfig(**lora, modules_to_save=['lm_head']),
        'embedding saved': LoraConfig(**lora, modules_to_save=['embed_tokens']),
        'both ends saved': LoraConfig(**lora, modules_to_save=['embed_tokens'], ensure_weight_tying=True),
        'LoRA on the embedding': LoraConfig(**lora | dict(target_modules=['q_proj', 'embed_tokens'])),
        'LoRA on the head': LoraConfig(**lora | dict(target_modules=['q_proj', 'lm_head'])),
        'some tokens': LoraConfig(**lora, trainable_token_indices=[3, 7, 500]),
    }


def made(config, quantisation='none', precision='fp32', name='preset:llama-tiny'):
    "A base with an adapter that PEFT makes and that has learnt something."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = multiply_as_read(get_peft_model(load_model(name, precision, quantisation), config))
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_((torch.randn(parameter.shape, generator=noise) * 0.05).to(parameter.dtype))
    return model.eval()


def saved(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model.save_pretrained(folder)
    return folder


def through_layers(model):
    "Logits as training and scoring compute them."
    with torch.no_grad():
        return output_head(model)(hidden_states(model, ids)).float()


def gap(first, second):
    return (first - second).abs().max().item()


cases = [(kind, 'fp32') for kind in kinds()]
cases += [(kind, 'nf4') for kind in ('LoRA', 'DoRA', 'OLoRA', 'IA3', 'VeRA', 'norms saved', 'LoRA on the embedding')]
cases += [(kind, 'bf16') for kind in ('LoRA', 'DoRA', 'IA3', 'LoKr', 'norms saved', 'LoRA on the embedding')]
cases += [(kind, 'int8') for kind in ('LoRA', 'DoRA', 'IA3', 'norms saved')]
unmergeable = ('LoRA with biases',)  # the layers have no bias to add it to
tolerances = {'fp32': 2e-4, 'bf16': 0.03}


@pytest.mark.parametrize('kind, form', cases)
def test_logits_stay_the_same_after_loading_and_merging(kind, form, tmp_path):
    precision = 'bf16' if form == 'bf16' else 'fp32'
    quantisation = form if form in ('nf4', 'int8') else 'none'

    def base():
        return load_model('preset:llama-tiny', precision, quantisation)

    model = made(kinds()[kind], quantisation, precision)
    own = logits_of(model, ids)
    moved = gap(own, logits_of(base(), ids))
    assert moved > 0.01, 'the adapter did nothing, so this test shows nothing'
    saved(model, tmp_path / 'adapter')

    loaded = load_adapter(base(), tmp_path / 'adapter')
    assert gap(logits_of(loaded, ids), own) <= 1e-5 * own.abs().max()
    assert gap(through_layers(loaded.eval()), own) <= (1e-5 if precision == 'fp32' else 0.02) * own.abs().max()

    if kind in unmergeable:
        with pytest.raises(LabError, match='cannot be merged'):
            merge_adapter(loaded)
        return
    state = {name: weight.clone() for name, weight in loaded.state_dict().items() if isinstance(weight, torch.Tensor)}
    merged = merge_adapter(loaded)
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.state_dict().items() if name in state)
    limit = tolerances[precision] * own.abs().max() if form != 'int8' else 0.06 * own.abs().max()
    assert gap(logits_of(merged, ids), own) <= limit
    assert not quantised_share(merged)['quantised'] and not hasattr(merged, 'peft_config')

    assert save_merged(loaded, tmp_path / 'merged') <= 1e-6
    again = load_model(str(tmp_path / 'merged'), precision)
    assert gap(logits_of(again, ids), logits_of(merged, ids)) <= 1e-6
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('.')] == []


def test_a_kind_that_cannot_sit_on_quantised_weights_is_refused(tmp_path):
    folder = saved(made(kinds()['LoHa']), tmp_path)
    with pytest.raises(LabError, match='does not fit'):
        load_adapter(load_model('preset:llama-tiny', quantisation='nf4'), folder)


@pytest.mark.parametrize('kind', ['LoRA', 'DoRA', 'IA3', 'norms saved', 'LoRA on the embedding', 'head saved'])
def test_decoding_sees_the_adapter(kind, tmp_path):
    folder = saved(made(kinds()[kind]), tmp_path)
    base = load_model('preset:llama-tiny').eval()
    for name, weight in base.named_parameters():
        if weight.dim() > 1 and 'embed' not in name:
            weight.data.mul_(4)  # or the last token would be repeated whatever the adapter does
    prompts = ids[:, :6]
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = base.generate(input_ids=prompts, **options)[:, 6:].tolist()
    loaded = load_adapter(base, folder).eval()
    expected = loaded.generate(input_ids=prompts, **options)[:, 6:].tolist()
    assert generate(loaded, prompts.tolist(), 8).ids == expected != plain


@pytest.mark.parametrize('name, targets', [('preset:gpt2-tiny', ['c_attn', 'c_fc']), ('preset:qwen2-tiny', ['v_proj'])])
@pytest.mark.parametrize('form', ['none', 'nf4'])
def test_other_architectures(name, targets, form, tmp_path):
    config = LoraConfig(**lora | dict(target_modules=targets), use_dora=True, fan_in_fan_out='gpt2' in name)
    folder = saved(made(config, form, name=name), tmp_path)
    loaded = load_adapter(load_model(name, quantisation=form), folder)
    own = logits_of(loaded, ids)
    assert gap(logits_of(merge_adapter(loaded), ids), own) <= 2e-4 * own.abs().max()


@pytest.mark.parametrize(
    'config, words',
    [
        (peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4), 'PREFIX_TUNING changes the input'),
        (peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4), 'PROMPT_TUNING changes the input'),
        (peft.PromptEncoderConfig(task_type='CAUSAL_LM', num_virtual_tokens=4), 'P_TUNING changes the input'),
        (LoraConfig(**lora, init_lora_weights='pissa_niter_4'), "'pissa_niter_4' has changed the base"),
        (peft.AdaptionPromptConfig(task_type='CAUSAL_LM', adapter_len=3, adapter_layers=1), 'is refused'),
    ],
)
def test_what_cannot_be_seen_is_refused(config, words, tmp_path):
    folder = saved(get_peft_model(load_model('preset:llama-tiny'), config), tmp_path)
    with pytest.raises(LabError, match=words) as caught:
        load_adapter(load_model('preset:llama-tiny'), folder)
    assert '\n' not in str(caught.value)


def edited(folder, change):
    config = json.loads((folder / 'adapter_config.json').read_text())
    (folder / 'adapter_config.json').write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    'damage, words',
    [
        ('missing tensor', 'tensors are missing'),
        ('strange tensor', 'that preset:llama-tiny lacks'),
        ('other width', 'does not fit'),
        ('pickled', 'adapter_model.safetensors'),
        ('unknown kind', 'cannot be read'),
        ('invocation', 'words of the prompt'),
        ('no such module', 'does not fit'),
        ('cut', 'does not fit'),
    ],
)
def test_a_damaged_or_foreign_adapter_is_named(damage, words, tmp_path):
    folder = saved(made(kinds()['LoRA']), tmp_path)
    file = folder / 'adapter_model.safetensors'
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if damage == 'missing tensor':
        del tensors[first]
    if damage == 'strange tensor':
        tensors[first.replace('layers.0', 'layers.7')] = tensors[first].clone()
    if damage == 'other width':
        tensors[first] = tensors[first][:, :-1].contiguous()
    save_file(tensors, file)
    if damage == 'pickled':
        file.rename(folder / 'adapter_model.bin')
    if damage == 'cut':
        file.write_bytes(file.read_bytes()[:-20])
    changes = {
        'unknown kind': dict(peft_type='NOTHING'),
        'invocation': dict(alora_invocation_tokens=[5]),
        'no such module': dict(target_modules=['nothing']),
    }
    edited(folder, changes.get(damage, {}))
    with pytest.raises(LabError, match=words) as caught:
        load_adapter(load_model('preset:llama-tiny'), folder)
    assert '\n' not in str(caught.value)


def test_a_merge_that_changes_logits_is_refused(monkeypatch):
    from peft.tuners.lora import layer

    honest = layer.Linear.get_delta_weight
    monkeypatch.setattr(layer.Linear, 'get_delta_weight', lambda self, name: honest(self, name) / 2)
    model = made(kinds()['LoRA'])
    for parameter in model.parameters():
        parameter.data.mul_(1.5 if parameter.requires_grad else 1)
    with pytest.raises(LabError, match='logits differ by .* cannot be merged'):
        merge_adapter(model)


def test_two_adapters_are_not_merged_as_one():
    model = made(kinds()['LoRA'])
    model.add_adapter('second', LoraConfig(**lora))
    with pytest.raises(LabError, match='2 adapters'):
        merge_in_place(copy.deepcopy(model))


def test_asking_for_logits_leaves_every_module_in_its_mode():
    model = load_model('preset:llama-tiny').train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    logits_of(model, ids)
    assert [module.training for module in model.modules()] == modes
