"""For pytest: `-p pretend_cuda.plugin`, with tests/ on PYTHONPATH, runs tests on the pretended device."""

from pretend_cuda import device

kept = device.install()


def pytest_report_header():
    "Say what the tests run on."
    return f'pretended CUDA device of capability {".".join(map(str, device.capability))}'
