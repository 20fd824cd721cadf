"""For every test: no network, processes that do not fight for the cores, and tests that measure run alone."""

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
    'test_launch',
    'test_site',
    'test_study_experiments',
    'test_sweeps',
    'test_sublora',
    'test_pretend_cuda',
    'test_many_processes',
    'test_forecast_study',
    'test_experiments',
)  # a minute or more each


def pytest_collection_modifyitems(items):
    "Files that take minutes go first and notebooks, which are many and short, last: all processes end together."
    order = [*longest, *sorted({item.path.stem for item in items} - {*longest, 'test_notebooks'}), 'test_notebooks']
    items.sort(key=lambda item: order.index(item.path.stem))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "The tests of a file run in one process, which makes their fixtures once; notebooks share nothing and go anywhere."
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if 'test_notebooks.py::' in nodeid else super()._split_scope(nodeid)

    return Files(config, log) if config.getoption('dist') == 'loadfile' else None


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
