"No evaluation text was ever trained on, splits do not leak, and a held-out document is always there."

import ast
import json

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
    functions_in,
    load_corpus,
    paragraph_keys,
    split_documents,
    split_text,
)
from llmft.data.tables import Documents
from llmft.data.token_files import document_stream

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


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.floats(1e-6, 1 - 1e-6), st.integers(0, 1000))
def test_both_sides_have_a_document_whatever_the_share(tmp_path_factory, count, share, seed):
    texts = [f'text {n}' for n in range(count)]
    split = split_documents(Documents(texts, texts), share, seed)
    assert len(split.train) and len(split.valid) and len(split.train) + len(split.valid) == count
    data = tmp_path_factory.mktemp('texts') / 'a.csv'
    data.write_text('\n'.join(['text', *texts, *texts]))
    train, val = (
        {text for batch in document_stream(str(data), side, valid_share=share, seed=seed) for text in batch}
        for side in ('train', 'val')
    )
    assert train and val and not train & val and train | val == set(texts)


def test_folders_of_few_files_have_a_held_out_document(tmp_path):
    for count in range(1, 7):
        (tmp_path / f'{count}.txt').write_text(f'The text of file number {count}.')
        corpus = load_corpus(str(tmp_path))
        assert len(corpus.train) and len(corpus.valid)


def test_a_lone_text_is_divided_and_nothing_is_lost(tmp_path):
    book = '\n\n'.join(f'Paragraph {n}, {"long " * n}ends here.' for n in range(40)) + '\n'
    (tmp_path / 'book.txt').write_text(book)
    corpus = load_corpus(str(tmp_path / 'book.txt'), valid_share=0.25)
    assert corpus.train.texts[0] + corpus.valid.texts[0] == book and corpus.valid.texts[0].startswith('Paragraph')
    assert 0.2 < len(corpus.valid.texts[0]) / len(book) < 0.3
    assert (corpus.train.ends, corpus.valid.ends) == ([False], [True])
    sides = [[text for batch in document_stream(str(tmp_path), side) for text in batch] for side in ('train', 'val')]
    assert ''.join(sides[0] + sides[1]) == book and len(sides[1]) == 1
    begin, end = split_text('Title\n\n' + 'word ' * 1000, 0.1)
    assert begin + end == 'Title\n\n' + 'word ' * 1000 and 450 < len(end) < 550
    with pytest.raises(LabError, match='one word'):
        split_text('word', 0.1)


@pytest.mark.parametrize('share', [0, 1, -1, 2])
def test_a_share_that_leaves_nothing_is_refused(share, tmp_path):
    (tmp_path / 'a.txt').write_text('one two')
    for reader in (load_corpus, lambda data, valid_share: next(document_stream(data, 'val', valid_share=valid_share))):
        with pytest.raises(LabError, match='valid_share'):
            reader(str(tmp_path / 'a.txt'), valid_share=share)


def test_a_data_set_with_an_empty_held_out_split_is_split_here(monkeypatch):
    rows = [(str(n), f'text {n}') for n in range(20)]
    monkeypatch.setattr(corpora, 'document_splits', lambda *args, **options: dict(train=iter(rows), test=iter([])))
    corpus = load_corpus('someone/rows')
    assert len(corpus.valid) and len(corpus.train) + len(corpus.valid) == 20


def test_empty_texts_are_dropped_by_every_reader(tmp_path):
    rows = [dict(text=text) for text in ('one', None, ' \n', 'two', '')]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    notes = {}
    read = [text for batch in document_stream(str(tmp_path), 'train', valid_share=0.5, notes=notes) for text in batch]
    assert len(read) == 1 and notes == dict(empty=3) == {'empty': load_corpus(str(tmp_path)).notes['empty']}


hard_to_cut = {
    'text at the margin': 'class A:\n    def f(self):\n        s = """\nmargin\n  two\n"""\n        return s\n',
    'a docstring': 'class A:\n    def f(self):\n        """One.\n\n        Two.\n        """\n',
    'a long line': "class A:\n    def f(self):\n        return 'a\\\nb'\n",
    'brackets': 'class A:\n    def f(self, x=(\n1,\n  2)):\n        return [\nx\n]\n',
    'comments': 'class A:\n    def f(self):\n# at the margin\n        return 1\n',
    'form feeds': 'import os\n\x0c\nclass A:\n    def f(self):\n        return "a\x0cb"\n\x0c\ndef g(): return 2\n',
    'other line ends': 'a = "x\u2028y"\nclass A:\n    def f(self):\n        return "\u2028\x1c"\n',
    'windows': 'class A:\r\n    def f(self):\r\n        return """\r\nx\r\n"""\r\n',
    'tabs': 'class A:\n\tdef f(self):\n\t\treturn """\n\tx"""\n',
    'implicit joins': "class A:\n    def f(self):\n        return ('a'\n    'b'\n'c')\n",
}


def constants(tree):
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def methods(tree):
    return [node for owner in tree.body for node in getattr(owner, 'body', []) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize('source', hard_to_cut.values(), ids=hard_to_cut)
def test_functions_are_cut_whole(source):
    cut = functions_in(Documents([source], ['a.py']), least=0)
    found = [ast.parse(text).body[0] for name, text in cut if '.f' in name]
    assert [constants(node) for node in found] == [constants(node) for node in methods(ast.parse(source))]
    assert len(found) == 1 and len(cut) == source.count('def ')


def test_every_function_of_the_built_in_parts_parses():
    for part in ('functions', 'functions_eval'):
        texts = builtin_part(part).texts
        assert len(texts) > 50
        for text in texts:
            assert len(ast.parse(text).body) == 1
