import contextlib
import json
import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter; it must be chosen before import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import card
import launches
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):
        from fasttransformer._interpreter import round_as_devices

        round_as_devices()

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
#: many run, spread evenly; test_triton*.py are about these kernels and choose their own sizes. On a
#: GPU, where each case may have to be compiled, the others come last.
INTERPRETED_CASES = 4


#: Files of few and long tests. They come first, so that no worker is left with them at the end.
LONG = (
    "test_cpu_isa.py", "test_summaries.py", "test_training.py", "test_applications.py",
    "test_cli.py", "test_packaging.py", "test_swap_minilm.py", "test_processes.py",
    "test_sizes_of_zero.py", "test_benchmarks.py", "test_verify.py", "test_cuda_build.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true",
        help="leave nothing out: every case on interpreted Triton, every CUDA file compiled anew, "
        "every lower instruction set",
    )  # fmt: skip
    parser.addoption(
        "--full-size", action="store_true", help="run cases past 2^31 elements at their full size"
    )
    parser.addoption(
        "--card", metavar="NAME", help="simt has this card's limits: sm_80, sm_86 or sm_90"
    )
    parser.addoption(
        "--rehearse-card", action="store_true", help="simt by way of card.py, as on a GPU"
    )
    parser.addoption(
        "--results", metavar="FILE", help="write a line of JSON for each test as it ends"
    )


@pytest.fixture
def full_size(request):
    """For tests of 10 s and more, or of more than 2 GB, whose rule a smaller one holds always."""
    if not request.config.getoption("--full-size"):
        pytest.skip("7 to 95 s on two cores, up to 6 GB; --full-size runs it")


def pytest_configure(config):
    """Builds simt before xdist's workers want it."""
    import simt

    config.addinivalue_line("markers", "gpu: runs a kernel on the GPU where there is one")
    config.addinivalue_line(
        "markers", "launches_nothing(why): is on a backend and launches no kernel there"
    )
    name = config.getoption("--card")
    if name is not None:
        if name not in simt.CARDS:
            raise pytest.UsageError(f"--card: {name!r} is not one of {', '.join(simt.CARDS)}")
        simt.put_by_default(simt.CARDS[name])
    card.REHEARSED = config.getoption("--rehearse-card")
    path = config.getoption("--results")
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Results(path))
    if config.option.markexpr == "gpu":
        return  # nothing that is selected runs in simt
    if "PYTEST_XDIST_WORKER" not in os.environ and not simt.missing():
        try:
            simt.build()
        except AssertionError as error:
            pytest.exit(f"csrc/simt does not build:\n{error}", returncode=1)


class Results:
    """One line of JSON for each test, written as it ends: a time limit loses nothing."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="utf-8")  # open as long as pytest runs

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        said = "" if report.longrepr is None else str(report.longrepr)
        line = {"test": report.nodeid, "outcome": report.outcome, "when": report.when,
                "seconds": round(report.duration, 3), "said": said[-2000:]}  # fmt: skip
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


#: Files whose tests call simt's or Triton's operators by their namespace, without a parameter `on`.
LAUNCHING = {"test_simt": "simt", "test_triton": "triton"}


def named_backend(item):
    """(what a test says that it runs on, the operation if it says one), or (None, None)."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec is not None else ():
        if getattr(value, "op", None) is not None and value in launches.COUNTED:
            return str(value), value.op
    for prefix, backend in LAUNCHING.items():
        if item.path.name.startswith(prefix):
            return backend, None
    return None, None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test on simt, cuda or triton in which no kernel of its operation was launched."""
    on, op = named_backend(item)
    if on is None:
        return (yield)
    with launches.recorded() as launched:
        result = yield
    if item.get_closest_marker("launches_nothing") is not None:
        launched.require_none(on)
    elif not launched.checked:
        launched.require_any(on, op)
    return result


def pytest_collection_modifyitems(config, items):
    from instruction_sets import refuse_absent_sets  # it imports the package, after the line above

    refuse_absent_sets(items)
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        here = item.get_closest_marker("launches_nothing") is None
        if here and named_backend(item)[0] in ("cuda", "triton"):
            item.add_marker(pytest.mark.gpu)
    surplus = surplus_of_triton(items)
    if os.environ.get("TRITON_INTERPRET") != "1":
        if config.option.markexpr == "gpu":  # so that a time limit cuts the least informative
            items.sort(key=lambda item: 2 if item in surplus else named_backend(item)[0] != "cuda")
        return
    if not config.getoption("--all"):
        items[:] = [item for item in items if item not in surplus]
        config.hook.pytest_deselected(items=list(surplus))


def surplus_of_triton(items):
    """All cases of each test on Triton but for INTERPRETED_CASES of them, spread evenly."""
    cases = {}
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("on") == "triton":
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    surplus = set()
    for group in cases.values():
        kept = {len(group) * i // INTERPRETED_CASES for i in range(INTERPRETED_CASES)}
        surplus.update(item for i, item in enumerate(group) if i not in kept)
    return surplus
