"""The tests in `eight/` need eight devices, so a process of their own: `test_devices.py` starts it."""

import os

if os.environ.get("ADABATCH_EIGHT_DEVICES") != "1":
    collect_ignore = ["eight"]
