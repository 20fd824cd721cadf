"""A device that PyTorch takes for CUDA and that computes on the CPU: it is compiled, loaded and described here.

`install` comes before the first import of PyTorch. PRETEND_CAPABILITY is the compute capability, 9.0 when it is not set.
"""

import collections
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import itertools
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


sdpa_log = collections.Counter()  # (kernel, dtype, masked, grouped) -> calls; 'varlen' is one call for all documents


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


def _score_pieces(query_THD, key_TGD, edges, back):
    "(slice of the row, scores (heads, T, T) of its own document, -inf where a token does not look) of each document."
    import torch

    for start, end in itertools.pairwise(edges):
        query_HTD, key_HTD = query_THD[start:end].transpose(0, 1), key_TGD[start:end].transpose(0, 1)
        away_TT = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden_TT = (away_TT < 0) | (away_TT > back if back >= 0 else False)
        yield slice(start, end), (query_HTD @ key_HTD.transpose(1, 2)).masked_fill(hidden_TT, float('-inf'))


def _flash_inputs(tensors, edges, dropout, scale, window):
    "What a flash attention over documents is given, in float32 in main memory, after the checks of the real one."
    query_THD, key_TGD = tensors[:2]
    halves = {str(tensor.dtype) for tensor in tensors} in ({'torch.bfloat16'}, {'torch.float16'})
    if capability < (8, 0) or not halves or query_THD.shape[-1] % 8 or dropout:
        raise RuntimeError(f'no flash attention for {[(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]}')
    if str(edges.dtype) != 'torch.int32' or not edges.is_cuda or int(edges[-1]) != len(query_THD) or window[1] != 0:
        raise RuntimeError('documents of a flash attention are wrong')
    groups = query_THD.shape[1] // key_TGD.shape[1]
    query, key, value = (tensor.cpu().float() for tensor in tensors)
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    return query * (scale or query.shape[-1] ** -0.5), key, value, edges.tolist(), groups


def _flash_forward(query, key, value, edges, edges_k, longest, longest_k, dropout, causal, debug, **options):
    "Attention over documents as `aten::_flash_attention_forward` gives it."
    import torch

    window = options['window_size_left'], options['window_size_right']
    read = _flash_inputs((query, key, value), edges, dropout, options.get('scale'), window)
    scaled_THD, key_THD, value_THD, places, groups = read
    sdpa_log['varlen', str(query.dtype), False, groups > 1] += 1

    out_THD = torch.empty_like(scaled_THD)
    sums_HT = torch.empty(scaled_THD.shape[1], len(scaled_THD))
    for rows, scores_HTT in _score_pieces(scaled_THD, key_THD, places, window[0]):
        out_THD[rows] = (scores_HTT.softmax(-1) @ value_THD[rows].transpose(0, 1)).transpose(0, 1)
        sums_HT[:, rows] = scores_HTT.logsumexp(-1)
    nothing = torch.empty(0, device=query.device)
    return out_THD.to(query.dtype).to(query.device), sums_HT.to(query.device), nothing, nothing.clone(), nothing.clone()


def _flash_backward(grad, query, key, value, out, sums, edges, edges_k, longest, longest_k, *rest, **options):
    "Its gradients as `aten::_flash_attention_backward` gives them."
    import torch

    window = options['window_size_left'], options['window_size_right']
    read = _flash_inputs((query, key, value), edges, 0.0, options.get('scale'), window)
    scaled_THD, key_THD, value_THD, places, groups = read
    grad_THD, sums_HT = grad.cpu().float(), sums.cpu()
    dots_HT = (grad_THD * out.cpu().float()).sum(-1).t()

    slopes = [torch.empty_like(scaled_THD) for _ in range(3)]
    for rows, scores_HTT in _score_pieces(scaled_THD, key_THD, places, window[0]):
        parts = (tensor[rows].transpose(0, 1) for tensor in (scaled_THD, key_THD, value_THD, grad_THD))
        query_HTD, key_HTD, value_HTD, grad_HTD = parts
        weights_HTT = (scores_HTT - sums_HT[:, rows, None]).exp()
        slope_HTT = weights_HTT * (grad_HTD @ value_HTD.transpose(1, 2) - dots_HT[:, rows, None])
        found = slope_HTT @ key_HTD, slope_HTT.transpose(1, 2) @ query_HTD, weights_HTT.transpose(1, 2) @ grad_HTD
        for slope, part in zip(slopes, found, strict=True):
            slope[rows] = part.transpose(0, 1)

    slopes[0] *= options.get('scale') or query.shape[-1] ** -0.5
    slopes[1:] = [slope.unflatten(1, (-1, groups)).sum(2) for slope in slopes[1:]]
    return tuple(slope.to(query.dtype).to(query.device) for slope in slopes)


def _graphs(torch):
    "CUDA graphs: what was launched while one was recorded is launched again over the same memory, without the program."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Graph:
        def __init__(self):
            self.calls = []

        @torch.inference_mode()
        def replay(self):
            for func, args, kwargs, results in self.calls:
                for result, fresh in zip(results, _tensors_in(torch, func(*args, **kwargs)), strict=True):
                    if result.data_ptr() != fresh.data_ptr():
                        result.copy_(fresh)

    class Recording(TorchDispatchMode):
        def __init__(self, graph, **options):
            super().__init__()
            self.graph = graph

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.split('::')[1]
            if _is_wait(name, _tensors_in(torch, (args, kwargs)), out):
                raise RuntimeError(f'operation not permitted when stream is capturing: {name}')
            self.graph.calls.append((func, args, kwargs or {}, _tensors_in(torch, out)))
            return out

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, Recording


def _tensors_in(torch, values):
    "The tensors in nested lists and dictionaries."
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _flash_attention(torch):
    "Flash attention over documents, forward and backward, which a CPU does not have."
    torch.backends.cuda.is_flash_attention_available = _always(True)
    library = torch.library.Library('aten', 'IMPL')
    library.impl('_flash_attention_forward', _flash_forward, 'CUDA')
    library.impl('_flash_attention_backward', _flash_backward, 'CUDA')
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
    _graphs(torch)
    return _mixed_product(torch), _flash_attention(torch)


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
