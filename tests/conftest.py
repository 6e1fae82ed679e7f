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


#: Interpreted Triton takes a hundred times as long as a kernel. Of each test's cases on it, this
#: many run, spread evenly; test_triton*.py are about these kernels and choose their own sizes.
INTERPRETED_CASES = 4


def pytest_addoption(parser):
    parser.addoption(
        "--all-interpreted", action="store_true", help="run every case on interpreted Triton"
    )

    parser.addoption(
        "--full-size", action="store_true", help="run cases past 2^31 elements at their full size"
    )


@pytest.fixture
def full_size(request):
    """For tests of 10 s and more, or of more than 2 GB, whose rule a smaller one holds always."""
    if not request.config.getoption("--full-size"):
        pytest.skip("7 to 95 s on two cores, up to 6 GB; --full-size runs it")


def pytest_configure(config):
    """Builds simt before xdist's workers want it."""
    import simt

    if "PYTEST_XDIST_WORKER" not in os.environ and not simt.missing():
        try:
            simt.build()
        except AssertionError as error:
            pytest.exit(f"csrc/simt does not build:\n{error}", returncode=1)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all-interpreted") or os.environ.get("TRITON_INTERPRET") != "1":
        return
    cases = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("on") == "triton":
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = set()
    for group in cases.values():
        kept = {len(group) * i // INTERPRETED_CASES for i in range(INTERPRETED_CASES)}
        dropped.update(item for i, item in enumerate(group) if i not in kept)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))
