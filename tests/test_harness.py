"""The tests' own machinery: tests that measure run alone, and an attempt to reach the network fails a test even when it is swallowed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

here = Path(__file__).parent
timed = '''
import json, time, pytest
from pathlib import Path
@pytest.mark.parametrize('alone', [False, pytest.param(True, marks=pytest.mark.serial)])
@pytest.mark.parametrize('i', range(6))
def test_sleeps(i, alone):
    start = time.time()
    time.sleep(.05 if alone else .1 + .03 * i)
    Path(f'{i}-{alone}.json').write_text(json.dumps([alone, start, time.time()]))
'''
swallowed = '''
import socket, subprocess, sys
def attempt():
    try: socket.create_connection(("example.org", 80), 1)
    except OSError: pass
def test_here(): attempt()
def test_in_a_process():
    subprocess.run([sys.executable, "-c", "import socket\\ntry: socket.getaddrinfo('example.org', 80)\\nexcept OSError: pass"], check=True)
def test_nothing(): pass
'''


where = '''
import os, pytest
from pathlib import Path
@pytest.mark.parametrize('i', range(6))
def test_tells(i): Path(f'{Path(__file__).stem}-{i}.worker').write_text(os.environ['PYTEST_XDIST_WORKER'])
'''


def pytest_in(folder, text, *options):
    "Run the tests of `text` in `folder` under this folder's conftest.py."
    (folder / 'offline').mkdir()
    for name in ('conftest.py', 'offline/sitecustomize.py'):
        shutil.copy(here / name, folder / name)
    (folder / 'pytest.ini').write_text('[pytest]\nmarkers = serial\n')
    (folder / 'test_it.py').write_text(text)
    return subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', *options, 'test_it.py'],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_serial_tests_run_alone(tmp_path):
    done = pytest_in(tmp_path, timed, '-n', '2')
    assert '12 passed' in done.stdout, done.stdout
    spans = [json.loads(path.read_text()) for path in tmp_path.glob('*.json')]
    overlaps = [
        (one[0], two[0]) for one in spans for two in spans if one is not two and one[1] < two[2] and two[1] < one[2]
    ]
    assert (False, False) in overlaps, 'ordinary tests should run side by side'
    assert not any(True in pair for pair in overlaps), 'a serial test ran beside another one'


def test_a_file_stays_in_one_process_and_notebooks_go_anywhere(tmp_path):
    (tmp_path / 'test_notebooks.py').write_text(where)
    done = pytest_in(tmp_path, where, '-n', '3', '--dist', 'loadfile', '--no-loadscope-reorder', 'test_notebooks.py')
    assert '12 passed' in done.stdout, done.stdout
    workers = {
        name: {path.read_text() for path in tmp_path.glob(f'{name}-*.worker')} for name in ('test_it', 'test_notebooks')
    }
    assert len(workers['test_it']) == 1, 'the fixtures of a file would be made again in each process'
    assert len(workers['test_notebooks']) >= 2, 'one process would run all notebooks'


def test_swallowed_attempts_fail(tmp_path):
    done = pytest_in(tmp_path, swallowed)
    assert '3 passed, 2 errors' in done.stdout and 'the network was asked for: lookup of example.org' in done.stdout, (
        done.stdout
    )
