"No evaluation text was ever trained on, and splits do not leak."

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data import corpora
from llmft.data.corpora import (
    builtin_part,
    builtin_parts,
    content_key,
    drop_shared,
    load_corpus,
    paragraph_keys,
    split_documents,
)
from llmft.data.tables import Documents

several_texts = st.lists(st.text('ab \n', min_size=1, max_size=6), min_size=2, max_size=40).filter(
    lambda texts: len(set(map(content_key, texts))) > 1
)

training_parts = ('base', 'topics', 'functions')
evaluation_parts = tuple(f'{part}_eval' for part in training_parts)


def test_no_paragraph_of_an_evaluation_part_was_trained_on():
    trained = set().union(*(paragraph_keys(builtin_part(part)) for part in training_parts))
    assert len(trained) > 20_000
    for part in evaluation_parts:
        keys = paragraph_keys(builtin_part(part))
        assert len(keys) > 100 and not keys & trained, part


def test_the_base_model_never_saw_the_text_that_fine_tuning_uses():
    base = paragraph_keys(builtin_part('base'))
    for part in ('topics', 'functions', *evaluation_parts):
        keys = paragraph_keys(builtin_part(part))
        assert len(keys) > 100 and not base & keys, part
    modules = {name.split('/')[0].removesuffix('.py') for name in builtin_part('base').names}
    for part in ('functions', 'functions_eval', 'base_eval'):
        held_out = {name.split(':')[0].split('/')[0].removesuffix('.py') for name in builtin_part(part).names}
        assert len(held_out) > 5 and not held_out & modules


def test_a_function_with_a_held_out_paragraph_is_dropped_whole(monkeypatch):
    function, name = builtin_part('functions').texts[0], builtin_part('functions').names[0]
    monkeypatch.setattr(corpora, '_parts', {**corpora._parts, 'functions_eval': Documents([function], ['held out'])})
    found = corpora._trained('functions')
    assert function not in found.texts and len(builtin_part('functions')) - len(found) >= 1 and name not in found.names


def test_parts_are_the_same_every_time():
    for part in builtin_parts:
        assert builtin_part(part).texts == builtin_part(part).texts and len(builtin_part(part)) >= 5


@settings(max_examples=50, deadline=None)
@given(several_texts, st.integers(0, 1000))
def test_copies_never_land_on_two_sides(texts, seed):
    split = split_documents(Documents(texts, [str(i) for i in range(len(texts))]), 0.5, seed)
    train, valid = ({content_key(text) for text in side.texts} for side in (split.train, split.valid))
    assert not train & valid and train | valid == {content_key(text) for text in texts}
    assert len(split.train) + len(split.valid) + split.notes['duplicates'] == len(texts)


def test_sides_of_a_data_set_are_kept_apart():
    corpus = drop_shared(Documents(['a b', 'c', 'd'], list('123')), Documents(['a\nb', 'e'], list('45')))
    assert corpus.train.texts == ['c', 'd'] and corpus.notes == dict(duplicates_across_splits=1)


def test_a_data_set_with_one_split_is_split_here(monkeypatch):
    rows = Documents([f'text number {i}' for i in range(40)], [str(i) for i in range(40)])
    for split in ('validation', 'test', 'train'):
        monkeypatch.setattr(corpora, 'document_splits', lambda *args, split=split, **options: {split: iter(rows)})
        corpus = load_corpus('someone/rows')
        assert len(corpus.train) + len(corpus.valid) == 40 and len(corpus.valid) > 0


def test_documents_that_are_not_asked_for_are_counted():
    whole, part = load_corpus('builtin:topics'), load_corpus('builtin:topics', num_samples=5)
    assert len(part.train) == 5 and part.notes['beyond_num_samples'] == len(whole.train) - 5


@pytest.mark.parametrize(
    'data, words',
    [('builtin:nothing', 'is no training part'), ('missing.txt', 'no such file'), ('./nowhere', 'no such file')],
)
def test_bad_names_are_one_line(data, words):
    with pytest.raises(LabError, match=words) as error:
        load_corpus(data)
    assert '\n' not in str(error.value)


def test_an_empty_corpus_and_bad_files_are_one_line(tmp_path):
    (tmp_path / 'empty.jsonl').write_text('{"text": ""}\n{"text": "  "}\n')
    (tmp_path / 'broken.jsonl').write_text('{"text": \n')
    (tmp_path / 'binary.txt').write_bytes(b'\xff\xfe\x00')
    for name, words in {
        'empty.jsonl': 'no training document',
        'broken.jsonl': 'broken.jsonl:1 is not JSON',
        'binary.txt': 'not UTF-8',
    }.items():
        with pytest.raises(LabError, match=words) as error:
            load_corpus(str(tmp_path / name))
        assert '\n' not in str(error.value)
    (tmp_path / 'folder').mkdir()
    with pytest.raises(LabError, match='holds no file'):
        load_corpus(str(tmp_path / 'folder'))


def test_parquet_and_jsonl_give_the_same_documents(tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict(dict(text=[f'document {i}' for i in range(50)], other=list(range(50))))
    rows.to_parquet(tmp_path / 'a.parquet')
    rows.to_json(tmp_path / 'b.jsonl')
    one, other = (load_corpus(str(tmp_path / name)) for name in ('a.parquet', 'b.jsonl'))
    assert one.train.texts == other.train.texts and len(one.train) + len(one.valid) == 50
