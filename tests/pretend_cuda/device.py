"""A device that PyTorch takes for CUDA and that computes on the CPU: it is compiled, loaded and described here.

`install` comes before the first import of PyTorch. PRETEND_CAPABILITY is the compute capability, 9.0 when it is not set.
"""

import collections
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

source = Path(__file__).with_name('device.cpp')
capability = tuple(map(int, os.environ.get('PRETEND_CAPABILITY', '9.0').split('.')))
total_memory = 80 * 2**30  # bytes


def compiler():
    "The path of a C++ compiler, or `None`."
    return shutil.which(os.environ.get('CXX', 'g++'))


def _cache():
    "The folder of compiled libraries, outside the checkout."
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'llmft' / 'pretend_cuda'


def _compile(library):
    "Compile the source against the installed PyTorch: some ten seconds."
    torch = Path(importlib.util.find_spec('torch').origin).parent
    include = torch / 'include'
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / 'made.so'
        command = [compiler(), '-O1', '-std=c++20', '-fPIC', '-shared', '-w', source, '-o', made]
        command += [f'-I{include}', f'-I{include}/torch/csrc/api/include', f'-L{torch}/lib', f'-Wl,-rpath,{torch}/lib']
        subprocess.run([*command, '-ltorch', '-ltorch_cpu', '-lc10'], check=True)
        made.replace(library)


def built():
    "The compiled device for this source and this PyTorch; it is compiled the first time."
    version = importlib.metadata.version('torch')
    key = hashlib.sha256(f'{version} {sys.version_info[:2]} '.encode() + source.read_bytes()).hexdigest()[:16]
    library = _cache() / f'{key}.so'
    if not library.exists():
        _compile(library)
    return library


sdpa_log = collections.Counter()  # (kernel, dtype, masked, grouped) -> calls


def sdpa_kernel(query_BHTD, key_BHTD, masked, dtype):
    "The attention that CUDA would choose, by the rules of ATen/native/transformers/cuda/sdp_utils.cpp without cuDNN."
    grouped = query_BHTD.shape[-3] != key_BHTD.shape[-3]
    ampere = capability >= (8, 0)
    if dtype.itemsize == 2 and ampere and not masked and query_BHTD.shape[-1] <= 256:
        return 'flash'
    if not grouped and (ampere or str(dtype) != 'torch.bfloat16'):
        return 'efficient'
    return 'math'


def _watch_attention(torch):
    "Have every call of PyTorch's attention on the device noted in `sdpa_log`."
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, attn_mask=None, **options):
        if query.is_cuda:
            dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else query.dtype
            kernel = sdpa_kernel(query, key, attn_mask is not None, dtype)
            sdpa_log[kernel, str(dtype), attn_mask is not None, query.shape[-3] != key.shape[-3]] += 1
        return attend(query, key, value, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = noted


def _always(value):
    "A function of any arguments that returns `value`."
    return lambda *args, **settings: value


def _stand_in(torch):
    "The functions of torch.cuda that would ask the driver."
    books = torch.ops.pretend
    device = SimpleNamespace(
        name='Pretended GPU',
        total_memory=total_memory,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        gcnArchName='',
        uuid='GPU-0',
    )
    answers = dict(
        is_available=True,
        is_initialized=True,
        device_count=1,
        current_device=0,
        get_device_name=device.name,
        get_device_capability=capability,
        get_device_properties=device,
        get_arch_list=[f'sm_{capability[0]}{capability[1]}'],
        is_current_stream_capturing=False,
    )
    nothing = ('_lazy_init', 'synchronize', 'set_device', 'empty_cache', 'ipc_collect', 'manual_seed', 'manual_seed_all')
    functions = dict(
        memory_allocated=lambda *device: books.memory()[1],
        memory_reserved=lambda *device: books.memory()[1],
        max_memory_allocated=lambda *device: books.memory()[2],
        max_memory_reserved=lambda *device: books.memory()[2],
        reset_peak_memory_stats=lambda *device: books.forget_peak(),
        mem_get_info=lambda *device: (total_memory - books.memory()[1], total_memory),
        set_per_process_memory_fraction=lambda share, *device: books.set_limit(int(share * total_memory)),
        get_rng_state=lambda *device: torch.get_rng_state(),
        set_rng_state=_always(None),
        get_rng_state_all=lambda: [torch.get_rng_state()],
        set_rng_state_all=_always(None),
    )
    functions |= {name: _always(value) for name, value in answers.items()}
    functions |= {name: _always(None) for name in nothing}
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch.version.cuda = '13.0'
    torch._C._cuda_clearCublasWorkspaces = _always(None)


def _mixed_product(torch):
    "The product of 16-bit matrices with sums in float32, which a CPU does not have."

    def multiply(left, right, dtype, *, out):
        halves = left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)
        if dtype != out.dtype or not (dtype == left.dtype or halves and dtype == torch.float32):
            raise RuntimeError(f'no product of {left.dtype} and {right.dtype} in {dtype}')
        return out.copy_(left.float() @ right.float())

    library = torch.library.Library('aten', 'IMPL')
    library.impl('mm.dtype_out', multiply, 'CUDA')
    return library


def install():
    "Have PyTorch find the device; what must be kept alive is returned."
    if 'torch' in sys.modules:
        raise RuntimeError('the pretended device comes before the first import of PyTorch')
    ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
    import bitsandbytes  # noqa: F401  with the kernels of the CPU
    import torch

    _stand_in(torch)
    _watch_attention(torch)
    return _mixed_product(torch)


class Counts:
    "What a `with` block asked of the device: `kernels`, `blocks` of memory, `peak` bytes above those at the start."

    def __enter__(self):
        import torch

        self.books = torch.ops.pretend
        self.books.forget_peak()
        self.before = collections.Counter(self.books.launched())
        self.blocks, self.held, _ = self.books.memory()
        return self

    def __exit__(self, *error):
        self.kernels = collections.Counter(self.books.launched()) - self.before
        blocks, _, peak = self.books.memory()
        self.blocks = blocks - self.blocks
        self.peak = peak - self.held


_waiting = ('_local_scalar_dense', 'nonzero', 'equal', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive')


def _is_wait(name, tensors, out):
    "Whether the processor has to wait for the device before operation `name` can give it `out`."
    if name in _waiting:
        return True
    if name in ('index', 'index_put_', '_index_put_impl_'):
        return any(str(tensor.dtype) == 'torch.bool' for tensor in tensors[1:])
    return name in ('_to_copy', 'copy_') and getattr(out, 'device', None) is not None and out.device.type == 'cpu'


def watching_waits():
    "A `with` block whose `waits` counts (operation, file:line of the library) at which the processor waits."
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        waits = collections.Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            name = func._schema.name.split('::')[1]
            if any(tensor.is_cuda for tensor in tensors) and _is_wait(name, tensors, out):
                self.waits[name, _asking_line()] += 1
            return out

    mode = Waits()
    mode.waits = collections.Counter()
    return mode


def _asking_line():
    "The innermost line of the library that is being run, as file:number."
    library = str(source.parents[2] / 'llmft')
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(library)]
    return f'{Path(frames[-1].filename).name}:{frames[-1].lineno}' if frames else '?'
