"""A vocabulary filled up to a multiple of 64 rows, which no loss, prediction, bound or export knows of."""

from types import SimpleNamespace

import pytest
import torch
import training_runs
from transformers import AutoModelForCausalLM

from llmft.bench.bounds import bench_model
from llmft.bounds.certificates import build_model, model_facts
from llmft.core import LabError
from llmft.inference.generation import generate
from llmft.models import load
from llmft.models.load import presets
from llmft.models.low_rank import frozen_gpt2
from llmft.models.padding import PaddedHead, drop_padding, pad_vocabulary, padded_rows
from llmft.studies.finetuning.setup import pretraining_model
from llmft.training.fit import fit
from llmft.training.losses import head_cross_entropy, linear_cross_entropy, token_losses
from llmft.training.step import check_examples

words = 500
foreign = ('gpt2', 'gpt2-medium', 'gpt2-large')  # models that exist have the rows they have


@pytest.fixture
def odd_preset(monkeypatch):
    "A preset whose vocabulary is no multiple of 64."
    monkeypatch.setitem(presets, 'odd', presets['llama-tiny'] | dict(vocab_size=words))
    monkeypatch.setitem(presets, 'odd-gpt2', presets['gpt2-tiny'] | dict(vocab_size=words))


def made(name='odd'):
    "A model as `pretrain` makes it."
    return pretraining_model(SimpleNamespace(model=f'preset:{name}', seed=3), SimpleNamespace(eos_token_id=0))


def rows_of(model):
    "Rows of embedding and head."
    return len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight)


def test_every_model_that_is_made_here_has_a_multiple_of_64_rows(odd_preset):
    for model in (made(), made('odd-gpt2'), frozen_gpt2(1, 2, 16, 32, words), bench_model(1, 16, words)):
        assert rows_of(model) == (512, 512) and model.config.vocab_size == words
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert not model.get_output_embeddings().weight[words:].any()
    own = {name: preset.get('vocab_size', 50257) for name, preset in presets.items() if not name.startswith('odd')}
    assert {name for name, size in own.items() if size % 64} == set(foreign) and len(own) > 15
    assert [padded_rows(size) for size in (50257, 4096)] == [50304, 4096]


def test_a_matrix_that_is_full_and_the_shipped_base_are_left_alone():
    assert type(pad_vocabulary(load.load_model('preset:llama-tiny')).lm_head) is torch.nn.Linear
    assert type(load.load_model('base').get_output_embeddings()) is torch.nn.Linear


def both(name='odd'):
    "The same model without padding and with it."
    return drop_padding(made(name)).eval(), made(name).eval()


def loss_and_slope(model, ids_N, head):
    "The summed loss of predicting each token from the one before, and the gradient of the embedding."
    model.zero_grad()
    hidden_BTD = load.hidden_states(model, ids_N[None].to(model.device))
    loss, count = head_cross_entropy(hidden_BTD[0, :-1], head, ids_N[1:].to(model.device))
    loss.backward()
    return loss.detach(), count, model.get_input_embeddings().weight.grad[:words].clone()


@pytest.mark.parametrize('name', ['odd', 'odd-gpt2'])
def test_loss_and_gradient_are_those_without_padding(odd_preset, name):
    ids_N = torch.randint(words, (70,), generator=torch.Generator().manual_seed(0))
    found = [loss_and_slope(model, ids_N, model.get_output_embeddings()) for model in both(name)]
    for ours, theirs in zip(*found, strict=True):
        tolerance = 1e-6 if torch.cuda.is_available() else 0  # a GPU multiplies by more rows
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=tolerance, atol=tolerance)


def test_all_rows_are_multiplied_and_none_but_the_words_counted():
    "What a GPU does: the padding is made to weigh, and changes nothing."
    head = torch.nn.Linear(8, words, bias=False)
    matrix_RD = torch.cat([head.weight.detach(), 9 + torch.randn(12, 8)]).requires_grad_()
    hidden_ND = torch.randn(40, 8).abs().requires_grad_()
    targets_N = torch.randint(words, (40,))
    expected, _ = linear_cross_entropy(hidden_ND, head.weight, targets_N, chunk_bytes=9000)
    slopes = torch.autograd.grad(expected, [hidden_ND, head.weight])
    loss, count = linear_cross_entropy(hidden_ND, matrix_RD, targets_N, chunk_bytes=9000, words=words)
    ours = torch.autograd.grad(loss, [hidden_ND, matrix_RD])
    assert count == 40 and torch.allclose(loss, expected) and torch.allclose(ours[0], slopes[0], atol=1e-6)
    assert torch.allclose(ours[1][:words], slopes[1], atol=1e-6) and not ours[1][words:].any()
    assert linear_cross_entropy(hidden_ND, matrix_RD, targets_N)[0] > 2 * expected  # the padding would weigh


def test_padding_is_never_predicted_and_no_token_of_data(odd_preset):
    plain, padded = both()
    prompts = [[5, 6, 7], [8, 9]]
    assert generate(padded, prompts, 12).ids == generate(plain, prompts, 12).ids
    table = padded.get_output_embeddings().weight
    table.data[words:] = 9.0  # were they counted, they would win or lose against all others
    hidden_ND = torch.randn(9, 64, device=table.device)
    assert padded.get_output_embeddings()(hidden_ND).shape == (9, words)
    targets_N = torch.arange(9, device=table.device)
    losses = [token_losses(hidden_ND, model.get_output_embeddings(), targets_N) for model in (plain, padded)]
    torch.testing.assert_close(*losses)

    beyond = training_runs.examples(2)
    beyond.ids[:] = words
    with pytest.raises(LabError, match=f'a token {words} and the model knows 0 to {words - 1}'):
        check_examples(padded, beyond)


def test_training_is_that_without_padding_and_so_is_what_leaves(odd_preset, tmp_path):
    train = training_runs.examples(16)
    train.ids[:] %= words
    models = both()
    logs = [fit(model, train, None, tmp_path / str(i), training_runs.recipe(max_steps=4)).log
            for i, model in enumerate(models)]  # fmt: skip
    losses = [[entry['loss'] for entry in log if 'loss' in entry] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and losses[0][-1] < losses[0][0]
    assert not models[1].get_output_embeddings().weight[words:].any()

    drop_padding(models[1]).save_pretrained(tmp_path / 'model')
    again = AutoModelForCausalLM.from_pretrained(tmp_path / 'model')
    assert rows_of(again) == (words, words)
    torch.testing.assert_close(again.lm_head.weight, models[0].lm_head.weight.cpu(), rtol=0, atol=1e-6)


spec = dict(
    base=dict(model='random', layers=1, heads=2, width=16, block=65, vocabulary=words, seed=1, scale=0.1),
    lora=dict(targets=['q_proj', 'lm_head'], rank=2, alpha=8.0, dropout=0.0, seed=1),
    subspace=dict(dimension=40, mode='uniform', ratio=0.5, projection='sparse', seed=1, gate_bits=4, temperature=1.0,
                  final_temperature=0.1, anneal_steps=10),
)  # fmt: skip


def test_a_certificate_made_before_there_was_padding_holds(monkeypatch):
    "The hash of the fixed weights, the factors and their start are those of a model without padding."
    model, subspace = build_model(spec)
    assert isinstance(model.get_output_embeddings().layer, PaddedHead)
    facts = model_facts(model, subspace)
    monkeypatch.setattr('llmft.models.low_rank.pad_vocabulary', lambda model: model)
    plain, plain_subspace = build_model(spec)
    assert type(plain.get_output_embeddings().layer) is torch.nn.Linear
    assert model_facts(plain, plain_subspace) == facts
