"""Runs in the grading sandbox only: the package's own tests, with pytest, and one record for each.

A record is `NONCE JSON` with the test's id and outcome, and with why it failed if that is asked for. The policy's
package runs in this process and could forge records, so they are not the only thing that is asked (see grading.py).
"""

import json
import os
import sys
from typing import Any


class Records:
    """A plugin of pytest."""

    def __init__(self, nonce: str, records: int, told: bool) -> None:
        self.nonce, self.records, self.told = nonce, records, told
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test is what the worst of its phases was."""
        if report.outcome == "failed" or report.nodeid not in self.outcomes or report.outcome == "skipped":
            self.outcomes[report.nodeid] = report.outcome
            if report.outcome == "failed" and self.told:
                os.write(
                    self.records, f"{self.nonce} {json.dumps(['why', report.nodeid, report.longreprtext])}\n".encode()
                )

    def pytest_collectreport(self, report: Any) -> None:
        """What cannot be collected has failed."""
        if report.outcome == "failed":
            self.outcomes[report.nodeid] = "failed"

    def pytest_sessionfinish(self) -> None:
        """Write all down."""
        for test, outcome in self.outcomes.items():
            os.write(self.records, f"{self.nonce} {json.dumps(['test', test, outcome])}\n".encode())


def main() -> None:
    """Arguments: a nonce, the folder for the path, `told` or `untold`, and what pytest is to be given."""
    nonce, root, told, *tests = sys.argv[1:]
    records = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.path[0:1] = [root, "/tmp/kit"]
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.", "--color=no", "--tb=short"]
    options += ["-x"] if told == "told" else []
    sys.exit(pytest.main([*options, *tests], plugins=[Records(nonce, records, told == "told")]))


if __name__ == "__main__":
    main()
