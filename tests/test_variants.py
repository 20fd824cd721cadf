"""rsLoRA, DoRA and PiSSA: counted, saved in PEFT's plain form, merged, exported, decoded and resumed like any adapter, or refused."""

import itertools
from dataclasses import replace

import pytest
import torch
from architectures import configuration
from peft import PeftConfig, PeftModel
from training_runs import examples, recipe
from transformers import AutoModelForCausalLM

from llmft.core import LabError
from llmft.inference.decoder import _merged_map as merged_map
from llmft.inference.decoder import linear_map
from llmft.inference.generation import generate
from llmft.models.adapters import (
    add_lora,
    check_adapter,
    save_adapter,
    save_and_check,
    trainable_parameters,
    weights_hash,
)
from llmft.models.cost import lora_parameter_count
from llmft.models.export import export_model
from llmft.models.load import load_model
from llmft.models.merging import merge_adapter
from llmft.models.methods import Method, starts
from llmft.runs.plan import count_parameters, settings_of
from llmft.runs.run import check_model_params
from llmft.training.fit import fit
from llmft.training.launch import built_facts, check_built, training_settings

plain = Method('lora', 4, 8.0, 0.0, ('q_proj', 'down_proj'))
variants = {
    'rslora': replace(plain, rslora=True),
    'dora': replace(plain, dora=True),
    'pissa': replace(plain, start='pissa'),
    'all three': replace(plain, rslora=True, dora=True, start='pissa'),
}
each_variant = pytest.mark.parametrize('variant', variants)
ids = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def moved(model):
    "`model` with factors and lengths that are not those it began with, as after training."
    for number, parameter in enumerate(trainable_parameters(model).values()):
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.data.add_((0.05 * drawn).to(parameter.device))
    return model.eval()


def trained(method, shape='llama-tiny'):
    return moved(method.apply(method.load(f'preset:{shape}'), seed=0))


def for_gpt2(method):
    return replace(method, targets=('c_attn', 'mlp.c_proj'))


@each_variant
@pytest.mark.parametrize('shape', ['llama-tiny', 'gpt2-tiny'])
def test_a_new_variant_leaves_the_logits_as_they_were(variant, shape):
    method = for_gpt2(variants[variant]) if shape == 'gpt2-tiny' else variants[variant]
    base = load_model(f'preset:{shape}')
    before = logits(base)
    model = method.check().apply(base, seed=0)
    assert (logits(model) - before).abs().max() < 1e-5
    assert replace(Method.of(model), targets=method.targets) == method


def test_the_scale_is_that_of_the_paper():
    for rank, rslora, scale in ((4, False, 2.0), (4, True, 4.0), (16, True, 2.0)):
        model = add_lora(load_model('preset:llama-tiny'), rank, 8.0, 0.0, ['q_proj'], 0, rslora=rslora)
        assert model.get_base_model().model.layers[0].self_attn.q_proj.scaling['default'] == scale


def test_pissa_begins_with_the_largest_singular_parts():
    weight = load_model('preset:llama-tiny').model.layers[0].self_attn.q_proj.weight.detach()
    layer = add_lora(load_model('preset:llama-tiny'), 4, 8.0, 0.0, ['q_proj'], 0, start='pissa')
    layer = layer.get_base_model().model.layers[0].self_attn.q_proj
    taken = layer.scaling['default'] * layer.lora_B['default'].weight @ layer.lora_A['default'].weight
    assert torch.allclose(torch.linalg.svdvals(taken)[:4], torch.linalg.svdvals(weight)[:4], rtol=1e-4)
    assert torch.allclose(taken + layer.base_layer.weight, weight, atol=1e-6)


@each_variant
@pytest.mark.parametrize('shape', ['llama-tiny', 'gpt2-tiny'])
def test_a_saved_variant_is_the_model_on_a_base_that_nobody_changed(variant, shape, tmp_path):
    method = for_gpt2(variants[variant]) if shape == 'gpt2-tiny' else variants[variant]
    model = trained(method, shape)
    folder = save_adapter(model, tmp_path / 'adapter')
    assert check_adapter(model, folder, lambda: load_model(f'preset:{shape}'), ids) < 1e-4

    base = load_model(f'preset:{shape}')
    weights = weights_hash(dict(base.named_parameters()))
    theirs = PeftModel.from_pretrained(base, folder)
    held = {name.replace('.base_layer', '').removeprefix('base_model.model.'): p for name, p in theirs.named_parameters()}
    kept = {name: p for name, p in held.items() if 'lora_' not in name}
    assert weights_hash(kept) == weights, 'reading the adapter changed the base'
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    assert (logits(model) - logits(load_model(f'preset:{shape}'))).abs().max() > 0.01, 'the adapter does nothing'
    assert PeftConfig.from_pretrained(folder).r == 4 * (1 + (method.start == 'pissa'))


def test_pissa_saved_as_it_is_would_be_another_model(tmp_path):
    "What the conversion is for: the trained factors alone, on the base, give other logits."
    model = trained(variants['pissa'])
    first = model.first_factors
    del model.first_factors
    folder = save_adapter(model, tmp_path / 'adapter')
    config = PeftConfig.from_pretrained(folder)
    config.init_lora_weights = True
    config.save_pretrained(folder)
    model.first_factors = first
    wrong = PeftModel.from_pretrained(load_model('preset:llama-tiny'), folder)
    assert (logits(wrong) - logits(model)).abs().max() > 0.01


@each_variant
def test_merging_gives_the_same_logits_and_changes_nothing(variant, tmp_path):
    model = trained(variants[variant])
    before = logits(model)
    merged = merge_adapter(model)
    assert (logits(merged) - before).abs().max() < 1e-4 and torch.equal(logits(model), before)
    assert not any('lora' in name for name, _ in merged.named_modules())


def test_dora_over_four_bits_is_saved_and_merged(tmp_path):
    method = replace(variants['dora'], kind='qlora', quantisation='nf4', rslora=True)
    model = trained(method)
    assert Method.of(model) == replace(method, targets=tuple(sorted(method.targets)))
    folder = save_adapter(model, tmp_path / 'adapter')
    assert check_adapter(model, folder, lambda: method.load('preset:llama-tiny'), ids) == 0
    assert (logits(merge_adapter(model)) - logits(model)).abs().max() < 1e-4


@each_variant
def test_a_folder_of_a_run_is_exported_as_the_run(variant, tmp_path):
    method = variants[variant]
    model = moved(method.apply(method.load('base'), seed=0))
    from llmft.data.tokens import load_tokenizer

    save_and_check(model, tmp_path, lambda: load_model('base'), ids, tokenizer=load_tokenizer('base'), merge=True)
    expected = logits(model)
    assert (logits(load_model(str(tmp_path / 'merged'))) - expected).abs().max() < 1e-3
    assert (logits(load_model(str(tmp_path / 'adapter'))) - expected).abs().max() < 1e-3
    made = export_model(str(tmp_path / 'adapter'), 'gguf', 'f32', tmp_path / 'out')
    assert made['difference'] < 1e-3
    (file,) = (tmp_path / 'out').glob('*.gguf')
    assert (logits(load_model(str(file))) - expected).abs().max() < 2e-3 * expected.abs().max()


@each_variant
def test_a_stopped_run_goes_on_with_the_same_bits(variant, tmp_path):
    def run(folder, **settings):
        method = replace(variants[variant], dropout=0.1)
        model = method.apply(method.load('preset:llama-tiny'), seed=1)
        result = fit(model, examples(), None, folder, recipe(learning_rate=1e-3, **settings))
        return model, result

    model, whole = run(tmp_path / 'whole', max_steps=14)

    class Stop(Exception):
        pass

    def stop(entry):
        if entry['step'] == 9 and 'loss' in entry:
            raise Stop

    method = replace(variants[variant], dropout=0.1)
    with pytest.raises(Stop):
        fit(
            method.apply(method.load('preset:llama-tiny'), seed=1),
            examples(),
            None,
            tmp_path / 'cut',
            recipe(learning_rate=1e-3, max_steps=14),
            on_log=stop,
        )
    again, resumed = run(tmp_path / 'cut', max_steps=14)
    assert weights_hash(trainable_parameters(again)) == weights_hash(trainable_parameters(model))
    assert torch.equal(logits(again), logits(model))
    assert check_adapter(again, save_adapter(again, tmp_path / 'adapter'), lambda: load_model('preset:llama-tiny'), ids) < 1e-4


@each_variant
@pytest.mark.parametrize('targets', [('q_proj',), ('all-linear',)])
def test_trained_numbers_are_counted_exactly(variant, targets):
    method = replace(variants[variant], targets=targets)
    model = method.apply(method.load('preset:llama-tiny'), seed=0)
    trained_numbers = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    assert lora_parameter_count(model.config, 4, targets, method.dora) == trained_numbers
    assert count_parameters(model.config, method)['trainable'] == trained_numbers


def test_lengths_are_counted_for_an_architecture_without_formulas():
    config = configuration('gemma')
    with torch.device('meta'):
        model = add_lora(AutoModelForCausalLM.from_config(config), 4, 8.0, 0.0, ['q_proj', 'down_proj'], 0, dora=True)
    counted = count_parameters(config, variants['dora'])['trainable']
    assert counted == sum(parameter.numel() for parameter in trainable_parameters(model).values())


@each_variant
@pytest.mark.parametrize('shape', ['llama-tiny', 'qwen2-tiny'])
def test_the_decoder_multiplies_as_peft_does(variant, shape):
    model = trained(variants[variant], shape)
    layers = [module for module in model.modules() if hasattr(module, 'lora_A')]
    assert len(layers) == 4
    for layer in layers:
        inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        product = linear_map(layer)
        assert product is not layer, 'left to PEFT'
        with torch.no_grad():
            assert torch.allclose(product(inputs), layer(inputs), atol=1e-5)


def given(**changes):
    return dict(method='lora', lora_rank=4, lora_alpha=8.0, lora_targets=['q_proj'], precision='fp32') | changes


def test_what_cannot_be_is_refused_before_anything_is_loaded():
    on_quantised = given(method='qlora', quantisation='nf4', lora_init='pissa')
    for refuse in (settings_of, check_model_params, lambda params: Method.from_params(Params(params)).check()):
        with pytest.raises(LabError, match='held in nf4: choose method lora') as caught:
            refuse(on_quantised)
        assert '\n' not in str(caught.value)
    with pytest.raises(LabError, match='choose quantisation nf4, or dora false'):
        settings_of(given(method='qlora', quantisation='int8', dora=True))
    with pytest.raises(LabError, match="did you mean 'pissa'"):
        settings_of(given(lora_init='pisa'))


class Params:
    def __init__(self, values):
        self.__dict__ |= values


@pytest.mark.parametrize(
    'changes, strategy, words',
    [
        (dict(lora_init='pissa'), 'ddp', 'choose strategy none'),
        (dict(dora=True), 'fsdp2', 'choose ddp or zero2'),
        (dict(dora=True), 'zero3', 'choose ddp or zero2'),
    ],
)
def test_processes_that_would_train_something_else_are_refused(changes, strategy, words):
    shared = dict(nproc=2, strategy=strategy, batch_size=4, gradient_accumulation=1, learning_rate=1e-3)
    training_settings(Params(given(**shared)))
    with pytest.raises(LabError, match=words):
        training_settings(Params(given(**shared, **changes)))


def test_pissa_on_quantised_weights_or_embeddings_is_refused_where_it_arises():
    with pytest.raises(LabError, match='held in 4 or 8 bits'):
        add_lora(load_model('preset:llama-tiny', quantisation='nf4'), 4, 8, 0.0, ['q_proj'], 0, start='pissa')
    with pytest.raises(LabError, match='name an embedding'):
        add_lora(load_model('preset:gpt2-tiny'), 4, 8, 0.0, ['wpe'], 0, start='pissa')


def test_every_start_is_tried_here():
    assert set(starts) == {method.start for method in variants.values()} | {plain.start}
    assert len(list(itertools.chain(variants))) == 4


def test_ranks_may_round_the_lengths_of_dora_otherwise_than_the_notebook():
    net = variants['dora'].apply(load_model('base'), seed=0)
    facts = built_facts(net, examples(), None)
    lengths = [tensor for name, tensor in net.named_parameters() if 'lora_magnitude_vector' in name]
    with torch.no_grad():
        lengths[0].mul_(1 + 1e-6)
    check_built(facts, built_facts(net, examples(), None))

    factor = next(tensor for name, tensor in net.named_parameters() if 'lora_A' in name)
    with torch.no_grad():
        factor.add_(1)
    with pytest.raises(LabError, match='built other trained weights'):
        check_built(facts, built_facts(net, examples(), None))


def adapted_layers(net):
    return [module for module in net.modules() if hasattr(module, 'lora_A')]


@each_variant
def test_adapters_merged_for_decoding_multiply_as_the_adapters_do(variant):
    net = trained(variants[variant])
    for layer in adapted_layers(net):
        inputs_RI = torch.randn(3, layer.in_features)
        with torch.no_grad():
            expected_RO, joined_RO = layer(inputs_RI), merged_map([layer])(inputs_RI)
        assert (joined_RO - expected_RO).abs().max() < 1e-5


@pytest.mark.parametrize('shape', ['llama-tiny', 'qwen2-tiny'])
def test_dora_over_16_bits_is_decoded_in_16_bits(shape):
    net = trained(replace(variants['dora'], targets=('q_proj', 'k_proj', 'down_proj'), precision='bf16'), shape)
    for layer in adapted_layers(net):
        inputs_RI = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            expected_RO, made_RO = layer(inputs_RI), linear_map(layer)(inputs_RI)
        assert made_RO.dtype == torch.bfloat16
        assert (made_RO - expected_RO).abs().max() <= 0.02 * expected_RO.abs().max()
    assert generate(net, [[5, 6, 7]], 4).new_tokens == 4
