"""An engine that answers at once, for what is about the job and not about answers. Run as a program it is a batch."""

import asyncio
import contextlib
import json
import sys
from pathlib import Path

from steer_server.batch.commands import report_for, run
from steer_server.batch.local_job import Settings, run_job
from steer_server.batch.rows import Answer
from steer_server.batch.sweep import parse_sweep


class StubEngine:
    """Answers with the prompt turned round; `fail` in a prompt is a 400."""

    in_flight = 64

    def __init__(self, delay=0.0, model="stub"):
        self.delay, self.model = delay, model
        self.asked = []

    async def facts(self):
        return {"model": self.model, "presets": None}

    async def answer(self, row):
        self.asked.append(row.custom_id)
        if self.delay:
            await asyncio.sleep(self.delay)
        prompt = json.loads(row.body).get("prompt", "")
        if "fail" in prompt:
            return Answer(400, b'{"error":{"message":"asked to","type":"BadRequestError","param":"prompt","code":400}}')
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(prompt)}
        choice = {"index": 0, "text": prompt[::-1], "finish_reason": "stop"}
        return Answer(200, json.dumps({"choices": [choice], "usage": usage}).encode())


@contextlib.asynccontextmanager
async def entered(engine):
    yield engine


def settings(source, output, **changes):
    chosen = {"sweep": parse_sweep([]), "resume": False, "retry_errors": False, "in_flight": None, "options": {}}
    return Settings(source=source, output=output, **(chosen | changes))


def line(custom_id, prompt="abc", **body):
    row = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt} | body}
    return json.dumps(row)


def write_lines(path, lines):
    path.write_text("".join(f"{one}\n" for one in lines))
    return path


def results(path):
    import gzip

    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        data = file.read()
    assert not data or data.endswith(b"\n"), "a torn line"
    return [json.loads(row) for row in data.splitlines()]


def main():
    """stub.py IN OUT [--resume] [--delay SECONDS]: the exit status is the command's."""
    source, output = map(Path, sys.argv[1:3])
    delay = float(sys.argv[sys.argv.index("--delay") + 1]) if "--delay" in sys.argv else 0.0
    job = settings(source, output, resume="--resume" in sys.argv)
    report = report_for("json", "--quiet" in sys.argv)
    sys.exit(run(run_job(job, entered(StubEngine(delay)), report), report))


if __name__ == "__main__":
    main()
