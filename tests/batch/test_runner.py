"""The loop: bounded, in groups, and nothing lost where something ends it."""

import asyncio
import subprocess
import sys
import threading

import pytest

from steer_server.batch.rows import Answer, Refused, Request
from steer_server.batch.runner import EngineStoppedError, answer_patiently, run_rows

BODY = b"{}"


def request(number):
    return Request(number, f"r{number}", "/v1/completions", BODY)


class Kept:
    """An output that holds what was appended. full_after: lines after which it fails."""

    def __init__(self, full_after=None):
        self.lines = []
        self.groups = 0
        self.full_after = full_after

    def append(self, data):
        assert threading.current_thread() is not threading.main_thread()
        if self.full_after is not None and len(self.lines) >= self.full_after:
            raise OSError("full")
        self.groups += 1
        self.lines += data.splitlines()


async def answered(row):
    await asyncio.sleep(0)
    return Answer(200, BODY)


def groups(count, size=10):
    rows = [request(n) for n in range(1, count + 1)]
    return iter([rows[i : i + size] for i in range(0, count, size)])


async def test_every_row_once():
    output, finished = Kept(), []
    rows = iter([[request(1), Refused(2, None, "c", "m")], [], [request(3)]])
    await run_rows("j", rows, answered, output, 4, finished.append)
    assert sorted(result.number for result in finished) == [1, 2, 3]
    assert len(output.lines) == 3


async def test_bounded_in_flight_and_read_no_further_than_needed():
    running = most = read = 0

    def counted():
        nonlocal read
        for group in groups(400):
            read += len(group)
            yield group

    async def answer(row):
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert read - row.number < 30
        await asyncio.sleep(0.001)
        running -= 1
        return Answer(200, BODY)

    await run_rows("j", counted(), answer, Kept(), 8, lambda result: None)
    assert most == 8


async def test_rows_are_written_as_they_complete():
    output, slow = Kept(), asyncio.Event()

    async def answer(row):
        if row.number == 1:
            await slow.wait()
        return Answer(200, BODY)

    job = asyncio.create_task(run_rows("j", groups(50), answer, output, 4, lambda result: None))
    while len(output.lines) < 49:
        await asyncio.sleep(0.001)
    slow.set()
    await job
    assert output.lines[-1].startswith(b'{"id":"batch_req_j_1"')


async def test_a_slow_disk_makes_groups():
    class Slow(Kept):
        def append(self, data):
            threading.Event().wait(0.01)
            super().append(data)

    output = Slow()
    await run_rows("j", groups(1000, 100), answered, output, 64, lambda result: None)
    assert len(output.lines) == 1000
    assert output.groups < 200


class EndError(Exception):
    pass


async def end_by(kind):
    """Run 100 rows, the 40th of which ends the job. Returns what was written and what was counted as finished."""
    output, finished = Kept(20 if kind == "the output" else None), []

    def rows():
        for group in groups(100, 5):
            if kind == "the input" and group[0].number > 40:
                raise EndError
            yield group

    async def answer(row):
        await asyncio.sleep(0.001)
        if kind == "the engine" and row.number == 40:
            raise EngineStoppedError("died")
        return Answer(200, BODY)

    job = asyncio.create_task(run_rows("j", rows(), answer, output, 4, finished.append))
    if kind == "a signal":
        while len(finished) < 40:
            await asyncio.sleep(0.001)
        job.cancel()
    expected = {"the output": OSError, "the engine": EngineStoppedError, "a signal": asyncio.CancelledError}
    with pytest.raises(expected.get(kind, EndError)):
        await asyncio.wait_for(job, 20)
    return output, finished


@pytest.mark.parametrize("kind", ["the output", "the input", "the engine", "a signal"])
async def test_what_ends_a_job_loses_nothing_that_was_answered(kind):
    output, finished = await end_by(kind)
    assert len(output.lines) == len(finished) >= 20
    assert len(finished) < 60
    assert len({result.number for result in finished}) == len(finished)


ABORTED = Answer(200, b'{"choices":[{"finish_reason":"abort"}]}', 0.01)


async def test_busy_servers_are_asked_again():
    replies = [Answer(429, b"", 0.01), Answer(503, b"", 0.01), ABORTED, Answer(200, b"{}")]

    async def answer(row):
        return replies.pop(0)

    assert await answer_patiently(answer, request(1)) == Answer(200, b"{}")
    assert replies == []


def test_a_silent_pipe_does_not_keep_a_job_from_stopping():
    """Left behind while it waits for input, the reading thread lets the process end."""
    code = """
import asyncio
from steer_server.batch.read_rows import read_rows
from steer_server.batch.identifiers import RowSet
from steer_server.batch.runner import run_rows
from steer_server.batch.sources import StandardInput

async def main():
    rows = read_rows(StandardInput().lines(), RowSet())
    job = asyncio.create_task(run_rows("j", rows, None, None, 1, None))
    await asyncio.sleep(0.2)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    print("stopped")

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == b"stopped\n"
        assert process.wait(20) == 0
