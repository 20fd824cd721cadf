"Tokens are accounted for, whatever the text, the policy or the layout."

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError, read_json
from llmft.data import hashes, token_files
from llmft.data.batches import IGNORED, Plan, best_fit, evaluation_batches, layouts, micro_batches
from llmft.data.corpora import builtin_part
from llmft.data.token_files import read_token_file
from llmft.data.tokens import (
    Examples,
    TokenWriter,
    cut,
    encode,
    load_tokenizer,
    policies,
    read_side,
    read_tokens,
    side_facts,
    tokenizer_hash,
    train_tokenizer,
)
from llmft.studies.sublora.setup import prepare_run_tokens, run_tokens


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer(builtin_part('topics').texts[:20], 600)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    text = text.encode('utf-8', 'replace').decode()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize('number', [0, 7, 42, 1999, 31415926])
def test_a_number_has_a_token_per_digit(tokenizer, number):
    assert len(tokenizer(str(number), add_special_tokens=False)['input_ids']) == len(str(number))


def test_digits_stay_single_however_often_a_number_was_seen():
    trained = train_tokenizer(['in 1999 and 1999 or 1999, ' * 50] * 20, 400)
    assert len(trained('1999', add_special_tokens=False)['input_ids']) == 4


ragged = st.lists(st.integers(1, 70), min_size=1, max_size=25)


def examples(lengths, mask=False):
    ends = np.cumsum(lengths)
    ids = np.arange(1, ends[-1] + 1).astype(np.uint32)
    return Examples(ids, ends - lengths, ends, (ids % 3 > 0) if mask else None)


@settings(max_examples=60, deadline=None)
@given(ragged, st.integers(1, 40), st.booleans())
def test_splitting_loses_no_target(lengths, length, mask):
    whole = examples(lengths, mask)
    pieces, notes = cut(whole, length)
    targets = np.sort(
        np.concatenate([np.arange(s + 1, e) for s, e in zip(pieces.starts, pieces.ends, strict=True)] or [[]])
    )
    wanted = np.sort(np.concatenate([np.arange(s + 1, e) for s, e in zip(whole.starts, whole.ends, strict=True)]))
    assert notes['targets_lost'] == 0 and notes['targets'] == whole.supervised().sum()
    if not mask:
        assert np.array_equal(targets, wanted)
    assert len(pieces) == 0 or pieces.slots.max() <= length


@settings(max_examples=60, deadline=None)
@given(ragged, st.integers(1, 40), st.sampled_from(['truncate', 'drop']))
def test_what_is_cut_is_counted(lengths, length, policy):
    whole = examples(lengths)
    kept, notes = cut(whole, length, policy)
    assert (
        notes['targets'] + notes['targets_lost'] == whole.supervised().sum()
        and kept.supervised().sum() == notes['targets']
    )
    assert notes['too_long'] == sum(size - 1 > length for size in lengths)


def test_error_policy_refuses_and_unknown_policy_is_named():
    with pytest.raises(LabError, match='max_length is 10'):
        cut(examples([30]), 10, 'error')
    with pytest.raises(LabError, match='choose from split'):
        cut(examples([30]), 10, 'cut')
    assert tuple(policies) == ('split', 'truncate', 'drop', 'error')


@settings(max_examples=60, deadline=None)
@given(ragged, st.integers(1, 5), st.sampled_from(list(layouts)), st.booleans())
def test_layouts_hold_the_same_targets_inside_their_documents(lengths, size, layout, mask):
    whole, _ = cut(examples(lengths, mask), 70)
    if not len(whole):
        return
    batches = micro_batches(whole, np.arange(len(whole)), size, 70, layout)
    pairs = {
        (int(i), int(t))
        for b in batches
        for i, t in zip(b.ids_BT.flatten(), b.labels_BT.flatten(), strict=True)
        if t != IGNORED
    }
    assert pairs == {
        (int(t - 1), int(t)) for t in (label for b in batches for label in b.labels_BT.flatten()) if t != IGNORED
    }
    assert sum(b.supervised for b in batches) == whole.supervised().sum() == len(pairs)
    assert sum(b.tokens for b in batches) == whole.slots.sum()
    for batch in batches:
        assert batch.slots <= max(size * 70, 70)
        if layout == 'packed':
            assert sum(batch.lengths) == batch.slots == batch.tokens
            assert batch.positions_BT[0].tolist() == [
                position for length in batch.lengths for position in range(length)
            ]


@pytest.mark.parametrize('layout', layouts)
def test_evaluation_sees_every_example_once(layout):
    whole = examples(np.array([2, 30, 7, 71, 50, 3, 3, 12]))
    batches = list(evaluation_batches(whole, 2, 70, layout))
    seen = sorted(int(label) for batch in batches for label in batch.labels_BT.flatten() if label != IGNORED)
    assert seen == sorted(int(label) for row in range(len(whole)) for label in whole[row][1:])
    assert all(batch.slots <= 2 * 70 for batch in batches)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 99))
def test_an_epoch_is_every_example_once(count, rows, seed):
    plan = Plan(count, rows, seed)
    for epoch in (0, 1):
        seen = np.concatenate([plan.step(epoch * plan.steps_per_epoch + k) for k in range(plan.steps_per_epoch)])
        assert sorted(seen) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(5, 40))
def test_bins_hold_every_item_once_and_never_overflow(sizes, capacity):
    bins = best_fit(sizes, capacity)
    assert sorted(item for group in bins for item in group) == list(range(len(sizes)))
    for group in bins:
        assert len(group) == 1 or sum(sizes[item] for item in group) <= capacity


def test_token_files_are_mapped_and_a_cut_one_is_found(tokenizer, tmp_path):
    texts = builtin_part('topics_eval').texts[:4]
    stored = encode(texts, tokenizer, tmp_path, batch=2)
    assert isinstance(stored.ids, np.memmap) and np.array_equal(stored.ids, encode(texts, tokenizer).ids)
    facts = read_json(tmp_path / 'tokens.json')
    assert facts['tokenizer'] == tokenizer_hash(tokenizer) and facts['dtype'] == 'uint16'
    assert facts['tokens'] == side_facts(tmp_path, 'tokens') and facts['tokens']['documents'] == 4
    data = (tmp_path / 'tokens.bin').read_bytes()
    (tmp_path / 'tokens.bin').write_bytes(data[:-2])
    with pytest.raises(LabError, match='was cut'):
        read_tokens(tmp_path)


@pytest.mark.parametrize('dtype', [np.uint16, np.uint32])
def test_one_writer_goes_on_where_it_stopped_and_one_reader_reads(tmp_path, dtype):
    with TokenWriter(tmp_path, 'train', dtype) as writer:
        writer.write([5, 6, 7, 9], [4])
        writer.flush()
        writer.write([1, 1, 1, 9], [4])  # after the last note of how far it was
    assert not (tmp_path / 'train.bin').exists()
    with TokenWriter(tmp_path, 'train', dtype, tokens=4, documents=1) as writer:
        writer.write([8, 9, 2, 9], [2, 2])
        assert writer.finish().tolist() == [0, 4, 6, 8]
    (tmp_path / 'tokens.json').write_text(f'{{"dtype": "{np.dtype(dtype).name}"}}')
    ids, offsets = read_side(tmp_path, 'train')
    assert ids.dtype == dtype and ids.tolist() == [5, 6, 7, 9, 8, 9, 2, 9] and offsets.tolist() == [0, 4, 6, 8]
    file = read_token_file(tmp_path)
    assert np.array_equal(file.ids, ids) and np.array_equal(file.offsets, offsets)
    assert [path.name for path in tmp_path.glob('.*')] == []
    (tmp_path / 'train_offsets.npy').unlink()
    assert read_side(tmp_path, 'train')[1].tolist() == [0, 4, 6, 8]
    (tmp_path / 'train.bin').write_bytes((tmp_path / 'train.bin').read_bytes()[:-1])
    with pytest.raises(LabError, match='was cut'):
        read_side(tmp_path, 'train')


def test_a_refused_document_is_counted_and_named():
    with pytest.raises(LabError, match='document 1 has 29 positions and max_length is 10'):
        cut(examples([5, 30, 20]), 10, 'error')


# ---- token files


def test_control_like_text_of_an_interrupted_preparation_is_counted_once(tmp_path, monkeypatch):
    questions = tmp_path / 'questions.jsonl'
    questions.write_text(''.join(f'{{"text": "{n}: <|endoftext|>, <|endoftext|>?"}}\n' for n in range(40)))
    source = dict(data=str(questions), tokenizer='base', valid_share=0.2, batch=4)
    write, written = token_files.write_json, []

    def write_then_stop(path, value):
        write(path, value)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(token_files, 'write_json', write_then_stop)
    monkeypatch.setattr(token_files.write_side, '__defaults__', (2,))
    with pytest.raises(KeyboardInterrupt):
        token_files.prepare_tokens(tmp_path / 'tokens', **source)
    assert written == [tmp_path / 'tokens' / '.source.json', tmp_path / 'tokens' / '.train.json']
    with pytest.raises(LabError, match='was begun with other tokens'):
        token_files.prepare_tokens(tmp_path / 'tokens', **source | dict(valid_share=0.3))

    facts = token_files.prepare_tokens(tmp_path / 'tokens', **source)
    for side in ('train', 'val'):
        assert facts[side]['control_like'] == 2 * facts[side]['documents'] > 0
        assert (token_files.read_token_file(tmp_path / 'tokens', side).ids == facts['eot']).sum() == len(
            token_files.read_token_file(tmp_path / 'tokens', side)
        )
    assert facts['train']['documents'] + facts['val']['documents'] == 40
    assert not [path.name for path in (tmp_path / 'tokens').iterdir() if path.name.startswith(('.train', '.val', '.source'))]


def test_tokens_of_the_hub_are_found_again_in_the_folder_they_were_prepared_in(tmp_path, monkeypatch):
    known = {}
    monkeypatch.setattr(hashes, 'hub_revision', lambda name, kind: known.get(name))
    encoder = token_files.make_encoder('base')

    def download(name, kind, result):
        known[name] = kind * 40
        return result

    texts = [f'document {number}' for number in range(20)]
    monkeypatch.setattr(token_files, 'make_encoder', lambda name: download(name, 'a', encoder))
    monkeypatch.setattr(
        token_files, 'document_stream', lambda data, side, most, **options: iter(download(data, 'b', [texts]))
    )
    names = dict(outputs=str(tmp_path), data='org/texts', tokenizer='org/tok', model='', documents=0)
    params = SimpleNamespace(**names, num_eval_samples=0, data_config='', text_field='text', valid_share=0.1)
    facts = prepare_run_tokens(params)
    assert facts['train']['documents'] == 20 and (run_tokens(params) / 'tokens.json').exists()
    known['org/texts'] = 'c' * 40
    assert not run_tokens(params).exists()


def test_what_a_crashed_machine_lost_is_prepared_again(tmp_path, monkeypatch):
    notes = tmp_path / 'notes.jsonl'
    notes.write_text(''.join(f'{{"text": "number {n}"}}\n' for n in range(40)))
    source = dict(data=str(notes), tokenizer='base', valid_share=0.2, batch=4)
    whole = token_files.prepare_tokens(tmp_path / 'whole', **source)
    write = token_files.write_json

    def write_then_stop(path, value):
        write(path, value)
        if path.name == '.train.json':
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(token_files, 'write_json', write_then_stop)
        stopped.setattr(token_files.write_side, '__defaults__', (2,))
        with pytest.raises(KeyboardInterrupt):
            token_files.prepare_tokens(tmp_path / 'lost', **source)
    part = tmp_path / 'lost/.train.bin.partial'
    os.truncate(part, part.stat().st_size // 2)
    lost = token_files.prepare_tokens(tmp_path / 'lost', **source)
    assert lost['train'] == whole['train'] and lost['val'] == whole['val']


def test_truncation_and_padding_that_a_trainer_saved_are_not_taken_over(tmp_path):
    trainers = load_tokenizer('base')
    trainers(['a', 'some more words'], truncation=True, max_length=8, padding=True)
    trainers.save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'tokenizer.json').read_text())['truncation']

    plain, text = load_tokenizer('base'), ['word ' * 50, 'a']
    assert load_tokenizer(str(tmp_path)).backend_tokenizer.encode_batch_fast(text)[0].ids == plain(text)['input_ids'][0]
    assert load_tokenizer(str(tmp_path)).backend_tokenizer.encode_batch_fast(text)[1].ids == plain(text)['input_ids'][1]
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(plain)


def test_a_document_that_is_too_long_is_named_with_its_own_length():
    long = Examples(np.zeros(52, np.uint16), np.array([0, 21]), np.array([21, 52]))
    with pytest.raises(LabError, match='document 0 has 20 positions and max_length is 10'):
        cut(long, 10, 'error')
