"""The suite that depends on the device, on a pretended GPU of each generation; see tests/pretend_cuda."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pretend_cuda import device

tests = Path(__file__).parent
pytestmark = pytest.mark.skipif(not device.compiler(), reason='no C++ compiler to build the pretended GPU with')

# Files, and what of them is left out, with the reason.
files = ('losses', 'models', 'methods', 'adapters', 'generation', 'training', 'largest_batch')
left_out = {
    'other processes have no such GPU': 'process or kill or undisturbed or straight or resume or every_step_once',
    'time and main memory are those of a CPU': 'faster or memory or peak_of or does_not_grow or take_the_machine '
    'or counts_the_moments',
    'the compiler does not know the device': 'compiled',
    'slow': 'greedy or k_bit or shipped or texts_end or packed_batch or draw_is or schedule_reaches or flop_budget',
    'kernels of bitsandbytes are those of a GPU': 'nf4 or int8 or 8bit',
    'parameters of the device cannot be deepcopied': 'merg',
    'an operation has no kernel under this key': 'without_formulas',
    'the network': 'hub or network or offline or import',
}
deselected = ' or '.join(left_out.values())
everything = [*(f'test_{name}.py' for name in files), '-k', f'not ({deselected})']
without_bf16 = [*everything[:-1], f'not ({deselected} or (bf16 and (read_back or folder)))']  # before Ampere


def pretended(capability, arguments):
    "Run pytest on a GPU of this capability; (exit status, what it said, tests that passed)."
    env = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST_')}
    env |= dict(PRETEND_CAPABILITY=capability, OMP_NUM_THREADS='1')
    env['PYTHONPATH'] = os.pathsep.join([str(tests), str(tests.parent), env.get('PYTHONPATH', '')])
    plugins = ['-p', 'pretend_cuda.plugin', '-p', 'no:xdist', '-p', 'no:cacheprovider']
    command = [sys.executable, '-m', 'pytest', '-q', *plugins, *arguments]
    done = subprocess.run(command, cwd=tests, env=env, capture_output=True, text=True)
    passed = re.search(r'(\d+) passed', done.stdout)
    return done.returncode, done.stdout[-4000:] + done.stderr[-2000:], int(passed[1]) if passed else 0


@pytest.mark.parametrize(
    'capability, arguments, least',
    [('9.0', everything, 220), ('8.0', everything, 220), ('7.5', without_bf16, 210)],
    ids=['9.0', '8.0', '7.5'],
)
def test_the_suite_passes_on_a_pretended_gpu(capability, arguments, least):
    status, said, passed = pretended(capability, arguments)
    print(f'capability {capability}: {passed} tests passed')
    assert status == 0, said
    assert passed >= least, said


@pytest.mark.parametrize('capability', ['9.0', '8.0', '7.5'])
def test_what_was_written_for_a_pretended_gpu_passes_on_it(capability):
    status, said, passed = pretended(capability, ['pretend_cuda/checks.py'])
    print(f'capability {capability}: {passed} tests passed')
    assert status == 0, said
    assert passed >= 50, said


priced_steps = {
    'an adapter': 'model: preset:llama-tiny\nprecision: bf16\nlora_rank: 4\nlora_dropout: 0.0\nlora_targets: [q_proj]\n',
    'branches on a frozen GPT-2': 'model: random\nlayers: 2\nheads: 2\nwidth: 64\nmax_length: 64\nlora_rank: 4\n'
    'lora_alpha: 32.0\nlora_dropout: 0.0\nlora_targets: [q_proj, lm_head]\nmixed_precision: bf16\n',
}


@pytest.mark.parametrize('step', priced_steps.values(), ids=priced_steps)
def test_prices_of_a_step_do_not_grow_with_the_documents(step, tmp_path):
    "As many kernels for 16 documents as for 2; an adapter's are so small that their least time is all that counts."
    params = tmp_path / 'tiny.yaml'
    params.write_text(step)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tests), str(tests.parent)]))
    found = []
    for lengths in ('32x2', '4x16'):
        command = [sys.executable, '-m', 'pretend_cuda.prices', params, '--lengths', lengths]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert [each['documents'] for each in found] == [2, 16] and found[0]['tokens'] == found[1]['tokens'] == 64
    assert 100 < found[0]['kernels'] == found[1]['kernels'] < 400
    assert step.startswith('model: random') or abs(found[0]['milliseconds'] - 2.5e-3 * found[0]['kernels']) < 0.1


def test_lessons_run_on_a_machine_with_a_gpu():
    "Lessons on models, training and inference; those that ask for more than is pretended are named in lessons.py."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(tests), str(tests.parent)]), OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'pretend_cuda.lessons']
    done = subprocess.run(command, cwd=tests.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count('- Completed') >= 30
