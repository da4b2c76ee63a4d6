"""Runs the tests in `eight/` in a process with eight CPU devices, and reports each of them.

To work on them: `ADABATCH_EIGHT_DEVICES=1 pytest tests/devices/eight`.
"""

import os
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.devices

HERE = pathlib.Path(__file__).parent


def test_eight_devices(tmp_path, subtests):
    report = tmp_path / "report.xml"
    flags = ["-p", "no:cacheprovider", "-n0", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *flags, str(HERE / "eight")]
    environment = os.environ | {"ADABATCH_EIGHT_DEVICES": "1", "PYTEST_ADDOPTS": ""}
    child = subprocess.run(
        command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True
    )
    print(child.stdout, child.stderr)
    assert report.exists(), "the process with eight devices did not get as far as a report"
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        with subtests.test(case.get("name")):
            problems = [x.text for x in case if x.tag in ("failure", "error")]
            assert not problems, "\n".join(problems)
    assert child.returncode == 0, "see the output of the process with eight devices"
    assert len(cases) > 20
