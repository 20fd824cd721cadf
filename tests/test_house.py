"""The house rules of CONTRIBUTING.md, each with a count of what was looked at, so that no rule passes because it found nothing."""

import ast, configparser, filecmp, functools, importlib, io, itertools, json, os, re, shlex, shutil, socket, subprocess, sys, time, tokenize
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
from house import experiments, library
configs = sorted(
    path
    for path in (root / 'params').glob('*/*.yaml')
    if path.parent.name != 'sweeps' and not path.name.startswith('_')
)
sweeps = sorted((root / 'params/sweeps').glob('[!_]*.yaml'))
by_name = dict(ids=lambda path: path.stem if path.suffix == '.ipynb' else f'{path.parent.name}/{path.name}')
each_library, each_experiment = (
    pytest.mark.parametrize('path', library, **by_name),
    pytest.mark.parametrize('path', experiments, **by_name),
)


def test_counts():
    "Every rule below runs over all files of its kind; this is how many there must be at least."
    found = dict(library=len(library), experiments=len(experiments), configs=len(configs), sweeps=len(sweeps))
    least = dict(library=18, experiments=3, configs=6, sweeps=1)
    assert all(found[kind] >= least[kind] for kind in least), f'found {found}, expected at least {least}'


# ---- reading notebooks


@functools.cache
def cells(path):
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    return {
        line.split('|', 1)[1].split()[0].rstrip(':')
        for line in source(cell).splitlines()
        if re.match(r'#\s*\|\s*\w', line)
    }


def body(cell):
    return '\n'.join(line for line in source(cell).splitlines() if not re.match(r'#\s*\|', line))


def code(path, kind=None):
    "The code cells of the notebook at `path`: all, or those of a `kind`, export or lesson."
    found = [cell for cell in cells(path) if cell['cell_type'] == 'code']
    exporting = {'export', 'exports', 'exporti'}
    if kind == 'export':
        return [cell for cell in found if directives(cell) & exporting]
    if kind == 'lesson':
        return [
            cell
            for cell in found
            if not directives(cell) & (exporting | {'default_exp', 'hide'}) and body(cell).strip()
        ]
    return found


def number(path):
    return path.stem.split('_', 1)[0]


def module(path):
    return path.stem.split('_', 1)[1]


def only_imports(cell):
    "Whether `cell` holds imports only; `try: import ... except ImportError: ...` counts as one."

    def is_import(node):
        return (
            isinstance(node, (ast.Import, ast.ImportFrom))
            or isinstance(node, ast.Try)
            and all(map(is_import, node.body))
        )

    return all(map(is_import, ast.parse(plain(body(cell))).body))


def plain(text):
    "`text` with IPython magics and shell lines turned into comments, so that it parses."
    return re.sub(r'^(\s*)([%!])', r'\1pass #\2', text, flags=re.MULTILINE)


def comments(text):
    "Line number -> comment, for every line of the Python `text` that carries one."
    return {
        token.start[0]: token.string.lstrip('# ')
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }


def exported_lines(path):
    return [line for cell in code(path, 'export') for line in body(cell).splitlines() if line.strip()]


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


# ---- library notebooks


@each_library
def test_module_has_one_name_and_a_promise(path):
    first = code(path)[0]
    assert directives(first) == {'default_exp'}, 'the first code cell is `#| default_exp name` alone'
    name = re.search(r'default_exp\s+(\w+)', source(first))[1]
    assert module(path) == name, f'{path.name} exports the module {name}: give both one name'
    assert any(re.match(r'# \S.*\n+> \S', source(cell)) for cell in cells(path) if cell['cell_type'] == 'markdown'), (
        'a title `# name` with `> one-line promise` is missing'
    )


def siblings(path):
    "The modules of this package that the exported code of `path` imports, at any depth."
    found = set()
    for node in itertools.chain.from_iterable(ast.walk(ast.parse(body(cell))) for cell in code(path, 'export')):
        if isinstance(node, ast.Import):
            found |= {alias.name.split('.')[1] for alias in node.names if alias.name.startswith('llmft.')}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, 'import siblings as `from llmft.name import ...`'
            if node.module == 'llmft':
                found |= {alias.name for alias in node.names}
            elif (node.module or '').startswith('llmft.'):
                found.add(node.module.split('.')[1])
    return found


def test_modules_import_only_from_lower_floors():
    numbers, edges = {module(path): number(path) for path in library}, 0
    for path in library:
        for other in siblings(path) - {'__version__'}:
            edges += 1
            assert other in numbers, f'{path.name} imports llmft.{other}, which no notebook exports'
            assert numbers[other] < number(path), (
                f'{path.name} imports llmft.{other} from {numbers[other]}, which is not below it'
            )
    assert len(set(numbers.values())) == len(library), 'two notebooks share a number'
    assert edges >= len(library) - 1, f'only {edges} imports between modules were found'


@each_library
def test_exported_code_is_small(path):
    lines = exported_lines(path)
    assert lines, 'nothing is exported'
    assert len(lines) <= 400, f'{len(lines)} exported lines: a module has 400 at most, split it'
    for function in functions(ast.parse('\n'.join(body(cell) for cell in code(path, 'export')))):
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f'{function.name} has {length} lines: 60 at most, and better 10'


@each_library
def test_lessons_outweigh_exports(path):
    exports, lessons = [cell for cell in code(path, 'export') if not only_imports(cell)], code(path, 'lesson')
    assert len(lessons) > len(exports), (
        f'{len(lessons)} lesson cells for {len(exports)} export cells: show what each export does'
    )
    words = sum(len(re.findall(r'\w+', source(cell))) for cell in cells(path) if cell['cell_type'] == 'markdown')
    assert words >= 1.5 * len(exported_lines(path)), (
        f'{words} words of prose for {len(exported_lines(path))} exported lines: 1.5 a line at least'
    )


@each_library
def test_imports_have_cells_of_their_own(path):
    importing = 0
    for cell in code(path):
        tree = ast.parse(plain(body(cell)))
        exported = directives(cell) & {'export', 'exports', 'exporti'}
        nodes = tree.body if exported else ast.walk(tree)
        if not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes) or 'nbdev_export()' in source(
            cell
        ):
            continue
        importing += 1
        assert only_imports(cell), f'imports and other code in one cell; the docs would run it:\n{source(cell)}'
    assert importing, 'no cell imports anything'


def undocumented(function, notes):
    "What is missing in the docments of `function`, whose source has the comments `notes`."
    if not ast.get_docstring(function):
        yield f'{function.name} has no docstring'
    spec = function.args
    named = [
        arg
        for arg in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg]
        if arg and arg.arg not in ('self', 'cls', '_')
    ]
    if len(named) < 2:
        return
    if bare := [arg.arg for arg in named if not notes.get(arg.end_lineno)]:
        yield f'{function.name}: no comment (meaning, shape, unit) after {", ".join(bare)}'
    if len({arg.lineno for arg in named}) < len(named):
        yield f'{function.name}: one parameter per line'


@each_library
def test_public_functions_are_documented(path):
    seen, wrong = 0, []
    for cell in code(path, 'export'):
        if 'exporti' in directives(cell):
            continue
        for node in ast.parse(body(cell)).body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith('_'):
                continue
            seen += 1
            if isinstance(node, ast.ClassDef):
                wrong += [] if ast.get_docstring(node) else [f'{node.name} has no docstring']
            else:
                wrong += undocumented(node, comments(body(cell)))
    assert not wrong, '\n'.join(wrong)
    assert seen, 'nothing public is exported'


@each_library
def test_last_cell_exports(path):
    last = cells(path)[-1]
    assert last['cell_type'] == 'code' and 'hide' in directives(last) and 'nbdev.nbdev_export()' in source(last), (
        'end with the hidden cell `import nbdev; nbdev.nbdev_export()`'
    )


# ---- experiment notebooks

types = {'int', 'float', 'str', 'bool', 'list[int]', 'list[float]', 'list[str]'}


@each_experiment
def test_parameters_are_literals_with_comments(path):
    tagged = [cell for cell in cells(path) if 'parameters' in cell['metadata'].get('tags', [])]
    assert len(tagged) == 1 and tagged[0]['cell_type'] == 'code', (
        f'{len(tagged)} cells are tagged `parameters`: exactly one code cell must be'
    )
    text = body(tagged[0])
    notes, names = comments(text), {}
    for node in ast.parse(text).body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None, (
            f'line {node.lineno}: write `name: type = value  # meaning, unit`'
        )
        name, annotation = node.target.id, ast.unparse(node.annotation)
        assert annotation in types, f'{name}: {annotation} is not one of {sorted(types)}'
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            pytest.fail(f'{name}: {ast.unparse(node.value)} is no literal; derive values in the next cell')
        assert type(value).__name__ == annotation.split('[')[0], f'{name}: the default {value!r} is no {annotation}'
        assert notes.get(node.lineno), f'{name}: the comment (meaning, unit) is missing'
        names[name] = value
    assert len(names) >= 3 and names.get('outputs') == 'outputs' and 'name' in names, (
        'every experiment has `name` and `outputs: str = "outputs"`'
    )


@each_experiment
def test_experiment_is_short_and_has_no_outputs(path):
    assert len(code(path)) >= 4
    for cell in code(path):
        assert not cell['outputs'], f'outputs are left in:\n{source(cell)[:200]}'
        if 'parameters' in cell['metadata'].get('tags', []):
            continue
        assert len(source(cell).splitlines()) <= 30, (
            f'{len(source(cell).splitlines())} lines in one cell: move code to the library\n{source(cell)[:200]}'
        )


@each_experiment
def test_experiment_opens_in_colab(path):
    texts = [source(cell) for cell in cells(path)]
    settings = house()
    link = f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/nbs/experiments/{path.name}"
    assert any('colab-badge.svg' in text and link in text for text in texts[:3]), (
        f'a Colab badge that leads to {link} is missing'
    )
    install = [cell for cell in code(path) if 'google.colab' in source(cell)]
    assert len(install) == 1, 'one install cell that asks whether `google.colab` is there is missing'
    for cell in code(path):
        unguarded = [line for line in source(cell).splitlines() if re.match(r'[!%]\s*pip|get_ipython', line)]
        assert not unguarded, f'outside Colab this must do nothing: {unguarded}'


# ---- what is generated is up to date


def house():
    "The settings of settings.ini."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


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
    assert tags == len(experiments), (
        f'{tags} cells tagged `parameters` after cleaning, for {len(experiments)} experiments'
    )


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
        for before, word in zip(words, words[1:]):
            if before == 'make' and not word.startswith('-'):
                assert word in targets, f'{command}: the Makefile has no {word}'
        paths = [word for word in words if re.match(r'(params|nbs|tests|tools)/', word)]
        for path in paths:
            assert (root / path).exists(), f'{command}: there is no {path}'
        if words[:2] == ['llmft', 'run'] and paths and 'sweeps' not in paths[0]:
            overrides = [word for flag, word in zip(words, words[1:]) if flag == '-p']
            importlib.import_module('llmft.runs.params').resolve_params(
                [root / path for path in paths], overrides, '--small' in words
            )
        seen += words[0] in ('make', 'llmft', 'papermill')
    assert seen >= 8, f'only {seen} commands were found'


# ---- parameter files


@pytest.mark.parametrize('small', [False, True], ids=['full', 'small'])
@pytest.mark.parametrize('path', configs, **by_name)
def test_config_fits_its_notebook(path, small):
    notebook, params = importlib.import_module('llmft.runs.params').resolve_params([path], [], small)
    assert Path(notebook).stem == path.parent.name and params['name'].startswith(path.stem)
    assert (path.parent / '_small.yaml').exists(), (
        'the folder has no _small.yaml, the overlay for machines without GPU and network'
    )


@pytest.mark.parametrize('path', [*configs, *sweeps], **by_name)
def test_config_says_what_it_is(path):
    head = list(itertools.takewhile(lambda line: line.startswith('#'), path.read_text(encoding='utf-8').splitlines()))
    assert len(head) >= 2 and f'llmft run {path.relative_to(root)}' in '\n'.join(head), (
        'begin with a comment: what, hardware, expected time, and the command `llmft run params/...`'
    )


@pytest.mark.parametrize('small', [False, True], ids=['full', 'small'])
@pytest.mark.parametrize('path', sweeps, **by_name)
def test_sweep_fits_its_notebooks(path, small):
    points = importlib.import_module('llmft.runs.sweeps').sweep_points(path, small)
    assert len(points) >= 2


# ---- the package


def median_seconds(text, times=5):
    "Median wall time of running Python `text` in a fresh process, without the interpreter's own start."

    def once(text):
        start = time.perf_counter()
        subprocess.run([sys.executable, '-c', text], check=True, cwd=root, capture_output=True)
        return time.perf_counter() - start

    return sorted(once(text) - once('pass') for _ in range(times))[times // 2]


@pytest.mark.serial
def test_import_is_quick():
    seconds = median_seconds('import llmft')
    assert seconds < 0.5, f'import llmft takes {seconds:.2f} s'


@pytest.mark.parametrize(
    'module', ['llmft', 'llmft.core', *(f'llmft.{module(path)}' for path in library if path.stem.startswith('5'))]
)
def test_import_stays_light(module):
    heavy = call(
        root, f'import sys, {module}; print(*(set(sys.modules) & {{"torch", "transformers", "peft", "datasets"}}))'
    ).split()
    assert not heavy, f'import {module} brings in {heavy}: import them inside the functions that need them'


def test_package_and_settings_agree():
    settings, project = house(), (root / 'pyproject.toml').read_text()
    first, last = (int(settings[key].split('.')[1]) for key in ('min_python', 'max_python'))
    assert f'requires-python = ">=3.{first},<3.{last + 1}"' in project, (
        'pyproject.toml and settings.ini disagree about the versions of Python'
    )
    assert settings['update_pyproject'] == 'False', 'nbdev_export would rewrite requires-python'
    assert f'(3, {first}) <= sys.version_info[:2] <= (3, {last})' in (root / 'tools/install.sh').read_text()
    versions = json.loads(re.search(r'python: (\[.*\])', (root / '.github/workflows/test.yaml').read_text())[1])
    assert versions == [f'3.{minor}' for minor in range(first, last + 1)]
    assert (
        settings['version'] in (root / 'llmft/__init__.py').read_text()
        and settings['version'] in (root / 'CHANGELOG.md').read_text()
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
        if path.parent == root / 'nbs' / 'studies':
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
