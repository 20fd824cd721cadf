"Many architectures: rows of any layout are read as each document alone, or refused with advice that works."

import re

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, attentions_that_keep_apart, shapes, tiny_model
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from llmft.core import LabError
from llmft.data.batches import evaluation_batches
from llmft.data.tokens import Examples
from llmft.inference.generation import generate
from llmft.models.adapters import add_lora
from llmft.models.load import load_model
from llmft.training.fit import fit
from llmft.training.recipe import Recipe
from llmft.training.step import LossModel, evaluate_loss

each_architecture = pytest.mark.parametrize('name', shapes)


def documents():
    "Five documents of random tokens, one as short as a document can be and two of a length."
    lengths = np.array([12, 8, 20, 2, 8])
    ends = np.cumsum(lengths)
    return Examples(np.random.default_rng(0).integers(2, VOCABULARY, ends[-1]).astype(np.uint16), ends - lengths, ends)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The folder of the tiny model of a name, made once."
    made = {}

    def of(name):
        if name not in made:
            made.clear()
            made[name] = str(tmp_path_factory.mktemp(name))
            tiny_model(name).save_pretrained(made[name])
        return made[name]

    return of


def taken(folder, *attentions):
    "The model in a folder under the first of `attentions` that it takes."
    for attention in attentions[:-1]:
        try:
            return load_model(folder, attention=attention)
        except LabError as error:
            assert 'use attention=' in str(error)
    return load_model(folder, attention=attentions[-1])


def gradient_of(model):
    "The gradients of all parameters as one vector; the model forgets them."
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def alone(model, examples):
    "Summed loss, and its gradient, of each document in the model's own forward pass."
    total = 0.0
    for row in range(len(examples)):
        ids_T = torch.from_numpy(examples[row].astype(np.int64))
        logits_TV = model(input_ids=ids_T[None, :-1], use_cache=False).logits[0]
        loss = cross_entropy(logits_TV, ids_T[1:], reduction='sum')
        loss.backward()
        total += float(loss.detach())
    return total, gradient_of(model)


def laid_out(model, examples, layout):
    "The same of rows in a layout."
    total = 0.0
    for batch in evaluation_batches(examples, 2, 20, layout):
        loss = LossModel(model)(batch)
        loss.backward()
        total += float(loss.detach())
    return total, gradient_of(model)


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert (one[1] - other[1]).abs().max() < 1e-4 * other[1].abs().max()


@each_architecture
def test_rows_are_read_as_documents_alone_or_refused(name, folder):
    kept = []
    for attention in ('documents', 'sdpa', 'eager'):
        try:
            model = load_model(folder(name), attention=attention).eval()
        except LabError as error:
            assert re.search('use attention=', str(error))
            continue

        expected = alone(model, documents())
        for layout in ('bucketed', 'padded'):
            assert_same(laid_out(model, documents(), layout), expected)
        try:
            assert_same(laid_out(model, documents(), 'packed'), expected)
            kept.append(attention)
        except LabError as error:
            assert re.search(r'use (layout=bucketed|attention=sdpa)$', str(error))
    assert kept == attentions_that_keep_apart(name)


@each_architecture
def test_following_the_advice_trains(name, folder, tmp_path):
    settings = dict(attention='documents', layout='packed')
    for _ in range(4):
        recipe = Recipe(max_length=20, batch_size=5, max_steps=1, layout=settings['layout'], gradient_checkpointing=False)
        try:
            model = load_model(folder(name), attention=settings['attention'])
            result = fit(model, documents(), documents(), tmp_path, recipe)
            break
        except LabError as error:
            key, value = re.search(r'use (attention|layout)=(\w+)$', str(error)).groups()
            assert settings[key] != value
            settings[key] = value
    assert result.progress.step == 1
    scores = [evaluate_loss(model, documents(), 2, 20, layout)['loss'] for layout in ('bucketed', settings['layout'])]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@each_architecture
def test_generation_is_that_of_the_model(name, folder):
    model = taken(folder(name), 'sdpa', 'eager').eval()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    theirs = [model.generate(torch.tensor([row]), greedy)[0, len(row):].tolist() for row in prompts]
    assert generate(model, prompts, 6).ids == theirs
    assert [generate(model, [row], 6).ids[0] for row in prompts] == theirs


@pytest.mark.parametrize('name', ['mamba', 'gpt2', 'llama'])
def test_modules_that_a_wrong_target_is_offered_can_be_adapted(name, folder):
    with pytest.raises(LabError, match='no module is called') as refused:
        add_lora(taken(folder(name), 'sdpa', 'eager'), 2, 4, 0.0, ['nothing'], seed=0)
    offered = str(refused.value).split('or some of ')[1].split(', ')
    for targets in (offered, ['all-linear']):
        add_lora(taken(folder(name), 'sdpa', 'eager'), 2, 4, 0.0, targets, seed=0)
