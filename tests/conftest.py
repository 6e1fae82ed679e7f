import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter; it must be chosen before import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# pytest-xdist runs a worker per core: a pool of threads in each would only make them wait for one
# another. What a second thread changes is tested with the fixture below.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """Runs the test with two threads in torch's pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)
