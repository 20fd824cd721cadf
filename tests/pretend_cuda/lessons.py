"""Lessons on the pretended GPU, each in a copy of one process: `python -m pretend_cuda.lessons NOTEBOOK...`

What the pretended device cannot do (quantised kernels, copies of storage, PyTorch's profiler) is left to a real one.
"""

import os
import sys
from pathlib import Path

from pretend_cuda import device

nbs = Path(__file__).resolve().parents[2] / 'nbs'
beyond = {  # lesson -> what it asks of a GPU
    'models/03_adapters': 'a storage that is copied', 'models/07_precisions': 'int4', 'models/09_meter': 'the profiler',
    'models/15_lora_products': 'a storage that is copied', 'training/12_profiling': 'the profiler',
    'inference/01_decoder': 'int4', 'inference/05_quality': 'int4',
}  # fmt: skip


def lessons():
    "Names of the lessons on models, training and inference that the pretended GPU can run."
    found = [path for folder in ('models', 'training', 'inference') for path in sorted((nbs / folder).glob('*.ipynb'))]
    names = [path.relative_to(nbs).with_suffix('').as_posix() for path in found]
    return [name for name in names if name not in beyond]


def run(name):
    "Run one lesson in this process and end it; the exit status says whether it went well."
    from nbdev.test import nbdev_test

    status = 0
    try:
        nbdev_test.__wrapped__(path=str(nbs / f'{name}.ipynb'), flags='gpu', n_workers=0, do_print=True)
    except SystemExit:
        status = 1
    sys.stdout.flush()  # the end that follows leaves what is buffered behind
    os._exit(status)


def main(names):
    "Run lessons one after the other; the names of those that failed."
    kept = device.install()
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    failed = []
    for name in names:
        child = os.fork()
        if not child:
            run(name)
        if os.waitpid(child, 0)[1]:
            failed.append(name)
    del kept
    return failed


if __name__ == '__main__':
    failed = main(sys.argv[1:] or lessons())
    print('failed:', *failed)
    sys.exit(len(failed) > 0)
