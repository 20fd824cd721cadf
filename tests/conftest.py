"""For every test: no network, two processes that do not fight for the cores, and tests that measure run alone."""

import fcntl
import importlib.util
import os
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

# A shell that runs its jobs in the background makes them deaf to Ctrl-C, and so everything they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

offline = Path(__file__).parent / 'offline'
spec = importlib.util.spec_from_file_location('offline', offline / 'sitecustomize.py')
spec.loader.exec_module(importlib.util.module_from_spec(spec))

refused = Path(tempfile.mkdtemp(prefix='llmft-')) / 'refused'
paths = [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path and path != str(offline)]
os.environ.update(
    PYTHONPATH=os.pathsep.join([str(offline), *paths]),
    LLMFT_REFUSED=str(refused),
    HF_HUB_OFFLINE='1',
    TOKENIZERS_PARALLELISM='false',
    MPLBACKEND='agg',
    WANDB_SILENT='true',
    CUDA_VISIBLE_DEVICES='',  # what is promised to the last bit is promised for a CPU
    TORCHDYNAMO_DISABLE='1',
)  # bitsandbytes then does not import the compiler, a second in each of 150 processes
worker = os.environ.get('PYTEST_XDIST_WORKER')
if worker:
    os.environ.setdefault('OMP_NUM_THREADS', '1')


@contextmanager
def held(file, how):
    "Hold a lock on `file`, shared or exclusive."
    with file.open('a') as handle:
        fcntl.flock(handle, how)
        yield


longest = (
    'test_notebooks',
    'test_launch',
    'test_site',
    'test_sweeps',
    'test_sublora',
    'test_experiments',
    'test_forecast_study',
    'test_study_experiments',
)  # minutes each


def pytest_collection_modifyitems(items):
    "The files that take minutes go first, so that both processes end at about the same time."
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    "A test marked `serial` waits until no other test runs, and holds all others back; whoever waits first goes first."
    if not worker:
        return (yield)
    folder = item.config._tmp_path_factory.getbasetemp().parent
    exclusive = item.get_closest_marker('serial')
    gate = (folder / 'gate').open('a')
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        with held(folder / 'floor', fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH):
            if not exclusive:
                fcntl.flock(gate, fcntl.LOCK_UN)
            return (yield)
    finally:
        gate.close()


@pytest.fixture(autouse=True)
def nothing_phones_home():
    "Fail a test during which anything tried to leave this machine, even where the error was swallowed."
    before = refused.read_text() if refused.exists() else ''
    yield
    tried = (refused.read_text() if refused.exists() else '')[len(before) :]
    assert not tried, f'the network was asked for: {tried}'
