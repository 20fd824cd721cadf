"""Guides keep what they say: concept pages run, the explorer works on any outputs, commands are real.

The pages of the studies leave nothing of their references out."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from llmft.cli import app, call, jobs_of
from llmft.core import LabError
from llmft.runs.params import scales
from llmft.runs.pictures import take_picture

root = Path(__file__).parent.parent
texts = {
    path.relative_to(root).as_posix(): path.read_text(encoding='utf-8')
    for path in [
        root / 'README.md',
        *sorted(root.glob('nbs/guides/*.qmd')),
        *sorted(root.glob('nbs/reference/*.qmd')),
        *sorted(root.glob('nbs/studies/**/*.qmd')),
    ]
}
concepts = sorted(root.glob('nbs/concepts/*.ipynb'))
commands_there = typer.main.get_command(app).commands

# ---- pages that run


def test_concepts_run():
    "All concept pages, in one process: each is a lesson with assertions."
    assert len(concepts) >= 6
    run = """
import sys
from nbdev.test import nbdev_test
nbdev_test.__wrapped__(path=sys.argv[1], n_workers=0, do_print=True)
"""
    done = subprocess.run(
        [sys.executable, '-c', run, str(root / 'nbs/concepts')],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | dict(LLMFT_MANAGED='1'),
    )
    assert done.returncode == 0 and 'Success.' in done.stdout, f'{done.stdout}\n{done.stderr}'[-6000:]
    assert done.stdout.count('Starting') == len(concepts)


@pytest.mark.parametrize('path', concepts, ids=lambda path: path.stem)
def test_concepts_show_and_explain_a_figure(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']

    def text(kind):
        return '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == kind)

    figures = sum('image/png' in output.get('data', {}) for cell in cells for output in cell.get('outputs', []))
    explained = text('markdown').count('*What to see:')
    asserted = len(re.findall(r'test_\w+\(|expect_fail', text('code')))
    counted = f'{figures} figures, {explained} of them explained, {asserted} assertions'
    assert figures >= 1 and explained >= max(1, figures - 1), counted
    assert asserted >= 2, counted


# ---- the explorer


def explorer(outputs, examples='outputs/gallery'):
    "The names that nbs/explore.ipynb defines when its runs are in `outputs`, and everything it displayed."
    shown = []
    names = dict(display=shown.append)
    for cell in json.loads((root / 'nbs/explore.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or 'google.colab' in source:
            continue
        exec(compile(source, 'explore', 'exec'), names)
        if 'parameters' in cell['metadata'].get('tags', []):
            assert {'outputs', 'examples'} <= set(names)
            names |= dict(outputs=str(outputs), examples=examples)
    return names, shown


def copied(folder, *runs):
    "A folder of runs copied from the gallery."
    for run in runs:
        shutil.copytree(root / 'outputs/gallery' / run, folder / run)
    return folder


def test_explorer_compares_runs(tmp_path):
    names, shown = explorer(
        copied(tmp_path, 'finetune/quickstart-full', 'finetune/quickstart-lora', 'compare/quickstart')
    )
    runs = list(names['runs'])
    both = [run for run in runs if run.startswith('finetune/')]
    assert len(runs) == 3
    assert set(names['chosen'].value) == set(both)
    assert names['curve'].value == 'loss'

    def displayed(function, *arguments):
        shown.clear()
        function(*arguments)
        return shown

    figure = displayed(names['curves'], both, 'loss')[0]
    assert len(figure.axes[0].lines) >= 4
    assert figure._repr_png_()[:4] == b'\x89PNG'
    assert displayed(names['curves'], both, 'learning_rate')[0].axes[0].get_ylabel() == 'learning_rate'

    numbers = displayed(names['numbers'], runs)[0]
    after = [
        json.loads((root / 'outputs/gallery' / run / 'metrics.json').read_text())['perplexity_after']
        for run in ('finetune/quickstart-full', 'finetune/quickstart-lora')
    ]
    assert 'perplexity_after' in numbers
    assert all(f'{value:.1f}' in numbers for value in after)

    differing = displayed(names['parameters'], both, True)[0]
    assert 'method' in differing
    assert 'weight_decay' not in differing
    assert 'weight_decay' in displayed(names['parameters'], both, False)[0]

    links = displayed(names['reports'], runs)
    assert len(links) == 3
    assert all('report.html' in link and 'done' in link for link in links)


def test_explorer_takes_runs_as_they_are(tmp_path, capsys):
    "A run that failed, one that still goes on with half a line in its log, and one without anything."
    copied(tmp_path, 'finetune/quickstart-full', 'finetune/quickstart-lora')
    for name, status in (('quickstart-full', 'failed'), ('quickstart-lora', 'running')):
        folder = tmp_path / 'finetune' / name
        record = json.loads((folder / 'run.json').read_text())
        record['run'] |= dict(status=status, error='ValueError: broken' if status == 'failed' else None, verdict=None)
        (folder / 'run.json').write_text(json.dumps(record))
        (folder / 'metrics.json').unlink()
    with (tmp_path / 'finetune/quickstart-lora/log.jsonl').open('a') as file:
        file.write('{"step": 52, "lo')
    (tmp_path / 'finetune/quickstart-full/log.jsonl').unlink()
    names, shown = explorer(tmp_path)
    runs = list(names['runs'])
    assert any('failed' in run for run in runs)
    assert any('interrupted' in run for run in runs)
    for function in ('numbers', 'reports'):
        names[function](runs)
    names['curves'](runs, 'loss')
    assert any('ValueError: broken' in str(one) for one in shown)
    assert 'nothing to compare' in capsys.readouterr().out


def test_explorer_without_any_run(tmp_path, capsys):
    names, shown = explorer(tmp_path / 'none', str(tmp_path / 'nothing'))
    names['curves']((), 'loss')
    names['numbers'](())
    names['parameters']((), True)
    names['reports'](())
    said = capsys.readouterr().out
    assert not names['runs'] and not shown
    assert 'no runs in' in said and 'choose runs' in said


def test_explorer_falls_back_to_the_gallery(tmp_path):
    assert len(explorer(tmp_path / 'none')[0]['runs']) >= 4


def test_explorer_runs_headless(tmp_path):
    "In a real kernel, where the widgets live: no cell fails and the widgets hold a figure."
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    notebook = nbformat.read(root / 'nbs/explore.ipynb', as_version=4)
    (cell,) = [cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', [])]
    cell.source += "\noutputs = 'outputs/gallery'"
    nbclient.NotebookClient(
        notebook,
        timeout=20,  # nbclient can overlook the answer to a cell with widgets until this has passed
        resources=dict(metadata=dict(path=str(root / 'nbs'))),
    ).execute()
    states = next(iter(notebook.metadata.widgets.values()))['state'].values()
    outputs = [
        output
        for state in states
        if state['model_name'] == 'OutputModel'
        for output in state['state'].get('outputs', [])
    ]
    kinds = [kind for output in outputs for kind in output.get('data', {})]
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert 'image/png' in kinds
    assert kinds.count('text/html') >= 3


# ---- commands

examples = {'params/finetune/mine.yaml', 'params/sweeps/ranks.yaml', 'params/sweeps/rates.yaml'}  # files the reader is told to write


def commands(text):
    "(command, whether it needs other hardware) of ```sh blocks and of backticks that begin with a program of ours."
    blocks = '\n'.join(re.findall(r'```sh\n(.*?)```', text, flags=re.DOTALL)).splitlines()
    prose = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    inline = [command.replace('&#124;', '|') for command in re.findall(r'`((?:llmft|make|papermill) [^`]+)`', prose)]
    for line in [*blocks, *inline]:
        command, _, note = line.partition('#')
        if command.strip():
            yield command.strip(), 'needs' in note


every = [(page, command, marked) for page, text in texts.items() for command, marked in commands(text)]


def test_commands_were_found():
    assert len(every) >= 90
    assert sum('llmft run' in command for _, command, _ in every) >= 60


@pytest.mark.parametrize('page', sorted({page for page, _, _ in every}))
def test_commands_are_real(page, tmp_path, monkeypatch):
    "Every command of a page is checked as far as it goes without running: files, parameters, targets, options."
    monkeypatch.chdir(root)
    targets = re.findall(r'^([\w-]+):', (root / 'Makefile').read_text(), flags=re.MULTILINE)
    for command in [command for where, command, _ in every if where == page]:
        words = [word for word in shlex.split(command) if not re.match(r'[A-Z_]+=', word)]
        if words[0] == 'make':
            assert all(word in targets for word in words[1:] if not word.startswith('-')), command
        if words[0] == 'papermill':
            assert all((root / word).exists() for word in words if word.startswith(('nbs/', 'params/'))), command
        if words[0] == 'llmft' and words[1] == 'params':
            assert (root / 'nbs/experiments' / f'{words[2]}.ipynb').exists() or words[2] == 'NOTEBOOK', command
        if words[0] == 'llmft' and words[1] in ('run', 'plan'):
            check_run(words[2:], command)
        if words[0] == 'llmft':
            assert words[1] in commands_there, command


def scale_in(words):
    "The scale that a command asks for."
    return next((scale for scale in scales if f'--{scale}' in words), '')


def check_run(words, command):
    "A call of llmft run is one that the command line would start."
    files = [
        word
        for before, word in zip(['', *words], words, strict=False)
        if not word.startswith('-')
        and before not in ('-p', '--workers', '--cluster', '--gpu', '>')
        and not word.endswith('.json')
    ]
    if not files or any('...' in file for file in files) or set(files) & examples:
        return  # a name in a sentence, or a file the reader writes
    overrides = [word for before, word in zip(['', *words], words, strict=False) if before == '-p']
    if '--cluster' in words:
        jobs_of(files, [], scale_in(words))
        return
    jobs = jobs_of(files, overrides, scale_in(words))
    assert jobs and all(stage for stages in jobs for stage in stages), command


def test_checks_of_commands_bite():
    for wrong in (
        'params/finetune/lroa.yaml',
        'params/finetune/lora.yaml -p lora_rnak=2',
        'params/finetune/lora.yaml -p lora_rank=x',
    ):
        with pytest.raises((LabError, AssertionError)):
            check_run(wrong.split(), wrong)


def test_files_that_pages_name_exist():
    named = {file for text in texts.values() for file in re.findall(r'params/[\w/]+\.yaml', text)} - examples
    lost = sorted(file for file in named if not (root / file).exists())
    assert len(named) > 25 and not lost, lost


def test_commands_of_other_hardware_say_so():
    "Full-scale commands in blocks carry the mark that they need a GPU; everything unmarked runs on two cores."
    allowed = (*(f'--{scale}' for scale in scales), 'needs', 'quickstart', 'mine.yaml', '_small.yaml')
    bare = []
    for page, text in texts.items():
        if page == 'README.md':
            continue
        blocks = '\n'.join(re.findall(r'```sh\n(.*?)```', text, flags=re.DOTALL))
        lines = re.sub(r'^(# needs .*)\n(.*)$', r'\2   \1', blocks, flags=re.MULTILINE).splitlines()
        full_scale = [line for line in lines if 'llmft run' in line and not any(word in line for word in allowed)]
        bare += [f'{page}: {line}' for line in full_scale]
    assert not bare, bare


def test_cheap_commands_run(tmp_path, monkeypatch, capsys):
    "llmft ls, llmft params, and a run on one's own texts, cut to two steps."
    monkeypatch.chdir(root)
    assert call(['ls']) == 0 and call(['params', 'finetune']) == 0
    assert 'lora_rank' in capsys.readouterr().out
    texts_folder = tmp_path / 'my_texts'
    texts_folder.mkdir()
    for number in range(24):
        (texts_folder / f'{number}.txt').write_text(
            f'Letter {number}. ' + f'The weather on day {number} was fine and the garden grew. ' * 6
        )
    arguments = shlex.split('run params/finetune/lora.yaml --small -p name=mine -p data=examples/my_texts')
    assert any(' '.join(arguments) in command for page, command, _ in every if page.endswith('get-started.qmd')), (
        'the guide shows another command'
    )
    arguments[-1] = f'data={texts_folder}'
    extra = [
        word
        for value in ('max_steps=2', 'sample_tokens=4', 'max_length=64', f'outputs={tmp_path}/outputs')
        for word in ('-p', value)
    ]
    assert call([*arguments, *extra]) == 0, capsys.readouterr()
    record = json.loads((tmp_path / 'outputs/finetune/mine/run.json').read_text())
    assert record['run']['status'] == 'done'
    assert record['meta']['notes']['train']['documents'] >= 15
    assert (tmp_path / 'outputs/finetune/mine/adapter').exists()


def test_python_blocks_are_python():
    blocks = [
        (page, block)
        for page, text in texts.items()
        for block in re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
    ]
    for _, block in blocks:
        ast.parse(re.sub(r'^[%!]', '#', block, flags=re.MULTILINE))
    assert len(blocks) >= 8


def test_python_blocks_run(monkeypatch):
    "The blocks that need neither a run nor Colab do what they say."
    monkeypatch.chdir(root)
    blocks = [
        block
        for text in texts.values()
        for block in re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
        if 'google' not in block and 'execute_run' not in block and not block.startswith('!')
        if 'write_text' not in block  # runs in a test of its own, in a folder of its own
    ]
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, 'guide', 'exec'), dict(run=SimpleNamespace(figure=take_picture)))
    assert any('run.figure(' in block for block in blocks)


# ---- the reproduction guide

studies = json.loads((Path(__file__).parent / 'studies.json').read_text(encoding='utf-8'))


def rows(page, *titles):
    "(reference, here) of the table rows below the headings that begin with one of `titles`."
    sections = re.split(r'^## ', texts[f'nbs/studies/{page}/index.qmd'], flags=re.MULTILINE)[1:]
    lines = [
        line
        for section in sections
        if section.startswith(titles)
        for line in section.splitlines()
        if line.startswith('|') and not re.match(r'\|( ---|\s*reference |\s*what )', line)
    ]
    return [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines]


@pytest.mark.parametrize(
    'kind, titles', [('commands', ('Commands',)), ('parameters', ('Parameters',)), ('outputs', ('Outputs',))]
)
@pytest.mark.parametrize('page', studies)
def test_every_item_of_a_study_has_its_row(page, kind, titles):
    table = rows(page, *titles)
    lost = [item for item in studies[page][kind] if not any(item in row[0] for row in table)]
    unanswered = [row for row in table if len(row) < 2 or not row[1].strip(' |')]
    assert not lost, f'{page} has no row for {lost}'
    assert not unanswered, f'rows without an answer: {unanswered}'


def test_answers_name_parameters_that_exist():
    "A cell of the parameter tables that begins with a name in backticks means a parameter of an experiment."
    from llmft.runs.params import read_parameters

    known = {p.name for path in root.glob('nbs/experiments/*.ipynb') for p in read_parameters(path)}
    named = {
        found[1]: page
        for page in studies
        for row in rows(page, 'Parameters')
        if (found := re.match(r'`([a-z_]+)(?::[^`]*)?`', row[1]))
    }
    assert len(named) > 40 and not set(named) - known, {name: page for name, page in named.items() if name not in known}


def test_counts_of_the_reproduction_guide():
    "How many rows there are at least, so that no table can vanish."
    least = {'Commands': 44, 'Parameters': 108, 'Outputs': 52, 'Results': 38, 'What the reference got wrong': 20}
    counted = {title: sum(len(rows(page, title)) for page in studies) for title in least}
    assert all(counted[title] >= count for title, count in least.items()), counted


@pytest.mark.parametrize('page', studies)
def test_commands_of_a_study_lead_to_a_folder(page):
    for row in rows(page, 'Commands'):
        for file in re.findall(r'llmft run (params/[\w/]+\.yaml)', row[1]):
            assert (root / file).exists(), f'{row[1]}: there is no {file}'
    assert any('llmft run' in row[1] for row in rows(page, 'Commands'))
    text = texts[f'nbs/studies/{page}/index.qmd']
    assert '**Hardware.**' in text and '**Time.**' in text and 'not measured' in text


@pytest.mark.skipif(
    'LLMFT_STUDIES' not in os.environ,
    reason='LLMFT_STUDIES does not name the folder with the five documents of the studies',
)
@pytest.mark.parametrize('page', studies)
def test_the_documents_name_nothing_else(page):
    "Every script, option and file that a document names is in the list above, and so has a row."
    folder = Path(os.environ['LLMFT_STUDIES'])
    document = next(folder.glob(studies[page]['document'] + '*')).read_text(encoding='utf-8', errors='replace')
    listed = ' '.join(item for kind in ('commands', 'parameters', 'outputs') for item in studies[page][kind])
    known = listed + texts[f'nbs/studies/{page}/index.qmd']

    block = re.compile(r'```(?:bash|python)?\n(.*?)```|code-block:: bash\n\n((?:      .*\n|\n)+)', flags=re.DOTALL)
    code = '\n'.join(fenced or indented for fenced, indented in block.findall(document))
    options = re.findall(r'(?<![\w-])--[a-z][\w.-]*\w', code)
    scripts = re.findall(r'[\w./]+\.(?:py|sh|bat)\b', code)
    files = re.findall(r'[\w./]+\.(?:png|csv|tex|npy|pt)\b', document)

    named = {*options, *(Path(file).name for file in [*scripts, *files])}
    left = sorted(name for name in named if name not in known)
    assert not left, left
    if page != 'code':  # a document without commands
        assert named
