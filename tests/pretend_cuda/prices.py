"""What a micro-batch costs a GPU at least, by its data sheet: the library's own step on tensors without numbers.

    PYTHONPATH=tests:. python -m pretend_cuda.prices params/finetune/lora.yaml --lengths 512x4 --gpu h100

A product takes 75% of the GPU's peak, traffic 85% of its bandwidth, a kernel 2.5 microseconds at least. The optimiser
and the processor are not counted, so the share of the peak is an upper bound.
"""

import argparse
import collections
import json
import math

from pretend_cuda import device

gpus = dict(
    h100=dict(half=989e12, single=67e12, bandwidth=3.35e12, capability=(9, 0)),
    a100=dict(half=312e12, single=19.5e12, bandwidth=2.04e12, capability=(8, 0)),
)
least = 2.5e-6  # seconds of a kernel
views = {
    'view', '_unsafe_view', 'as_strided', 'transpose', 't', 'expand', 'permute', 'slice', 'select', 'unsqueeze',
    'squeeze', 'detach', 'alias', 'split', 'split_with_sizes', 'unbind', '_reshape_alias', 'diagonal', 'lift_fresh',
    'empty', 'empty_strided', 'empty_like', 'new_empty', 'new_empty_strided', 'set_', 'device', 'unflatten',
}  # fmt: skip
gathering = {'embedding', 'index', 'gather', 'index_select'}  # read what they give, not the table
attention = {'flash': (4, 1), '_varlen_attn': (4, 1), 'flash_backward': (10, 3), '_varlen_attn_backward': (10, 3)}


def bytes_of(tensor):
    "Bytes of the distinct numbers of a tensor."
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


class Prices:
    "Prices of operations on one GPU, and what they add up to."

    def __init__(self, gpu, pairs):
        self.gpu = gpu
        self.pairs = pairs  # of tokens that attention compares in one head, in all documents
        self.seconds = collections.Counter()
        self.kernels = collections.Counter()

    def operations(self, name, tensors):
        "(FLOPs with tiles of 64 filled up, kernels) of an operation."
        if name in ('mm', 'addmm'):
            left, right = tensors[:2] if name == 'mm' else tensors[1:3]
            rows, columns = (64 * math.ceil(size / 64) for size in (left.shape[0], right.shape[1]))
            return 2 * rows * left.shape[1] * columns, 1
        if name == 'bmm':
            return 2 * math.prod(tensors[0].shape) * tensors[1].shape[2], 1
        if name not in attention:
            return 0, 1
        per_pair, kernels = attention[name]
        heads, width = tensors[0].shape[-2 if name.startswith('_') else -3], tensors[0].shape[-1]
        return per_pair * self.pairs(tensors[0]) * heads * width, kernels

    def add(self, name, inputs, outputs):
        "Take an operation into account."
        flops, kernels = self.operations(name, inputs)
        distinct = {id(tensor): tensor for tensor in (*inputs, *outputs)}.values()
        size = sum(map(bytes_of, distinct))
        if name in gathering:
            size = 2 * sum(map(bytes_of, outputs))
        if name in ('index_put_', '_index_put_impl_'):
            size = 2 * bytes_of(inputs[-1])
        if name == '_softmax':
            size += 2 * bytes_of(inputs[0])  # it reads three times

        half = inputs and inputs[0].element_size() == 2
        peak = 0.75 * self.gpu['half'] if half else 0.85 * self.gpu['single']
        self.seconds[name] += max(least * kernels, flops / peak, size / (0.85 * self.gpu['bandwidth']))
        self.kernels[name] += kernels


def one_operation(torch, library, name, count):
    "A function of `count` tensors that is one operation without numbers, and one in the backward pass."
    tensors = ', '.join(f'Tensor t{place}' for place in range(count))
    library.define(f'{name}({tensors}) -> Tensor')
    library.define(f'{name}_backward(Tensor slope, {tensors}) -> Tensor[]')
    library.impl(name, lambda first, *rest: torch.empty_like(first), 'Meta')
    library.impl(f'{name}_backward', lambda slope, *tensors: list(map(torch.empty_like, tensors)), 'Meta')
    operations = torch.ops.prices

    class Operation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return getattr(operations, name)(*tensors)

        @staticmethod
        def backward(ctx, slope):
            return tuple(getattr(operations, f'{name}_backward')(slope, *ctx.saved_tensors))

    return Operation.apply


def stand_in_attention(torch, library):
    "PyTorch's attention as two operations without numbers, forward and backward."
    flash = one_operation(torch, library, 'flash', 3)

    def attend(query, key, value, **options):
        if torch.is_autocast_enabled('cuda'):
            query, key, value = (tensor.to(torch.get_autocast_dtype('cuda')) for tensor in (query, key, value))
        return flash(query, key, value)

    torch.nn.functional.scaled_dot_product_attention = attend
    products = torch.library.Library('aten', 'IMPL')
    products.impl('mm.dtype_out', lambda left, right, dtype, *, out: out, 'Meta')
    return products


def stand_in_activations(torch, library):
    "RMSNorm and SiLU as CUDA has them, one operation forward and one backward: a CPU build takes them apart."
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    from llmft.models import norms

    for kind in (LlamaRMSNorm, Qwen2RMSNorm):
        norms.is_plain_norm(kind)  # tried on numbers, which there are none of later
    norm = one_operation(torch, library, 'rms_norm', 2)
    silu = one_operation(torch, library, 'silu', 1)
    norms.rms_norm = lambda inputs, shape, weight, epsilon: norm(inputs, weight)
    torch.nn.functional.silu = lambda inputs, inplace=False: silu(inputs)


def stand_ins(torch):
    "What a CPU build lacks of CUDA's operations, in place; what has to be kept alive."
    library = torch.library.Library('prices', 'FRAGMENT')
    stand_in_activations(torch, library)
    return library, stand_in_attention(torch, library)


def watching(torch, prices):
    "A `with` block in which every operation on the GPU is priced."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.split('::')[1]
            inputs, outputs = (device._tensors_in(torch, values) for values in ((args, kwargs), out))
            if name not in views and any(tensor.is_cuda for tensor in (*inputs, *outputs)):
                prices.add(name, inputs, outputs)
            return out

    return Watching()


def the_branches(torch, params):
    "(the frozen GPT-2 of a parameter file with low-rank branches that train, its method), without numbers."
    from llmft.models import low_rank
    from llmft.models.methods import Method

    low_rank._initial_weights = lambda name, shape, *rest: torch.empty(shape)
    low_rank._initial_factor = lambda label, rank, inputs: torch.empty(rank, inputs)
    net = low_rank.frozen_gpt2(params['layers'], params['heads'], params['width'], params['max_length'])
    branches = params['lora_targets'], params['lora_rank'], params['lora_alpha'], params['lora_dropout']
    for factor in low_rank.add_low_rank(net, *branches).values():
        factor.requires_grad_(True)
    return net, Method.of(net)


def the_model(torch, params):
    "(the model of a parameter file with random weights that are not there, its method)."
    if params['model'] == 'random':
        return the_branches(torch, params)
    from transformers import AutoModelForCausalLM

    from llmft.models.adapters import add_lora
    from llmft.models.load import model_config, precisions
    from llmft.models.methods import Method
    from llmft.models.norms import fuse_norms

    precision = params.get('precision', 'fp32')
    config = model_config(params['model'])
    dtype = precisions[precision].dtype
    net = fuse_norms(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation='documents'))
    if params.get('method', 'lora') == 'full':
        return net, Method(precision=precision)
    lora = params['lora_rank'], params.get('lora_alpha', 16.0), params['lora_dropout'], params['lora_targets']
    rank, alpha, dropout, targets = lora
    return add_lora(net, *lora, seed=0), Method('lora', rank, alpha, dropout, tuple(targets), precision=precision)


def priced(params, lengths, gpu):
    "What forward and backward of one micro-batch of documents of `lengths` cost: a dictionary of numbers."
    kept = device.install()
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept = kept, stand_ins(torch)
    from peft.tuners.tuners_utils import BaseTunerLayer

    from llmft.data.batches import MicroBatch
    from llmft.models import load
    from llmft.models.cost import flops_step
    from llmft.training.step import LossModel, set_gradient_checkpointing

    BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda *args, **options: None
    torch.nn.Module.to = lambda self, *args, **options: self  # everything is made where it belongs
    load.check_rows = lambda *args, **options: None  # there are no numbers to try
    tokens = sum(lengths)
    again = params.get('gradient_checkpointing', False)
    mixed = params.get('mixed_precision', 'no') == 'bf16'

    def pairs(query):
        "Pairs of tokens in the documents that one call attends to."
        if query.dim() == 3:
            return sum(length**2 for length in lengths) / 2
        return query.shape[0] * query.shape[2] ** 2 / 2

    prices = Prices(gpus[gpu], pairs)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
        net, method = the_model(torch, params)
        set_gradient_checkpointing(net, again)
        model = LossModel(net, in_bfloat16=mixed).train()
        ids_BT = torch.zeros(1, tokens, dtype=torch.long)
        batch = MicroBatch(ids_BT, ids_BT.clone(), ids_BT.clone(), lengths, tokens, tokens)
        # in a thread of its own the backward pass may outlive the interpreter, which aborts the process
        with watching(torch, prices), torch.autograd.set_multithreading_enabled(False):
            model(batch).backward()

    useful = flops_step(net.config, lengths, method, gradient_checkpointing=again)
    seconds = sum(prices.seconds.values())
    dearest = {name: round(1e3 * spent, 1) for name, spent in prices.seconds.most_common(8)}
    return dict(gpu=gpu, tokens=tokens, documents=len(lengths), kernels=sum(prices.kernels.values()),
                milliseconds=round(1e3 * seconds, 1), share_of_peak=round(useful / seconds / gpus[gpu]['half'], 3),
                milliseconds_by_operation=dearest)  # fmt: skip


def main():
    "Print the prices of one parameter file as JSON."
    import yaml

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('params', help='a YAML of params/')
    parser.add_argument('--lengths', default='512x4', help='tokens of each document: 512x4, or 600,520,410')
    parser.add_argument('--gpu', default='h100', choices=gpus)
    asked = parser.parse_args()

    length, _, count = asked.lengths.partition('x')
    lengths = [int(length)] * int(count) if count else [int(length) for length in asked.lengths.split(',')]
    with open(asked.params) as file:
        print(json.dumps(priced(yaml.safe_load(file), lengths, asked.gpu)))


if __name__ == '__main__':
    main()
