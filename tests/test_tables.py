"Rows come one by one, the same from every format, and what cannot be read is one line with file, row and field."

import csv
import datetime
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data.corpora import load_corpus
from llmft.data.dynamics import predator_prey, solve_fixed, solve_logs
from llmft.data.tables import document_splits, left_out, local_path, read_documents, read_rows, read_splits, read_text
from llmft.data.token_files import document_stream, prepare_tokens
from llmft.studies.code.tasks import load_tasks
from llmft.studies.inference.word_problems import read_problems

texts = st.text(st.characters(codec='utf-8', exclude_characters='\r\0'), max_size=40)


def values(path, **options):
    return [row.values for row in read_rows(path, **options)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=20), st.booleans(), st.sampled_from(['\n', '\r\n']))
def test_every_format_gives_the_same_rows(tmp_path_factory, cells, escaped, end):
    folder = tmp_path_factory.mktemp('rows')
    rows = [dict(text=text, other=other) for text, other in cells]
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    (folder / 'a.jsonl').write_bytes('\n'.join(lines).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / 'a.parquet', row_group_size=3)
    for ending, delimiter in (('csv', ','), ('tsv', '\t')):
        with (folder / f'a.{ending}').open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator=end)
            writer.writerows([['text', 'other'], *cells])
    (folder / 'a.json').write_text('[' + ', \r\n'.join(lines) + ' ]\n', encoding='utf-8')
    (folder / 'b.json').write_text('\n'.join(lines), encoding='utf-8')
    assert values(folder / 'b.json') == rows
    for ending in ('jsonl', 'json', 'parquet', 'csv', 'tsv'):
        assert values(folder / f'a.{ending}') == rows, ending


def test_only_a_line_feed_ends_a_line(tmp_path):
    rows = [dict(text='a\u2028b\u2029c\u0085d\x1ce'), dict(text='next')]
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    assert values(tmp_path / 'a.jsonl') == rows
    (tmp_path / 'a.csv').write_text('text\na\u2028b\nnext\n', encoding='utf-8')
    assert values(tmp_path / 'a.csv') == [dict(text='a\u2028b'), dict(text='next')]


@pytest.mark.parametrize(
    'name, content, rows',
    [
        ('a.jsonl', b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', [dict(text='a'), dict(text='b')]),
        ('a.csv', b'text,n\r\na,1\r\n\r\n"b\r\nc",2\r\n', [dict(text='a', n='1'), dict(text='b\r\nc', n='2')]),
        ('a.tsv', b'text\tn\r\na\t1\r\n', [dict(text='a', n='1')]),
    ],
)
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
def test_windows_files_are_read(tmp_path, name, content, rows, mark):
    (tmp_path / name).write_bytes(mark + content)
    notes = {}
    assert values(tmp_path / name, notes=notes) == rows
    assert notes == (dict(blank_lines=1) if b'\r\n\r\n' in content else {})
    (tmp_path / 'a.txt').write_bytes(mark + content)
    assert read_text(tmp_path / 'a.txt') == content.decode().replace('\r\n', '\n')


def test_a_row_has_the_number_of_its_first_line(tmp_path):
    (tmp_path / 'a.jsonl').write_text('\n\n{"text": "a"}\n   \n{"text": "b"}\n')
    (tmp_path / 'b.csv').write_text('\ntext,n\n"a\nb\nc",1\n\nd,2\n')
    pyarrow.parquet.write_table(pyarrow.table(dict(text=['a', 'b'])), tmp_path / 'c.parquet')
    notes = {}
    names = [row.name for row in read_rows(tmp_path, ['text'], notes=notes)]
    assert names == ['a.jsonl:3', 'a.jsonl:5', 'b.csv:3', 'b.csv:7', 'c.parquet:1', 'c.parquet:2']
    assert notes == dict(blank_lines=5)
    assert [name for name, _ in read_documents(tmp_path)] == names


broken = {
    'no JSON': ('a.jsonl', b'{"text": "a"}\n\n{"text": \n', 'a.jsonl:3 is not JSON'),
    'no object': ('a.jsonl', b'{"text": "a"}\n[1]\n', 'a.jsonl:2 is no JSON object'),
    'a huge number': ('a.jsonl', b'{"text": ' + b'1' * 5000 + b'}', 'a.jsonl:1 is not JSON that can be read'),
    'deep nesting': ('a.jsonl', b'[' * 100_000, 'a.jsonl:1 is not JSON that can be read'),
    'no field': (
        'a.jsonl',
        b'{"text": "a"}\n{"txt": "b"}\n',
        r"a.jsonl:2 has no field 'text' \(did you mean 'txt'\?\)",
    ),
    'no text': ('a.jsonl', b'{"text": 5}', r"a.jsonl:1 has no text in the field 'text': it holds int"),
    'no UTF-8': ('a.jsonl', b'{"text": "a"}\n{"text": "\xff"}', r'a.jsonl:2 is not UTF-8 text \(byte 11 of the line\)'),
    'half a character': ('a.jsonl', rb'{"text": "\udc00"}', 'a.jsonl:1 holds half of a surrogate pair'),
    'too few cells': ('a.csv', b'text,n\na,1\nb\n', 'a.csv:3 has 1 cell for 2 fields'),
    'too many cells': ('a.csv', b'text,n\na,b,1\n', 'a.csv:2 has 3 cells for 2 fields'),
    'an open quote': ('a.csv', b'text,n\na,1\n"b,2\nc,3\n', 'a.csv:3 is not CSV'),
    'a lone quote': ('a.tsv', b'text\tn\n"a" b\t1\n', 'a.tsv:2 is not TSV'),
    'a field twice': ('a.csv', b'text,text\na,b\n', 'a.csv:1 names a field twice'),
    'no header': ('a.csv', b'\n\n', 'a.csv is empty'),
    'no CSV field': ('a.csv', b'body,n\na,1\n', "a.csv:2 has no field 'text': its fields are body, n; set text_field"),
    'no UTF-8 in CSV': ('a.csv', b'text\ngood\nna\xefve\n', r'a.csv:3 is not UTF-8 text \(byte 3 of the line\)'),
    'no parquet': ('a.parquet', b'PAR1 and nothing else', "a.parquet:1 cannot be read as parquet"),
    'an empty file': ('a.parquet', b'', "a.parquet:1 cannot be read as parquet"),
    'another ending': ('a.xls', b'', "ends in '.xls': give one of .txt"),
    'no array': ('a.json', b'[{"text": "a"}, [1]]', 'a.json:2 is no JSON object: write an array of objects'),
    'an open array': ('a.json', b'[{"text": "a"}', 'a.json:1 is followed by neither a comma nor the end'),
    'a broken array': ('a.json', b'[{"text": "a"}, {"text": ]', 'a.json:2 is not JSON'),
    'half a character in an array': ('a.json', rb'[{"text": "\ud83d"}]', 'a.json:1 holds half of a surrogate pair'),
    'latin-1 in an array': ('a.json', b'[{"text":\n"\xe9"}]', r'a.json:2 is not UTF-8 text \(byte 2 of the line\)'),
    'no UTF-8 in text': ('a.txt', b'one\ntwo \xff', r'a.txt:2 is not UTF-8 text \(byte 5 of the line\)'),
}


@pytest.mark.parametrize('name, content, words', broken.values(), ids=broken)
def test_what_is_broken_is_one_line_for_every_caller(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    readers = [
        lambda: list(read_documents(path)),
        lambda: load_corpus(str(path)),
        lambda: list(document_stream(str(path), 'train')),
    ]
    messages = set()
    for reader in readers:
        with pytest.raises(LabError, match=words) as error:
            reader()
        messages.add(str(error.value))
    assert len(messages) == 1 and '\n' not in messages.pop()


def test_parquet_without_a_field_and_with_bad_text_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(dict(body=['a'], n=[1])), tmp_path / 'a.parquet')
    with pytest.raises(LabError, match="a.parquet:1 has no field 'text': its fields are body, n"):
        list(read_rows(tmp_path / 'a.parquet', ['text']))
    bad = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(np.array([0, 1], np.int32)), pyarrow.py_buffer(b'\xff'))
    pyarrow.parquet.write_table(pyarrow.table(dict(text=bad)), tmp_path / 'b.parquet')
    with pytest.raises(LabError, match='b.parquet:1 or a row soon after it is not UTF-8'):
        list(read_rows(tmp_path / 'b.parquet', ['text']))


def test_null_is_an_empty_text_and_counted(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": null}\n' + ''.join(f'{{"text": "row {n}"}}\n' for n in range(50)))
    corpus = load_corpus(str(tmp_path / 'a.jsonl'))
    assert corpus.notes['empty'] == 1 and len(corpus.train) + len(corpus.valid) == 50
    with pytest.raises(LabError, match='no text in the field .* it holds null'):
        next(read_rows(tmp_path / 'a.jsonl')).text('text', required=True)


def test_strings_that_look_like_dates_stay_text(tmp_path):
    rows = [dict(text=f'2024-01-{day:02}') for day in range(1, 29)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    corpus = load_corpus(str(tmp_path / 'a.jsonl'))
    assert sorted(corpus.train.texts + corpus.valid.texts) == [row['text'] for row in rows]


@pytest.mark.parametrize('ending', ['jsonl', 'csv', 'parquet'])
def test_memory_does_not_grow_with_the_rows(tmp_path, ending):
    path, size, count = tmp_path / f'a.{ending}', 5_000_000, 20
    rows = [dict(text=str(n % 10) * size) for n in range(count)]
    if ending == 'parquet':
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=1, use_dictionary=False)
    else:
        lines = map(json.dumps, rows) if ending == 'jsonl' else ['text', *(row['text'] for row in rows)]
        path.write_text('\n'.join(lines) + '\n')
    del rows
    tracemalloc.start()
    lengths = [len(row.text('text')) for row in read_rows(path, ['text'])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [size] * count
    assert peak < {'jsonl': 8, 'csv': 16, 'parquet': 8}[ending] * size


def many_files(folder):
    "Files that people have beside their texts; the path of a link to nowhere, of a pipe, and of a folder with an ending."
    (folder / 'deep').mkdir()
    (folder / 'deep/B.TXT').write_text('upper case')
    (folder / 'C.JSONL').write_text('{"text": "rows"}\n\n')
    (folder / 'D.Csv').write_text('text\ncells\n')
    (folder / 'a.md').write_text('lower case')
    for hidden in ('.a.md.swp', '.#a.md', '._B.TXT', '.hidden.txt'):
        (folder / hidden).write_text('an older version')
    (folder / '.ipynb_checkpoints').mkdir()
    (folder / '.ipynb_checkpoints/a.md').write_text('an older version')
    for other in ('a.md~', '#a.md#', 'image.png', 'deep/LICENSE'):
        (folder / other).write_text('no text of the corpus')
    (folder / 'lost.txt').symlink_to(folder / 'nowhere.txt')
    (folder / 'notes.md').mkdir()
    (folder / 'linked').symlink_to(folder / 'deep')
    os.mkfifo(folder / 'pipe.txt')


def test_everything_in_a_folder_is_read_or_counted(tmp_path):
    many_files(tmp_path)
    notes = {}
    found = list(read_documents(tmp_path, notes=notes))
    assert found == [('C.JSONL:1', 'rows'), ('D.Csv:2', 'cells'), ('a.md', 'lower case'), ('B.TXT', 'upper case')]
    expected = dict(hidden_files=4, hidden_folders=1, other_files=4, links_and_pipes=2, linked_folders=1, blank_lines=1)
    assert notes == expected
    corpus = load_corpus(str(tmp_path))
    assert {reason: corpus.notes[reason] for reason in expected} == expected
    assert 'hidden files: 4' in left_out(corpus.notes) and 'duplicates' not in left_out(corpus.notes)


def test_every_reader_counts_what_it_leaves_out(tmp_path, tmp_path_factory):
    rows = [dict(question=f'{n} + 1?', answer=f'#### {n + 1}', text=f'row {n}') for n in range(30)]
    (tmp_path / 'a.jsonl').write_text('\n\n'.join(map(json.dumps, rows)))
    (tmp_path / '.a.jsonl').write_text('an older version')
    expected = dict(hidden_files=1, blank_lines=29)
    notes = {}
    read_problems(str(tmp_path), notes=notes)
    assert notes == expected and expected.items() <= load_tasks(str(tmp_path))[1].items()
    facts = prepare_tokens(tmp_path_factory.mktemp('tokens'), str(tmp_path), 'characters:row 0123456789')
    assert facts['left_out'] == expected


@pytest.mark.parametrize('ending', ['txt', 'jsonl', 'json', 'csv', 'parquet'])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, ending):
    os.mkfifo(tmp_path / f'a.{ending}')
    for reader in (load_corpus, lambda data: list(document_stream(data, 'train'))):
        with pytest.raises(LabError, match='no regular file'):
            reader(str(tmp_path / f'a.{ending}'))


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('a')
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}')

    def refuse(path, *rest):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(Path, 'open', refuse)
    for name in ('a.txt', 'a.jsonl'):
        with pytest.raises(LabError, match=f"{name} cannot be opened .Permission denied."):
            list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    'data, words', [('', 'data is empty'), ('x' * 5000, 'cannot be a path'), ('~nobody-here/a', 'cannot be a path')]
)
def test_names_that_are_no_paths_are_one_line(data, words):
    with pytest.raises(LabError, match=words) as error:
        load_corpus(data)
    assert '\n' not in str(error.value) and len(str(error.value)) < 6000


def test_columns_that_python_cannot_hold_leave_a_table_readable(tmp_path):
    columns = dict(
        text=['a', 'b'],
        tags=pyarrow.array([[('x', 1)], []], type=pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        nanoseconds=pyarrow.array([1, 2], type=pyarrow.timestamp('ns')),
        far=pyarrow.array([10**15, 0], type=pyarrow.timestamp('ms')),
        nested=[dict(deep=[dict(n=1)]), None],
        day=[datetime.date(2020, 1, 1), None],
    )
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / 'a.parquet')
    rows = values(tmp_path / 'a.parquet')
    assert [row['text'] for row in rows] == ['a', 'b'] and rows[0]['tags'] == [('x', 1)]
    assert '1970-01-01' in str(rows[0]['nanoseconds']) and rows[0]['nested'] == dict(deep=[dict(n=1)])
    twice = pyarrow.Table.from_arrays([pyarrow.array(['a']), pyarrow.array(['b'])], names=['text', 'text'])
    pyarrow.parquet.write_table(twice, tmp_path / 'b.parquet')
    with pytest.raises(LabError, match='b.parquet names a field twice'):
        values(tmp_path / 'b.parquet')


def test_other_columns_may_hold_anything(tmp_path):
    rows = [dict(text='a', x=1), dict(text='b', x='one'), dict(text='c', x=[1, {}]), dict(text='d', y=1e999)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert [text for _, text in read_documents(tmp_path / 'a.jsonl')] == list('abcd')


def test_one_door(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "a", "n": 1}\n')
    assert [row.values for row in read_splits(str(tmp_path))['']] == [dict(text='a', n=1)]
    assert list(document_splits(str(tmp_path))['']) == [('a.jsonl:1', 'a')]
    assert local_path('someone/rows') is None
    for data in ('missing.csv', 'MISSING.JSON', './nowhere', '~/nowhere/at/all'):
        with pytest.raises(LabError, match='no such file or folder'):
            read_splits(data)
    with pytest.raises(LabError, match="'someone/rows' with data_config 'main' is no file.*or use builtin:x"):
        read_splits('someone/rows', 'main', instead='builtin:x')


def test_solvers_agree_and_keep_the_order_of_their_operations():
    rng = np.random.default_rng(0)
    rates_4N, start_2N = rng.uniform(0.8, 1.2, (4, 50)), rng.uniform(0.4, 2.2, (2, 50))
    fixed = solve_fixed(rates_4N, start_2N, 20, 0.35, 4)
    logs = solve_logs(rates_4N, np.log(start_2N).T, 20, 0.35, 4)
    accurate = predator_prey(rates_4N.T, start_2N.T, np.arange(20) * 0.35)
    assert np.abs(fixed.transpose(2, 0, 1) - accurate).max() < 2e-2 and np.abs(logs - accurate).max() < 2e-2

    def slope(state):
        a, b, g, d = rates_4N
        return np.stack([state[0] * (a - b * state[1]), state[1] * (d * state[0] - g)])

    h, state = 0.35 / 4, start_2N
    for _ in range(19 * 4):
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        k4 = slope(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert np.array_equal(fixed[-1], state)
