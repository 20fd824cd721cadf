"A sweep on a cluster: a dead worker costs one run its unsaved steps, and no two runs meet on one GPU."

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import test_sweeps
from house import write_experiment
from test_sweeps import common, outcomes, start, sweep

from llmft.core import LabError
from llmft.runs import workers
from llmft.runs.run import read_run
from llmft.runs.sweep_file import expand
from llmft.runs.sweeps import run_stages

project = test_sweeps.project  # the fixture
steps = '''
import os, signal, time
from pathlib import Path
done, saved = Path(f"done-{run.folder.name}"), run.folder/"checkpoint"
first = int(saved.read_text()) if saved.exists() else 0
for step in range(first + 1, 7):
    with done.open("a") as file: file.write(f"{step} ")
    saved.write_text(str(step))
    if seed == 1 and step == 3 and first == 0: os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)
'''
gpus = '''
import os, time
from pathlib import Path
Path(f"here-{seed}").touch()
for _ in range(300):
    if len(list(Path().glob("here-*"))) == 2: break
    time.sleep(.1)
run.finish(dict(gpu=os.environ.get("CUDA_VISIBLE_DEVICES", "")), "ok")
'''


def processes_of(folder, count, *arguments, environment=None):
    "A Dask scheduler and workers without nannies, as a user starts them on several machines."
    file = folder / 'scheduler.json'

    def command(kind, *rest):
        words = ['-m', f'distributed.cli.dask_{kind}', '--scheduler-file', str(file), '--no-dashboard', *rest]
        return subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | (environment or {}),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    started = [command('scheduler', '--host', '127.0.0.1', '--port', '0')]
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)
    started += [
        command('worker', '--nthreads', '1', '--no-nanny', '--host', '127.0.0.1', *arguments) for _ in range(count)
    ]
    return started, json.loads(file.read_text())['address']


def end(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def test_a_killed_worker_process_loses_nothing_and_does_nothing_twice(project, tmp_path_factory):
    write_experiment(
        'act', common + 'seed: int = 0  # which', start.format('act'), steps, 'run.finish(dict(first=first), "ok")'
    )
    started, address = processes_of(tmp_path_factory.mktemp('cluster'), 2)
    try:
        heard = []
        results = run_stages(
            expand(sweep('name: s\nstages:\n  - notebook: act\n    name: p-{seed}\n    matrix: {seed: [1, 2, 3]}\n')),
            on_line=heard.append,
            cluster=address,
        )
        assert outcomes(results) == {'p-1': 'done', 'p-2': 'done', 'p-3': 'done'}
        assert sum(process.poll() is not None for process in started) == 1, 'one worker was killed'
    finally:
        end(started)
    assert {seed: Path(f'done-p-{seed}').read_text() for seed in (1, 2, 3)} == dict.fromkeys((1, 2, 3), '1 2 3 4 5 6 ')
    assert (
        json.loads(Path('outputs/act/p-1/metrics.json').read_text())['first'] == 3
        and read_run('outputs/act/p-1')['run']['resumed']
    )
    assert Counter(line for line in heard if 'done in' in line.partition('] ')[2]).total() == 3 and any(
        'continues after its worker died' in line for line in heard
    )


def test_runs_do_not_meet_on_a_gpu(project, tmp_path_factory):
    write_experiment('act', common + 'seed: int = 0  # which', start.format('act'), gpus)
    folder = tmp_path_factory.mktemp('cluster')
    started, address = processes_of(
        folder, 2, '--resources', 'GPU=1', environment=dict(CUDA_VISIBLE_DEVICES='6,7', TMPDIR=str(folder))
    )
    try:
        results = run_stages(
            expand(sweep('name: s\nstages:\n  - notebook: act\n    name: p-{seed}\n    matrix: {seed: [1, 2]}\n')),
            on_line=lambda line: None,
            cluster=address,
        )
    finally:
        end(started)
    assert set(outcomes(results).values()) == {'done'}
    assert {json.loads(Path(f'outputs/act/p-{seed}/metrics.json').read_text())['gpu'] for seed in (1, 2)} == {'6', '7'}


def test_a_slot_is_held_until_its_process_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1')
    holder = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'import time\nfrom llmft.runs.workers import gpu_slots\n'
            f'with gpu_slots(1, {str(tmp_path)!r}) as e:\n print(e, flush=True)\n time.sleep(60)',
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "'0'" in holder.stdout.readline()
    with workers.gpu_slots(1, tmp_path) as second:
        assert second == dict(CUDA_VISIBLE_DEVICES='1')
    holder.kill()
    holder.wait()
    with workers.gpu_slots(2, tmp_path) as both:
        assert both == dict(CUDA_VISIBLE_DEVICES='0,1')


def test_the_job_that_slurm_gets():
    job = pytest.importorskip('dask_jobqueue.slurm').SLURMJob
    settings, left = workers.cluster_settings(
        'slurm', ['queue=gpu', 'account=lab', 'cores=8', 'memory=64GB', 'walltime=12:00:00', 'learning_rate=1e-3']
    )
    script = job(scheduler='tcp://10.0.0.1:8786', name='w0', **workers.slurm_options(settings)).job_script()
    for line in (
        '#SBATCH -p gpu',
        '#SBATCH -A lab',
        '#SBATCH --cpus-per-task=8',
        '#SBATCH --mem=60G',
        '#SBATCH -t 12:00:00',
        '#SBATCH --gres=gpu:1',
        '#SBATCH -J llmft',
        'export OMP_NUM_THREADS=8',
    ):
        assert line in script.splitlines(), script
    worker = script.strip().splitlines()[-1]
    assert (
        'tcp://10.0.0.1:8786' in worker
        and '--nthreads 1' in worker
        and worker.endswith('--resources GPU=1')
        and left == ['learning_rate=1e-3']
    )
    without = job(
        scheduler='tcp://10.0.0.1:8786',
        name='w0',
        **workers.slurm_options(workers.cluster_settings('slurm', ['gpus=0'])[0]),
    ).job_script()
    assert 'gres' not in without and 'GPU' not in without and '#SBATCH -p' not in without


def test_what_cannot_be_meant_is_said_before_work(project, monkeypatch):
    monkeypatch.setattr(workers, 'patience', 1)
    stages = expand(sweep('name: s\nstages:\n  - notebook: act\n'))
    with pytest.raises(LabError, match='give slurm, or the address'):
        run_stages(stages, cluster='here')
    with pytest.raises(LabError, match='no Dask scheduler answers'):
        run_stages(stages, cluster='tcp://127.0.0.1:9')
    with pytest.raises(LabError, match='whole number'):
        workers.cluster_settings('slurm', ['cores=many'])
    assert not Path('outputs').exists()
