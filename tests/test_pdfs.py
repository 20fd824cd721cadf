"PDFs: every file is read or named, the split is by file, no word is lost, and a reader that dies costs one file."

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.core import LabError
from llmft.data.pdfs import (
    PdfFile,
    mark_copies,
    mend_breaks,
    pack_paragraphs,
    pdf_corpus,
    pdf_paragraphs,
    read_pdf,
    read_pdfs,
    split_files,
    write_bad_pdfs,
    write_pdf,
)

shared = os.environ.get('LLMFT_SHARED_DATA')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Twelve good files in two folders, one of them twice, and the five bad ones."
    folder = tmp_path_factory.mktemp('pdfs')
    for n in range(12):
        write_pdf(
            folder / ('deep/er' if n % 2 else '.') / f'paper{n:02}.pdf',
            '\n'.join(f'Sentence {k} of paper {n} is about water.' for k in range(100 + n)),
        )
    (folder / 'copy.PDF').write_bytes((folder / 'paper00.pdf').read_bytes())
    write_bad_pdfs(folder)
    (folder / 'notes.txt').write_text('no PDF')
    return folder


def test_every_file_is_read_or_named(folder):
    files = {file.name: file for file in read_pdfs(folder, workers=2)}
    assert len(files) == 18 and 'notes.txt' not in files
    reasons = {name: file.skipped.split(':')[0] for name, file in files.items() if file.skipped}
    assert reasons == {
        'broken.pdf': 'broken',
        'empty.pdf': 'zero bytes',
        'encrypted.pdf': 'encrypted',
        'scanned.pdf': 'scanned',
        'short.pdf': 'too short',
    }
    for n in range(12):
        file = files[f'{"deep/er/" if n % 2 else ""}paper{n:02}.pdf']
        assert (
            file.text.split() == ' '.join(f'Sentence {k} of paper {n} is about water.' for k in range(100 + n)).split()
            and file.pages == file.read == 2
        )
    assert read_pdf(folder / 'paper00.pdf', max_pages=1).read == 1


def test_workers_change_nothing(folder):
    assert read_pdfs(folder, workers=1) == read_pdfs(folder, workers=3)


def test_a_reader_that_dies_or_hangs_costs_one_file(tmp_path, monkeypatch):
    for n in range(4):
        write_pdf(tmp_path / f'{n}.pdf', 'Enough text to be kept. ' * 40)
    hook = tmp_path / 'hook'
    hook.mkdir()
    (hook / 'sitecustomize.py').write_text("""
import os, sys, time
if 'llmft.data.pdfs' in ' '.join(sys.orig_argv):
    import llmft.data.pdfs as pdfs
    real = pdfs.read_pdf
    def read_pdf(path, *rest):
        if path.endswith('1.pdf'): os.abort()
        if path.endswith('2.pdf'): time.sleep(60)
        return real(path, *rest)
    pdfs.read_pdf = read_pdf
""")
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(hook), os.environ['PYTHONPATH']]))
    start = time.monotonic()
    files = read_pdfs(tmp_path, workers=1, seconds=2)
    assert [file.skipped for file in files] == [
        '',
        'made the reader crash',
        'took more than 2 s',
        '',
    ] and time.monotonic() - start < 40


def test_a_folder_without_pdfs_is_one_line(tmp_path):
    with pytest.raises(LabError, match='holds no file that ends in .pdf'):
        read_pdfs(tmp_path)
    with pytest.raises(LabError, match='there is no folder'):
        read_pdfs(tmp_path / 'missing')
    write_bad_pdfs(tmp_path)
    with pytest.raises(LabError, match='0 usable PDF'):
        pdf_corpus(read_pdfs(tmp_path, workers=1))


def test_the_split_is_by_file_and_written_down(folder, tmp_path):
    files = read_pdfs(folder, workers=1)
    corpus, split = pdf_corpus(files, 0.25, 42, 400, tmp_path / 'split_info.json')
    written = json.loads((tmp_path / 'split_info.json').read_text())
    assert set(written) == {'train_files', 'test_files', 'train_size', 'test_size', 'created_at'} and written == split
    assert (split['train_size'], split['test_size']) == (9, 3) == (len(split['train_files']), len(split['test_files']))
    sides = [{name.split('#')[0] for name in part.names} for part in (corpus.train, corpus.valid)]
    assert sides == [set(split['train_files']), set(split['test_files'])] and not sides[0] & sides[1]
    assert [file.name for file in files if 'the same text' in file.skipped] == ['paper00.pdf']
    assert corpus.notes['skipped'] == {
        'broken': 1,
        'zero bytes': 1,
        'encrypted': 1,
        'scanned': 1,
        'too short': 1,
        'the same text as copy.PDF': 1,
    }
    words = sum(len(file.text.split()) for file in files if not file.skipped)
    assert sum(len(text.split()) for part in (corpus.train, corpus.valid) for text in part.texts) == words


def test_the_split_is_the_studys_share_and_depends_on_the_seed_alone():
    names = [f'{n}.pdf' for n in range(830)]
    one, two, other = split_files(names), split_files(names[::-1]), split_files(names, seed=1)
    assert (one['train_size'], one['test_size']) == (747, 83) and one['test_files'] == two['test_files'] != other[
        'test_files'
    ]
    assert split_files(['a', 'b'], 0.9)['train_size'] == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text('ab .,:\n\f-', max_size=120), max_size=6), st.integers(5, 200))
def test_no_word_is_lost(pages, most):
    text = '\f'.join(pages)
    paragraphs = pdf_paragraphs(text)
    assert ' '.join(paragraphs).split() == text.split()
    chunks = pack_paragraphs(paragraphs, most)
    assert ''.join(''.join(chunks).split()) == ''.join(text.split()) and all(len(chunk) <= most for chunk in chunks)


def test_copies_are_skipped_whatever_their_white_space():
    files = mark_copies(
        [
            PdfFile('a', 1, text='one  two'),
            PdfFile('b', 1, text='one\ntwo'),
            PdfFile('c', 1, text='three'),
            PdfFile('d', 1, text='three', skipped='broken'),
        ]
    )
    assert [file.skipped for file in files] == ['', 'the same text as a', '', 'broken']


@pytest.mark.skipif(not shared, reason='LLMFT_SHARED_DATA is not set: no real PDFs here')
def test_real_papers():
    files = read_pdfs(Path(shared) / 'pdf', workers=1)
    assert len(files) == 3 and all(not file.skipped and file.characters > 10_000 for file in files)


lines = """A well-
known fact about infor-
mation: Fortran-
based programs, the Smith-
Jones law, COVID-
19 cases, state-of-the-
art code, a mini-
bus, water-
sheds and rain-
fed fields. Fortran, minibus and watersheds stand here too; so does self-
organisation.
"""


def test_hyphens_at_line_ends_stay_where_they_belong_to_the_word(tmp_path):
    file = read_pdf(write_pdf(tmp_path / 'a.pdf', lines), min_characters=0)
    words = ' '.join(file.text.split())
    for word in (
        'well-known',
        'information',
        'Fortran-based',
        'Smith-Jones',
        'COVID-19',
        'state-of-the-art',
        'minibus',
    ):
        assert f' {word} ' in words.replace(':', ' ').replace(',', ' '), (word, words)
    assert 'watersheds and' in words and '\ufffe' not in words and '\x02' not in words


def test_line_numbers_between_two_halves_go():
    assert mend_breaks(['18 more infor\ufffe19 mation is\n20 here']) == ['18 more information is\n20 here']
    assert mend_breaks(['of COVID\ufffe19 cases']) == ['of COVID-19 cases']


def test_hidden_and_other_files_are_counted(folder):
    (folder / '._paper00.pdf').write_bytes(b'resource fork')
    notes = {}
    files = read_pdfs(folder, workers=1, notes=notes)
    (folder / '._paper00.pdf').unlink()
    assert len(files) == 18 and notes == dict(hidden_files=1, other_files=1)
