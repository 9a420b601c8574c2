"""1,000,000 rows in little memory, the one thing that is tried against the stub because an engine would need days."""

import json
import subprocess
import sys

import pytest

from tests.batch.stub import line

ROWS = 1_000_000
LIMIT_KIB = 300 * 1024

# The peak of the whole process: interpreter, libraries, runner and stub together. Not ru_maxrss, which a new process
# inherits from the one that started it.
PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from steer_server.batch.local_job import run_job
from steer_server.batch.reports import QuietReport
from tests.batch.stub import StubEngine, entered, settings

class Forgetful(StubEngine):
    async def answer(self, row):
        self.asked.clear()
        return await super().answer(row)

job = settings(Path(sys.argv[1]), Path(sys.argv[2]), resume="--resume" in sys.argv)
summary = asyncio.run(run_job(job, entered(Forgetful()), QuietReport()))
status = Path("/proc/self/status").read_text()
peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
print(json.dumps({"peak": peak, "finished": summary.finished, "earlier": summary.finished_earlier}))
"""


def run(*arguments):
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.timeout(1800)
def test_a_million_rows(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        file.writelines(f"{line(f'row-{i}')}\n" for i in range(ROWS))
    first = run(source, output)
    assert first["finished"] == ROWS
    assert first["peak"] < LIMIT_KIB
    # Resuming reads all of it again.
    second = run(source, output, "--resume")
    assert (second["finished"], second["earlier"]) == (0, ROWS)
    assert second["peak"] < LIMIT_KIB
