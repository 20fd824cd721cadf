"Hostile programs: each is counted, none harms the machine or outlives its time."

import time
from pathlib import Path

import psutil
import pytest

from llmft.studies.code import sandbox
from llmft.studies.code.sandbox import guards, run_program, same_output

outside = Path(__file__).parent / 'llmft-outside.txt'
kernel = set(guards()) == {'landlock', 'seccomp'}
needs_kernel = pytest.mark.skipif(not kernel, reason=f'this kernel has only {guards()} of landlock and seccomp')


@pytest.fixture(params=['kernel', 'python'])
def guarded(request, monkeypatch):
    "The kernel's guards, and Python's own as on a machine without them."
    if request.param == 'kernel' and not kernel:
        pytest.skip('the kernel has no guards here')
    if request.param == 'python':
        monkeypatch.setattr(sandbox, 'guards', lambda: ())
    yield request.param
    assert not outside.exists(), 'a program wrote outside'


def test_a_good_program_passes(guarded):
    done = run_program(
        'import json, math, re, collections\nprint(math.comb(5, 2), input())\nopen("own.txt", "w").write("mine")\nprint(open("own.txt").read())',
        'x',
    )
    assert (done.status, done.stdout) == ('passed', '10 x\nmine\n'), done


@pytest.mark.parametrize(
    'program',
    [
        'import os\nwhile True: os.fork()',
        'import subprocess; subprocess.run(["true"])',
        'import os\nif os.system("true"): raise PermissionError',
        'import multiprocessing as m; p = m.Process(target=print); p.start(); p.join(); assert p.exitcode == 0',
        'import os; os.kill(os.getppid(), 9)',
        f'open({str(outside)!r}, "w")',
        f'import os; os.symlink({str(outside.parent)!r}, "here"); open("here/{outside.name}", "w").write("x")',
        f'import pathlib; pathlib.Path("../../../../..{outside}").write_text("x")',
        f'import os; os.mkdir({str(outside)!r})',
        f'import os; os.chmod({str(outside.parent)!r}, 0o777)',
        f'import os; os.unlink({__file__!r})',
        f'import shutil; shutil.rmtree({str(outside.parent)!r})',
        'import socket; socket.create_connection(("127.0.0.1", 9))',
        'import urllib.request; urllib.request.urlopen("http://127.0.0.1:9")',
        'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))',
        'import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))',
    ],
    ids=lambda program: program.replace('import ', '')[:30],
)
def test_what_it_has_no_business_with_is_refused(guarded, program):
    before = {path.name for path in outside.parent.iterdir()}
    done = run_program(program, seconds=5)
    assert done.status in ('failed', 'wrong') and any(
        word in done.stderr for word in ('PermissionError', 'BlockingIOError', 'not allowed', 'not permitted')
    ), done
    assert {path.name for path in outside.parent.iterdir()} == before


@needs_kernel
@pytest.mark.parametrize(
    'program',
    [
        'import ctypes; assert ctypes.CDLL(None).fork() >= 0',
        'import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0',
        f'import ctypes; libc = ctypes.CDLL(None); assert libc.open({str(outside)!r}.encode(), 0o101, 0o644) >= 0',
        'import ctypes; assert ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) == 0',
        'import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0',
        'import os; os.execv("/bin/true", ["true"])',
        'import ctypes; assert ctypes.CDLL(None).syscall(425, 8, b"\\0" * 120) >= 0',
    ],
)
def test_going_past_python_leads_nowhere(program):
    done = run_program(program, seconds=5)
    assert done.status == 'failed' and not outside.exists(), done


def test_a_loop_ends_and_leaves_no_process(guarded):
    start = time.monotonic()
    done = run_program(
        'import signal, time\nfor s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: time.sleep(1)',
        seconds=1,
    )
    assert done.status == 'timeout' and time.monotonic() - start < 8
    assert not [
        p
        for p in psutil.Process().children(recursive=True)
        if p.is_running() and p.status() != psutil.STATUS_ZOMBIE and 'sandbox' in ' '.join(p.cmdline())
    ]


def test_memory_output_and_files_have_limits(guarded):
    assert run_program('x = "x"\nwhile True: x += x', seconds=20, memory_mb=128).status == 'memory'
    printed = run_program('while True: print("x" * 10**6)', seconds=20, file_mb=1)
    assert printed.status == 'output' and len(printed.stdout) <= 2**16
    many = run_program('for n in range(10**9): open(str(n), "w").write("x" * 10**5)', seconds=30, file_mb=1)
    assert many.status == 'output', many
    assert run_program('import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()', seconds=2).status in (
        'failed',
        'killed',
        'memory',
        'timeout',
    )


@pytest.mark.parametrize(
    'program',
    [
        'import os; os._exit(0)',
        'import sys; sys.exit(0)',
        'exit()',
        'raise SystemExit',
        'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
        'x =',
    ],
)
def test_tests_that_never_ran_do_not_pass(program):
    assert run_program(program + '\nassert False\n', may_exit=False).status in ('failed', 'killed', 'timeout')
    assert run_program('import sys; print(1); sys.exit(0)').status == 'passed'


def test_the_directory_is_empty_and_gone_afterwards():
    done = run_program('import os; print(os.listdir("."), os.getcwd())')
    assert done.stdout.startswith('[]') and not Path(done.stdout.split()[-1]).parent.exists()
    assert run_program('import os; print(sorted(os.environ))').stdout.count('KEY') == 0


def test_outputs_are_compared_without_white_space_at_the_ends():
    assert same_output('1\n2 \n', '1\r\n2') and not same_output('12', '1\n2') and not same_output('', '0')


def test_exit_is_there_and_long_output_is_whole():
    assert run_program('print(1)\nexit()').status == run_program('quit()').status == 'passed'
    assert run_program('1/0\nexit()').status == 'failed'
    done = run_program('print("x" * 200_000)')
    assert done.status == 'passed' and same_output(done.stdout, 'x' * 200_000)


def test_a_deep_folder_is_found_and_removed():
    done = run_program('import os\nprint(os.getcwd(), flush=True)\nwhile True: os.mkdir("a"); os.chdir("a")', seconds=1)
    assert done.status in ('timeout', 'output', 'failed') and not Path(done.stdout.split()[0]).parent.exists()


@pytest.mark.skipif('seccomp' not in guards(), reason='no seccomp here')
@pytest.mark.parametrize(
    'call',
    [
        'fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())',
        'fcntl.fcntl(r, 10, 9)',
        'fcntl.fcntl(r, 15, b"\\1\\0\\0\\0" * 2)',
        'fcntl.ioctl(r, 0x8901, b"\\1\\0\\0\\0")',
        'fcntl.ioctl(r, 0x8902, b"\\1\\0\\0\\0")',
    ],
)
def test_no_descriptor_sends_signals_to_others(call):
    done = run_program(
        f'import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_GETFL)\ntry: {call}\nexcept PermissionError: print("refused")'
    )
    assert (done.status, done.stdout) == ('passed', 'refused\n'), done
