"""Every Python process that has this folder first on its PYTHONPATH finds the pretended GPU, and no network."""

import runpy
import sys
from pathlib import Path

tests = Path(__file__).resolve().parents[2]
runpy.run_path(str(tests / 'offline' / 'sitecustomize.py'))
sys.path.append(str(tests))

from pretend_cuda import device  # noqa: E402

kept = device.install()
