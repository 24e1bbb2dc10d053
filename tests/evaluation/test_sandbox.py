"""Generated programs: what passes, what fails, and what a hostile one can reach."""

from __future__ import annotations

import functools
import shutil
import time

import pytest

from seedlora.evaluation.sandbox import FAILED, PASSED, TIMED_OUT, Limits, Sandbox


@functools.cache
def _sandbox(*, bubblewrap=True):
    return Sandbox(Limits(seconds=2, memory_mib=512), bubblewrap=bubblewrap)


try:
    _sandbox()
    works = True
except ValueError:
    works = False
needs_bubblewrap = pytest.mark.skipif(not works, reason="bubblewrap is not installed, or not allowed here")
BOTH = [pytest.param(True, marks=needs_bubblewrap), False]


@pytest.mark.parametrize("bubblewrap", BOTH)
def test_programs_end_as_they_should(bubblewrap):
    sandbox = _sandbox(bubblewrap=bubblewrap)
    assert sandbox.run("assert 2 > 1").status == PASSED
    assert sandbox.run("print('x' * 10_000)").status == PASSED
    failed = sandbox.run("def f(x):\n    return x\nassert f(1) == 2, 'wrong sum'")
    assert (failed.status, failed.reason) == (FAILED, "AssertionError: wrong sum")
    assert sandbox.run("def f(:").status == FAILED
    assert sandbox.run("if __name__ == '__main__':\n    raise SystemExit('run as a script')").status == PASSED


@pytest.mark.parametrize("bubblewrap", BOTH)
@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import sys; print(sys.argv); sys.exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(b'0' * (64 << 20))",
    ],
)
def test_nothing_passes_that_does_not_reach_its_end(program, bubblewrap):
    outcome = _sandbox(bubblewrap=bubblewrap).run(program)
    assert outcome.status == FAILED


TELLTALE = """\
import os, sys
places = [os.path.join(os.path.dirname(sys.argv[0]), name) for name in ("driver.py", "program.py")]
places += [f"/proc/{process}/{file}" for process in (os.getppid(), "self") for file in ("environ", "fd/0", "cmdline")]
for place in places:
    try:
        os.write(1, os.read(os.open(place, os.O_RDONLY | os.O_NONBLOCK), 1500))
    except OSError:
        pass
os.write(1, os.read(0, 100) + repr(sys.argv).encode())
os._exit(0)
"""


@pytest.mark.parametrize("bubblewrap", BOTH)
def test_the_proof_of_the_end_is_not_lying_about(bubblewrap):
    assert _sandbox(bubblewrap=bubblewrap).run(TELLTALE).status == FAILED
    assert _sandbox(bubblewrap=bubblewrap).run("import sys\nassert sys.stdin.read() == ''").status == PASSED


@pytest.mark.parametrize("bubblewrap", BOTH)
def test_a_program_is_killed_at_the_limit_with_all_it_started(bubblewrap, tmp_path):
    sign = tmp_path / "sign"
    program = f"import subprocess, time\nsubprocess.Popen(['/bin/sh', '-c', 'sleep 2.3; touch {sign}'])\ntime.sleep(60)"
    started = time.monotonic()
    assert _sandbox(bubblewrap=bubblewrap).run(program).status == TIMED_OUT
    assert time.monotonic() - started < 30
    time.sleep(0.6)
    assert not sign.exists()


@needs_bubblewrap
@pytest.mark.parametrize(
    "program",
    [
        "open('{outside}/written', 'w').write('x')",
        "print(open('{outside}/secret').read())",
        "import os\nassert os.listdir('{outside}')",
        "import os\nos.remove('/usr/bin/env')",
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
        "import os\nos.kill({pid}, 0)",
        "import os\nassert 'SEEDLORA_SECRET' in os.environ",
        "import pathlib\npathlib.Path(__file__)",
        "import os\nassert any(p.isdigit() and int(p) > 100 for p in os.listdir('/proc'))",
    ],
)
def test_the_sandbox_keeps_the_host_out(program, tmp_path, monkeypatch):
    import os
    import socket

    monkeypatch.setenv("SEEDLORA_SECRET", "1")
    (tmp_path / "secret").write_text("secret")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        text = program.format(outside=tmp_path, port=server.getsockname()[1], pid=os.getpid())
        assert _sandbox().run(text).status == FAILED
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


@needs_bubblewrap
def test_many_programs_at_once_come_back_in_order():
    done = []
    outcomes = _sandbox().run_all([f"assert {i} % 3" for i in range(6)], workers=2, on_done=lambda: done.append(1))
    assert [outcome.status == PASSED for outcome in outcomes] == [False, True, True, False, True, True]
    assert len(done) == 6


def test_without_bubblewrap_it_refuses(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="only inside bubblewrap.*--without_sandbox"):
        Sandbox()


def test_a_bubblewrap_that_does_not_work_is_found_out_at_once(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    with pytest.raises(ValueError, match="No permissions to create new namespace.*user namespaces"):
        Sandbox()
