"""What is generated is up to date, what the README promises is there, parameter files fit their notebooks, and the package holds what it needs."""

import copy
import filecmp
import functools
import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
from house import cells, experiments, exported_module, library, processor_seconds, root, settings

configs = sorted(
    path
    for path in (root / 'params').glob('*/*.yaml')
    if path.parent.name != 'sweeps' and not path.name.startswith('_')
)
sweeps = sorted((root / 'params/sweeps').glob('[!_]*.yaml'))
by_name = dict(ids=lambda path: f'{path.parent.name}/{path.name}')


def test_counts():
    "Every test below runs over all files of its kind; this is how many there must be at least."
    assert len(configs) >= 60 and len(sweeps) >= 5, f'{len(configs)} parameter files and {len(sweeps)} sweeps'


# ---- what is generated is up to date


def copy_of_project(folder, *parts):
    "A copy of settings.ini and of the notebooks, and of `parts`, in `folder`."
    shutil.copy(root / 'settings.ini', folder)
    for path in [*(root / 'nbs').rglob('*.ipynb'), *itertools.chain.from_iterable(root.glob(part) for part in parts)]:
        place = folder / path.relative_to(root)
        if any(part.startswith('.') for part in path.relative_to(root).parts):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


def call(folder, text):
    "Run Python `text` in `folder`, by this Python."
    done = subprocess.run([sys.executable, '-c', text], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_export_is_in_sync(tmp_path):
    copy_of_project(tmp_path, 'llmft/__init__.py')
    call(tmp_path, 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    made, kept = (
        {path.relative_to(base / 'llmft') for path in (base / 'llmft').rglob('*.py')} for base in (tmp_path, root)
    )
    assert len(made) >= len(library) + 2
    assert not kept - made, f'no notebook exports llmft/{sorted(map(str, kept - made))}: delete it'
    changed = [
        str(path)
        for path in sorted(made)
        if not (root / 'llmft' / path).exists()
        or not filecmp.cmp(tmp_path / 'llmft' / path, root / 'llmft' / path, shallow=False)
    ]
    assert not changed, (
        f'llmft/ is not what the notebooks export ({", ".join(changed)}): run nbdev_export, and never edit llmft/*.py'
    )


def test_notebooks_are_clean_and_cleaning_keeps_the_parameters_tag(tmp_path):
    copy_of_project(tmp_path)
    notebooks = sorted((tmp_path / 'nbs').rglob('*.ipynb'))
    assert len(notebooks) >= len(library) + len(experiments) + 1
    call(tmp_path, 'from nbdev.clean import nbdev_clean; nbdev_clean()')
    dirty = [
        str(path.relative_to(tmp_path))
        for path in notebooks
        if path.read_bytes() != (root / path.relative_to(tmp_path)).read_bytes()
    ]
    assert not dirty, f'not clean: {", ".join(dirty)}: run nbdev_clean'
    for path in notebooks:
        notebook = json.loads(path.read_text(encoding='utf-8'))
        for count, cell in enumerate(cell for cell in notebook['cells'] if cell['cell_type'] == 'code'):
            cell['execution_count'], cell['metadata'] = count, {**cell['metadata'], 'scrolled': True}
        path.write_text(json.dumps(notebook), encoding='utf-8')
    for _ in range(2):
        call(tmp_path, 'from nbdev.clean import nbdev_clean; nbdev_clean()')
        assert all(path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes() for path in notebooks), (
            'cleaning a dirty notebook does not give the clean one'
        )
    tags = sum('parameters' in cell['metadata'].get('tags', []) for path in notebooks for cell in cells(path))
    assert tags == len(experiments) + 1, (
        f'{tags} cells tagged `parameters` after cleaning, for {len(experiments)} experiments and the explorer'
    )


@pytest.mark.parametrize('name', ['nbs/experiments/finetune.ipynb', 'nbs/explore.ipynb'])
def test_running_an_experiment_in_lab_leaves_git_clean(name):
    "As `make lab` saves it: outputs, counts, and what was folded away are no change."
    saved = types.SimpleNamespace(ContentsManager=types.SimpleNamespace())
    runpy.run_path(str(root / 'tools/lab/jupyter_server_config.py'), dict(get_config=lambda: saved))
    committed = json.loads((root / name).read_text(encoding='utf-8'))

    notebook = copy.deepcopy(committed)
    notebook['metadata']['language_info'] = dict(name='python', version='3.12.1')
    for count, cell in enumerate(cell for cell in notebook['cells'] if cell['cell_type'] == 'code'):
        cell['outputs'] = [dict(output_type='stream', name='stdout', text='done')]
        cell['metadata'] |= dict(scrolled=True, collapsed=True)
        cell['metadata'].setdefault('jupyter', {})['outputs_hidden'] = True
        cell['execution_count'] = count
    saved.ContentsManager.pre_save_hook(model=dict(type='notebook', content=notebook), path=f'/{name}')
    assert notebook == committed


def test_lab_begins_with_settings_that_exist():
    "No question about news, long lines wrapped: each setting of tools/lab is one that Lab has."
    folder = Path(re.search(r'app_settings_dir=(\S+)', (root / 'Makefile').read_text())[1])
    settings = json.loads((root / folder / 'overrides.json').read_text())
    schemas = Path(sys.prefix) / 'share/jupyter/lab/schemas'
    assert settings['@jupyterlab/apputils-extension:notification']['fetchNews'] == 'false'
    for name, values in settings.items():
        package, plugin = name.split(':')
        schema = json.loads((schemas / package / f'{plugin}.json').read_text())
        assert set(values) <= set(schema['properties']), name


def test_readme_is_in_sync():
    done = subprocess.run(
        [sys.executable, 'tools/readme.py', '--check'], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- the README promises nothing that is not there


def readme_commands():
    "The commands that README.md and CONTRIBUTING.md show, from fenced blocks and from tables and sentences in backticks."
    text = ''.join((root / name).read_text(encoding='utf-8') for name in ('README.md', 'CONTRIBUTING.md'))
    blocks = '\n'.join(re.findall(r'```sh\n(.*?)```', text, flags=re.DOTALL)).splitlines()
    inline = re.findall(r'`((?:make|llmft|papermill) [^`]+)`', text)
    return [line.split('   #')[0].strip() for line in [*blocks, *inline] if line.strip()]


def test_readme_links_and_commands_are_real():
    links = re.findall(
        r'\]\(([^)#]+?)\)',
        ''.join((root / name).read_text(encoding='utf-8') for name in ('README.md', 'CONTRIBUTING.md')),
    )
    missing = [link for link in links if not re.match(r'[a-z]+:', link) and not (root / link).exists()]
    assert len(links) >= 5 and not missing, f'README.md leads to what is not there: {missing}'
    targets, seen = re.findall(r'^([\w-]+):', (root / 'Makefile').read_text(), flags=re.MULTILINE), 0
    for command in readme_commands():
        words = shlex.split(command)
        for before, word in zip(words, words[1:], strict=False):
            if before == 'make' and not word.startswith('-'):
                assert word in targets, f'{command}: the Makefile has no {word}'
        paths = [word for word in words if re.match(r'(params|nbs|tests|tools)/', word)]
        for path in paths:
            assert (root / path).exists(), f'{command}: there is no {path}'
        if words[:2] == ['llmft', 'run'] and paths and 'sweeps' not in paths[0]:
            overrides = [word for flag, word in zip(words, words[1:], strict=False) if flag == '-p']
            importlib.import_module('llmft.runs.params').resolve_params(
                [root / path for path in paths], overrides, 'small' if '--small' in words else ''
            )
        seen += words[0] in ('make', 'llmft', 'papermill')
    assert seen >= 8, f'only {seen} commands were found'


# ---- parameter files


@pytest.mark.parametrize('scale', ['', 'small'], ids=['full', 'small'])
@pytest.mark.parametrize('path', configs, **by_name)
def test_config_fits_its_notebook(path, scale):
    notebook, params = importlib.import_module('llmft.runs.params').resolve_params([path], [], scale)
    assert Path(notebook).stem == path.parent.name and params['name'].startswith(path.stem)
    assert (path.parent / '_small.yaml').exists(), (
        'the folder has no _small.yaml, the overlay for machines without GPU and network'
    )


laptops = sorted((root / 'params').glob('*/_laptop.yaml'))


def test_laptop_overlays_fit_every_config_beside_them():
    resolve_params = importlib.import_module('llmft.runs.params').resolve_params
    beside = [path for overlay in laptops for path in configs if path.parent == overlay.parent]
    for path in beside:
        notebook, params = resolve_params([path], scale='laptop')
        assert Path(notebook).stem == path.parent.name and params.get('model', 'smollm2') == 'smollm2', path
    assert len(laptops) >= 3 and len(beside) >= 6


@pytest.mark.parametrize('path', [*configs, *sweeps], **by_name)
def test_config_says_what_it_is(path):
    head = list(itertools.takewhile(lambda line: line.startswith('#'), path.read_text(encoding='utf-8').splitlines()))
    assert len(head) >= 2 and f'llmft run {path.relative_to(root)}' in '\n'.join(head), (
        'begin with a comment: what, hardware, expected time, and the command `llmft run params/...`'
    )


@pytest.mark.parametrize('scale', ['', 'small'], ids=['full', 'small'])
@pytest.mark.parametrize('path', sweeps, **by_name)
def test_sweep_fits_its_notebooks(path, scale):
    points = importlib.import_module('llmft.runs.sweep_file').sweep_points(path, scale)
    assert len(points) >= 2


# ---- from a number to its formula


def steps_of_walks():
    "Number -> the places of its walk as (path of a notebook below nbs, the names that its cell says to look for)."
    section = (root / 'CONTRIBUTING.md').read_text(encoding='utf-8').split('## From a number of a report')[1]
    walks = {}
    for line in section.split('\n## ')[0].splitlines():
        if line.startswith('| ') and not line.startswith(('| number', '| ---')):
            number, *places = line.strip('| ').split(' | ')
            quoted = [re.findall('`([^`]+)`', place) for place in places]
            walks[number] = [(place, names) for place, *names in filter(None, quoted)]
    return walks


def source_of(place):
    "The code of the notebook that a walk calls `place`: an experiment, or package/name."
    [path] = [
        path for path in [*library, *experiments] if (exported_module(path) or path.stem).replace('.', '/') == place
    ]
    return '\n'.join(''.join(cell['source']) for cell in cells(path) if cell['cell_type'] == 'code')


def test_walks_to_formulas_lead_from_file_to_file():
    "Each place of a walk has the names it is visited for, and names something that the next place defines."
    walks = steps_of_walks()
    assert len(walks) >= 4 and all(2 <= len(places) <= 3 for places in walks.values())
    for number, places in walks.items():
        texts = [source_of(place) for place, _ in places]
        for (place, names), text in zip(places, texts, strict=True):
            words = {word for name in names for word in re.findall(r'[A-Za-z_][\w.]*', name)}
            lost = [word for word in words if not re.search(rf'\b{re.escape(word)}\b', text)]
            assert words and not lost, f'{number}: {place} has no {lost}'
        for here, there in itertools.pairwise(texts):
            defined = re.findall(r'^ *def (\w+)', there, re.MULTILINE)
            assert any(re.search(rf'\b{name}\(', here) for name in defined), f'{number}: a step leads nowhere'


# ---- the package


def test_import_is_quick():
    "By the median of what it takes beyond the interpreter's own start."
    seconds = statistics.median(
        processor_seconds('-c', 'import llmft') - processor_seconds('-c', 'pass') for _ in range(5)
    )
    assert seconds < 0.5, f'import llmft takes {seconds:.2f} s'


light = [exported_module(path) for path in library if exported_module(path).split('.')[0] in ('core', 'runs', 'cli')]


@pytest.mark.parametrize('module', ['llmft', *(f'llmft.{name}' for name in light)])
def test_import_stays_light(module):
    heavy = call(
        root, f'import sys, {module}; print(*(set(sys.modules) & {{"torch", "transformers", "peft", "datasets"}}))'
    ).split()
    assert not heavy, f'import {module} brings in {heavy}: import them inside the functions that need them'


def test_package_and_settings_agree():
    package, project = settings(), (root / 'pyproject.toml').read_text()
    first, last = (int(package[key].split('.')[1]) for key in ('min_python', 'max_python'))
    assert f'requires-python = ">=3.{first},<3.{last + 1}"' in project, (
        'pyproject.toml and settings.ini disagree about the versions of Python'
    )
    assert package['update_pyproject'] == 'False', 'nbdev_export would rewrite requires-python'
    assert f'(3, {first}) <= sys.version_info[:2] <= (3, {last})' in (root / 'tools/install.sh').read_text()
    versions = json.loads(re.search(r'python: (\[.*\])', (root / '.github/workflows/test.yaml').read_text())[1])
    assert versions == [f'3.{minor}' for minor in range(first, last + 1)]
    assert (
        package['version'] in (root / 'llmft/__init__.py').read_text()
        and package['version'] in (root / 'CHANGELOG.md').read_text()
    )


def test_assets_are_packaged():
    "Everything under llmft/assets is in what `pip install .` builds."
    assets = {path.relative_to(root).as_posix() for path in (root / 'llmft/assets').rglob('*') if path.is_file()}
    assert len(assets) >= 2, 'llmft/assets holds no model'
    packed = call(
        root,
        """
import setuptools, distutils.core
command = distutils.core.run_setup('setup.py', stop_after='init').get_command_obj('build_py')
command.finalize_options()
print(*(f'{folder}/{name}' for _, folder, _, names in command.data_files for name in names), sep='\\n')""",
    ).splitlines()
    assert assets <= set(packed), f'not packaged: {sorted(assets - set(packed))}'


# ---- what is in the repository


@functools.cache
def repository():
    "The files that are tracked, or would be by `git add`."
    names = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split('\0')
    return [path for path in sorted({root / name for name in names if name}) if path.is_file()]


def test_no_file_names_a_machine():
    place, looked = re.compile('(?<![\\w.~:/])/(?:' + 'root|home|Users|work|opt' + r')/[\w.]'), 0
    for path in repository():
        if path.name == 'index.qmd' and path.parent.parent == root / 'nbs' / 'studies':
            continue  # these quote the commands of the references to the letter
        try:
            text = path.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue
        looked += 1
        lines = [
            f'{path.relative_to(root)}:{number}: {line.strip()[:120]}'
            for number, line in enumerate(text.splitlines(), 1)
            if place.search(line)
        ]
        assert not lines, 'a path that exists on one machine only:\n' + '\n'.join(lines)
    assert looked >= 30


def test_no_file_is_big():
    assert len(repository()) >= 30
    big = {str(path.relative_to(root)): path.stat().st_size for path in repository() if path.stat().st_size > 8.5e6}
    assert not big, f'above 8.5 MB: {big}'


def test_the_network_is_refused():
    "The guard of tests/offline works here and in processes that tests start."
    text = 'import socket\nfor f in (lambda: socket.create_connection(("93.184.216.34", 80), 1), lambda: socket.getaddrinfo("example.org", 80)):\n try: f()\n except OSError as e: print(e)'
    assert call(root, text).count('tests may not use the network') == 2
    with pytest.raises(OSError, match='may not use'):
        socket.create_connection(('example.org', 80), 1)
    with socket.create_server(('127.0.0.1', 0)) as server:
        socket.create_connection(server.getsockname(), 5).close()
    note = Path(os.environ['LLMFT_REFUSED'])
    assert len(note.read_text().splitlines()) >= 3
    note.unlink()


def test_findings_have_a_status_and_a_command():
    "LOG.md: each finding says whether it holds and how it was found; files that commands name are there."
    text = (root / 'LOG.md').read_text(encoding='utf-8')
    findings = re.split(r'^### ', text, flags=re.MULTILINE)[1:]
    assert len(findings) >= 35
    for finding in findings:
        title, body = finding.split('\n', 1)
        assert re.search(r'^Status: (kept|failed|superseded)\b', body, re.MULTILINE), f'{title}: a status is missing'
        assert re.search(r'^Status: .*\.$', body, re.MULTILINE), f'{title}: the status ends without a full stop'
        assert re.search(r'^Command: \S', body, re.MULTILINE), f'{title}: the command is missing'
    titles = '\n'.join(finding.split('\n', 1)[0] for finding in findings)
    later = re.findall(r'[Ss]uperseded [^".]*by "([^"]+)"', text)
    assert len(later) >= 15 and not [name for name in later if not re.search(f'^{re.escape(name)}', titles, re.MULTILINE)]
    assert not re.findall(r'^\|.*\| *\|', text, re.MULTILINE), 'an empty cell of a table'
    assert not re.findall(r'\d\^-?\d', text), 'a power with a caret'
    prose = [part for part in re.split(r'\n\s*\n|\n(?=- )', text) if not part.startswith('|')]
    assert not [part[:60] for part in prose if len(part.split()) > 120], 'a paragraph of more than 120 words'
    lost = [name for name in re.findall(r'\bparams/[\w/]+\.yaml', text) if not (root / name).exists()]
    assert not lost, f'LOG.md names files that are not there: {lost}'
