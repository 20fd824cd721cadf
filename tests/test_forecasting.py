"""The account of operations under kills and crowds, the grammar, the sweeps and the figures of the study."""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from llmft.core import LabError
from llmft.data.tokens import load_tokenizer
from llmft.models.load import load_model, model_config
from llmft.studies.forecasting.codec import decode, probe
from llmft.studies.forecasting.figures import distribution_figure, forecasts_figure
from llmft.studies.forecasting.forecast import Grammar, evaluate_forecasts, forecast
from llmft.studies.forecasting.prepared import check_steps, prepare_series, prompt_ids, read_split, series_documents
from llmft.training.ledger import Account, Ledger, statement, study_forward, study_step

root = Path(__file__).parent.parent
tiny = model_config('preset:llama-tiny')


def python(text, *arguments, wait=True):
    "Run Python `text` in a process of its own."
    process = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(text), *map(str, arguments)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    if not wait:
        return process
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return out


def here(text, *arguments):
    "Run Python `text` in this process; what it printed."
    out, before = io.StringIO(), sys.argv
    sys.argv = ['-c', *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(textwrap.dedent(text), 'here', 'exec'), {'__name__': '__main__'})
    finally:
        sys.argv = before
    return out.getvalue()


# ---- the rules of the study


def test_published_test_vectors():
    qwen = model_config('preset:qwen2.5-0.5b')
    assert study_forward(qwen, 4, 512, 8, head='reference') == 1_980_352_684_032
    assert study_step(qwen, [512] * 4, 8, head='reference') == 5_941_058_052_096
    for rank, published in {2: 2_861_134_073_856_000, 4: 2_862_190_743_552_000, 8: 2_864_304_082_944_000}.items():
        assert 2000 * study_step(qwen, [128] * 4, rank, head='reference') == published


def test_the_rule_counts_the_head_in_full_and_other_targets_too():
    qwen = model_config('preset:qwen2.5-0.5b')
    positions, width, words = 4 * 128, qwen.hidden_size, qwen.vocab_size
    assert (
        study_forward(qwen, 4, 128) - study_forward(qwen, 4, 128, head='reference')
        == positions * words * (2 * width - 1) - positions * width * words
    )
    extra = study_forward(qwen, 4, 128, 8, ['q_proj', 'v_proj', 'up_proj']) - study_forward(qwen, 4, 128, 8)
    assert extra == qwen.num_hidden_layers * (
        positions * 8 * (2 * width - 1) + positions * qwen.intermediate_size * (2 * 8 - 1)
    )
    with pytest.raises(LabError, match="head is 'half'"):
        study_forward(qwen, 1, 8, head='half')
    with pytest.raises(LabError, match='gated layers'):
        study_forward(model_config('preset:gpt2-tiny'), 1, 8)


# ---- the account

crowd = """
import sys
from llmft.training.ledger import Account
path, name = sys.argv[1:]
account, got = Account(path, budget=1000), 0
for step in range(1, 61):
    if account.reserve(name, step, 7., 1.): account.book(name, step, 7., 1., 3); got += 1
print(got)
"""


def test_several_processes_never_overdraw(tmp_path):
    processes = [python(crowd, tmp_path / 'l.jsonl', f'run {i}', wait=False) for i in range(4)]
    got = sum(int(process.communicate(timeout=120)[0]) for process in processes)
    account = Account(tmp_path / 'l.jsonl', budget=1000)
    assert got == 1000 // 7 and account.left() == 1000 - 7 * got
    lines = [json.loads(line) for line in (tmp_path / 'l.jsonl').read_text().splitlines()]
    assert (
        len({(line['run'], line['step']) for line in lines if line['kind'] == 'booked'})
        == got
        == sum(line['kind'] == 'booked' for line in lines)
    )


def test_booking_twice_counts_once_and_a_half_line_is_cut(tmp_path):
    account = Account(tmp_path / 'l.jsonl', budget=100)
    for _ in range(3):
        assert account.reserve('a', 1, 40.0, 1.0)
        account.book('a', 1, 40.0, 1.0, 5)
    full = Account(account.path, budget=40)
    assert full.reserve('a', 1, 40.0, 1.0) and not full.reserve('a', 2, 1.0, 1.0), (
        'a step that is there already needs no room'
    )
    whole = account.path.read_bytes()
    for cut in range(1, 30, 7):
        account.path.write_bytes(whole + b'{"run": "b", "kind": "booked", "what": "train"'[:cut])
        again = Account(account.path, budget=100)
        assert again.left() == 60 and again.path.read_bytes() == whole
    assert (
        again.reserve('b', 1, 60.0, 1.0)
        and not again.reserve('b', 2, 1.0, 1.0)
        and not account.reserve('c', 1, 1.0, 1.0)
    )
    account.path.write_bytes(whole[:-20])
    with pytest.raises(LabError, match='became shorter'):
        account.left()


def test_a_run_that_begins_anew_leaves_the_sum_and_one_that_goes_on_does_not(tmp_path):
    account = Account(tmp_path / 'l.jsonl', budget=100)
    first = Ledger(account, 'a', 'x', tiny)
    account.book('a', 1, 30.0, 1.0)
    Ledger(Account(account.path), 'a', 'x', tiny)
    assert account.left() == 70
    Ledger(Account(account.path), 'a', 'y', tiny)
    assert account.left() == 100 and account.aside == {'a': 30.0}
    assert first.steps_left([8]) == int(100 // study_step(tiny, [8])) == 0


run_of_three = """
import os, signal, sys
import numpy as np
from llmft.models.adapters import add_lora
from llmft.training.ledger import Account, Ledger
from llmft.models.load import load_model
from llmft.training.recipe import Recipe
from llmft.data.tokens import Examples
from llmft.training.fit import fit
folder, die_at, budget, name = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
ids = np.random.default_rng(0).integers(0, 500, 600).astype(np.uint16)
cuts = np.cumsum([0, *([24, 16, 20]*10)])
train = Examples(ids, cuts[:-1], cuts[1:])
model = add_lora(load_model('preset:llama-tiny'), 2, 4, 0., ['q_proj', 'v_proj'], 0)
ledger = Ledger(Account(f'{folder}/ledger.jsonl', budget), name, 'same', model.config, 2)
class Deadly:
    def allows(self, flops, step, lengths):
        if step == die_at: ledger.allows(flops, step, lengths); os.kill(os.getpid(), signal.SIGKILL)
        return ledger.allows(flops, step, lengths)
    def book(self, *what): ledger.book(*what)
result = fit(model, train, train.select(np.arange(4)), f'{folder}/{name}', Recipe(max_steps=9, batch_size=3, max_length=32, save_every=4, eval_every=100, learning_rate=1e-3), ledger=Deadly())
print(result.progress.stopped, result.progress.step, repr(result.progress.flops), result.log[-1].get('valid_loss') is not None)
"""


def lines_of(path):
    return sorted(
        (line['run'], line['step'], line['study'], line['hardware'], line['tokens'])
        for line in map(json.loads, path.read_text().splitlines())
        if line['kind'] == 'booked'
    )


def test_the_account_is_exact_after_kill_and_resume(tmp_path):
    for name in ('calm', 'killed'):
        (tmp_path / name).mkdir()
    calm = here(run_of_three, tmp_path / 'calm', 0, 0, 'run')
    process = python(run_of_three, tmp_path / 'killed', 7, 0, 'run', wait=False)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    early = statement(Account(tmp_path / 'killed/ledger.jsonl'))[0]
    assert (early['steps'], early['open']) == (7, 1)
    again = here(run_of_three, tmp_path / 'killed', 0, 0, 'run')
    assert 'resumed at step 4' in again and again.splitlines()[-1] == calm.splitlines()[-1]
    assert lines_of(tmp_path / 'killed/ledger.jsonl') == lines_of(tmp_path / 'calm/ledger.jsonl')
    row, whole = statement(Account(tmp_path / 'killed/ledger.jsonl'))
    assert (row['steps'], row['open']) == (9, 0) and whole['hardware'] == pytest.approx(float(calm.split()[-2]))
    # the same run with a budget that ends inside it stops at that step, evaluates and says so
    studies = [line[2] for line in lines_of(tmp_path / 'calm/ledger.jsonl')]
    bound = here(run_of_three, tmp_path, 0, sum(studies[:5]) + studies[5] / 2, 'bound').split('\n')[-2].split()
    assert bound[:3] == ['FLOP', 'budget', '5'] and bound[-1] == 'True'


def test_a_budget_smaller_than_one_step_is_one_clear_line(tmp_path):
    ledger = Ledger(Account(tmp_path / 'l.jsonl', budget=10.0), 'a', 'x', tiny)
    with pytest.raises(LabError, match='one step takes') as error:
        ledger.allows(1.0, 1, [16, 16])
    assert '\n' not in str(error.value)
    with pytest.raises(LabError, match='max_flops is -1'):
        Account(tmp_path / 'm.jsonl', -1)


# ---- the grammar


class Families:
    "Tokenizers of test_series, made once."

    def __getattr__(self, name):
        import importlib.util

        spec = importlib.util.spec_from_file_location('test_series', root / 'tests/test_series.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.families[name]()


@pytest.mark.parametrize('family', ['base', 'qwen2', 'llama3', 'gpt2'])
@pytest.mark.parametrize('precision, steps', [(2, 3), (3, 1)])
def test_every_walk_through_the_grammar_can_be_read(family, precision, steps):
    tokenizer = load_tokenizer('base') if family == 'base' else getattr(Families(), family)
    way = probe(tokenizer, precision)
    grammar = Grammar(way, len(tokenizer), tokenizer.eos_token_id, steps, precision=precision)
    generator, rows = torch.Generator().manual_seed(1), 64
    new_BN, done_B = torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    for step in range(200):
        mask_BV = grammar(step, new_BN)
        assert mask_BV.any(1).all()
        ids_B = torch.multinomial(mask_BV.float(), 1, generator=generator)[:, 0]
        new_BN = torch.cat([new_BN, torch.where(done_B, tokenizer.pad_token_id, ids_B)[:, None]], 1)
        done_B |= ids_B == tokenizer.eos_token_id
        if done_B.all():
            break
    assert done_B.all()
    texts = [way.read(tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])) for row in new_BN.tolist()]
    assert decode(texts, steps, precision=precision).success_rate == 1
    assert all(
        len(text.split(';')) == steps and re.fullmatch(rf'((0|[1-9]\d?)\.\d{{{precision}}}[,;]?)+', text)
        for text in texts
    )
    assert len({len(text) for text in texts}) > 1, 'all numbers have the same length: the walk does not branch'


# ---- forecasts


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('series')
    prepare_series(folder, simulate_count=40, steps=30, context=20, seed=2)
    return folder


def test_forecasts_use_the_given_steps_alone(prepared):
    model, tokenizer, part = load_model('base'), load_tokenizer('base'), read_split(prepared, 'test')
    cut = [';'.join(text.split(';')[:12] + ['99.99,99.99'] * 18) for text in part.texts[:2]]
    assert (
        forecast(model, tokenizer, part.texts[:2], 12, 2, samples=2).texts
        == forecast(model, tokenizer, cut, 12, 2, samples=2).texts
    )


def test_what_does_not_fit_is_refused(prepared):
    model, tokenizer, part = load_model('base'), load_tokenizer('base'), read_split(prepared, 'test')
    with pytest.raises(LabError, match='more than the 30 of a trajectory'):
        evaluate_forecasts(model, tokenizer, part, 25, 6)
    with pytest.raises(LabError, match='give fewer'):
        forecast(model, tokenizer, part.texts, 31, 1)
    with pytest.raises(LabError, match='positions of this model'):
        forecast(model, tokenizer, [';'.join(['12.34,12.34'] * 300)], 200, 1)
    with pytest.raises(LabError, match='0 steps to forecast'):
        forecast(model, tokenizer, part.texts, 10, 0)


def test_the_grammar_must_be_able_to_write_the_numbers(prepared):
    model, tokenizer, part = load_model('base'), load_tokenizer('base'), read_split(prepared, 'test')
    part.scaled_NTV[1, 22, 0] = 123.4
    with pytest.raises(LabError, match='reach 123.4, which 2 integer digits cannot write: set integer_digits to 3'):
        evaluate_forecasts(model, tokenizer, part, 20, 4, 2)
    for settings in (dict(integer_digits=3), dict(trajectories=1), dict(constrained=False)):
        evaluate_forecasts(model, tokenizer, part, 20, 4, **dict(trajectories=2, samples=1) | settings)
    evaluate_forecasts(model, tokenizer, part, 20, 2, trajectories=2, samples=1)  # the number lies behind


@pytest.mark.parametrize('scaling, window, refused', [('context', 0, True), ('global', 0, False), ('global', 12, True)])
def test_fewer_given_steps_than_the_data_know_are_refused(prepared, scaling, window, refused):
    part = read_split(prepared, 'test')
    part.metadata = part.metadata | dict(scaling=scaling, window=window)
    check_steps(part, 20, 'here')
    with pytest.raises(LabError, match='given is 19 and here was prepared with 20') if refused else contextlib.nullcontext():
        check_steps(part, 19, 'here')


def test_free_forecasts_are_counted_as_they_are(prepared, monkeypatch):
    "What a model writes goes to the strict decoder untouched."
    import llmft.studies.forecasting.forecast as forecasting
    from llmft.inference.generation import Generated

    tokenizer, part = load_tokenizer('base'), read_split(prepared, 'test')
    written = ['1.00,2.00;3.00,4.00', '1.00,2.00;oops', '1.00,2.00', '1.00,2.00;3.00,4.0']
    made = Generated(
        [tokenizer(text, add_special_tokens=False)['input_ids'] for text in written], ['stop'] * 4, 10, 10, 1.0, 1.0, []
    )
    monkeypatch.setattr(forecasting, 'generate', lambda *args, **kwargs: made)
    found = forecast(load_model('preset:llama-base'), tokenizer, part.texts[:2], 10, 2, samples=2, constrained=False)
    assert (found.malformed_steps, found.success_rate) == (3, 0.25) and found.texts == [written[:2], written[2:]]
    assert np.isnan(found.samples_NSHV[0, 1, 1]).all() and found.samples_NSHV[0, 1, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize('attention', ['documents', 'eager'])
@pytest.mark.parametrize('temperature', [0.0, 0.9])
def test_the_cut_output_matrix_writes_the_same_numbers(prepared, monkeypatch, temperature, attention):
    "The rows of the grammar's tokens alone give what the whole output matrix gives, in both kinds of decoders."
    import llmft.inference.decoder as decoding
    import llmft.studies.forecasting.forecast as forecasting

    model, tokenizer, part = load_model('base'), load_tokenizer('base'), read_split(prepared, 'test')
    monkeypatch.setattr(decoding, 'is_lean', lambda model: attention == 'documents')
    settings = dict(samples=3, temperature=temperature, seed=4)
    seen, whole_generate = [], forecasting.generate

    def with_all(*arguments, tokens, **others):
        seen.append(tokens)
        return whole_generate(*arguments, **others)

    cut = forecast(model, tokenizer, part.texts[:4], 20, 8, **settings)
    monkeypatch.setattr(forecasting, 'generate', with_all)
    whole = forecast(model, tokenizer, part.texts[:4], 20, 8, **settings)
    assert cut.texts == whole.texts and cut.success_rate == 1
    assert tokenizer.eos_token_id in seen[0] and 10 < len(seen[0]) < model.config.vocab_size / 4


@pytest.mark.parametrize('family', ['qwen2', 'gpt2'])
def test_a_loss_begins_where_the_prompt_ends_in_each_serialisation(prepared, family):
    tokenizer = getattr(Families(), family)
    documents = series_documents(prepared, 'train', tokenizer, loss_from=20)
    prompts = prompt_ids(tokenizer, probe(tokenizer), read_split(prepared, 'train').texts, 20)
    for prompt, start, end in zip(prompts, documents.starts, documents.ends, strict=True):
        assert documents.ids[start : start + len(prompt)].tolist() == prompt
        assert documents.loss[start:end].tolist() == [False] * len(prompt) + [True] * (end - start - len(prompt))


@pytest.mark.parametrize('family', ['qwen2', 'gpt2'])
def test_likelihoods_of_steps_add_up_and_do_not_see_later_ones(family):
    "Also where a token holds several characters, perhaps of two steps."
    from llmft.models.load import causal_model
    from llmft.studies.forecasting.forecast import continuation_nats

    tokenizer = getattr(Families(), family)
    model = load_model('preset:llama-tiny').eval()
    model.resize_token_embeddings(len(tokenizer))
    texts = [';'.join(f'{(7 * i + k) % 30}.{i % 10}5,{k % 9}.25' for k in range(8)) for i in range(3)]
    nats_NH = continuation_nats(model, tokenizer, texts, 4, 4)
    assert nats_NH.shape == (3, 4) and (nats_NH > 0).all()
    assert causal_model(model).config.vocab_size == len(tokenizer)

    way = probe(tokenizer)
    ids_A = torch.tensor(list(way.alphabet))
    for text, nats_H in zip(texts, nats_NH, strict=True):
        [given], [whole] = (prompt_ids(tokenizer, way, [text], steps) for steps in (4, 8))
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits[0, :, ids_A].log_softmax(-1)
        own = [-logs[place - 1, ids_A.tolist().index(whole[place])].item() for place in range(len(given), len(whole) - 1)]
        assert nats_H.sum() == pytest.approx(sum(own), rel=1e-4)
        held, read = 0.0, ''
        for token, nats in zip(whole[len(given):-1], own, strict=True):
            held, read = held + nats * (';' not in read), read + way.alphabet[token]
        assert nats_H[0] == pytest.approx(held, rel=1e-4)


# ---- the study's files


def test_the_sweeps_are_the_studys():
    from llmft.runs.sweep_file import expand

    for scale in ('', 'small'):
        data, search, page = expand(root / 'params/sweeps/forecast_search.yaml', scale)
        assert (len(data), len(search), len(page)) == (2, 18, 1)
        points = {(p.params['learning_rate'], p.params['lora_rank'], p.params['decimals']) for p in search}
        rates = sorted({rate for rate, _, _ in points})
        assert points == set(itertools.product(rates, (2, 4, 8), (2, 3))) and len(rates) == 3
        assert all(f"p{p.params['decimals']}" in p.params['data'] for p in search)
        context, _ = expand(root / 'params/sweeps/forecast_context.yaml', scale)
        assert [p.params['max_length'] for p in context] == [128, 512, 768] and context[0].params['start'] in {
            str(p.folder.relative_to(root)) for p in search
        }
        stages = expand(root / 'params/sweeps/forecast_study.yaml', scale)
        assert [len(stage) for stage in stages] == [2, 2, 18, 3, 1, 1, 1]
        budgets = {p.params['max_flops'] for stage in stages for p in stage if 'max_flops' in p.params}
        assert len(budgets) == 1 and {p.params['ledger'] for stage in stages[1:] for p in stage} == {'study'}
    full = expand(root / 'params/sweeps/forecast_search.yaml')[1]
    assert {p.params['learning_rate'] for p in full} == {1e-5, 5e-5, 1e-4} and all(
        p.params['max_steps'] == 2000 and p.params['eval_every'] == 500 and p.params['lora_alpha'] == 0 for p in full
    )
    assert {p.params['max_flops'] for p in full} == {1e17}


def test_the_names_of_many_forecasts_leave_the_axes_room_for_their_labels():
    errors = {f'forecast {number}': np.geomspace(0.1, 9, 40) for number in range(10)}
    plot = distribution_figure(errors, 'n = 40 trajectories')
    plot.draw_without_rendering()
    label = plot.axes[0].yaxis.label.get_window_extent()
    assert plot.bbox.y0 <= label.y0 and label.y1 <= plot._suptitle.get_window_extent().y0


@pytest.mark.parametrize('shift', [0, -20, 20])
def test_a_figure_of_forecasts_shows_series_of_any_sign(shift):
    times_T = np.arange(20.0)
    truth_NTV = shift + 10 * np.sin(times_T / 3)[None, :, None]
    drawn = forecasts_figure(times_T, truth_NTV, truth_NTV[:, None, 10:], 10, names=['x'])
    low, high = drawn.axes[0].get_ylim()
    assert low < truth_NTV.min() < truth_NTV.max() < high


def test_a_figure_of_forecasts_of_zero_has_room():
    drawn = forecasts_figure(np.arange(20.0), np.zeros((1, 20, 1)), np.zeros((1, 1, 10, 1)), 10, names=['x'])
    low, high = drawn.axes[0].get_ylim()
    assert low < 0 < high
