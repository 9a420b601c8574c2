"""Jobs from file to file, against the stub: resuming, refusing, every format. Answers are tried in tests/e2e."""

import asyncio
import gzip
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from steer_server.batch.job import JobError, job_path
from steer_server.batch.local_job import run_job
from steer_server.batch.reports import QuietReport
from steer_server.batch.row_file import RowFileError
from steer_server.batch.sweep import parse_sweep
from steer_server.batch.verified_file import InputChangedError
from tests.batch.stub import StubEngine, entered, line, results, settings, write_lines

COUNT = 200


@pytest.fixture
def source(tmp_path):
    lines = [line(f"r{i}", f"prompt {i}") for i in range(COUNT)]
    lines[7] = "not json"
    lines[11] = line("r3", "again")
    lines[13] = line("r13", "fail")
    return write_lines(tmp_path / "in.jsonl", lines)


def run(source, output, engine=None, **changes):
    return asyncio.run(run_job(settings(source, output, **changes), entered(engine or StubEngine()), QuietReport()))


def assert_complete(rows):
    """Every row once; the duplicate and the bad line are error rows of their own."""
    assert len(rows) == COUNT
    assert sorted(int(row["id"].rpartition("_")[2]) for row in rows) == list(range(1, COUNT + 1))
    by_number = {int(row["id"].rpartition("_")[2]): row for row in rows}
    assert by_number[8]["error"]["code"] == "invalid_json"
    assert by_number[12]["error"]["code"] == "duplicate_custom_id"
    assert by_number[14]["response"]["status_code"] == 400
    for number, row in by_number.items():
        if number not in (8, 12, 14):
            assert row["custom_id"] == f"r{number - 1}"
            assert row["response"]["body"]["choices"][0]["text"] == f"prompt {number - 1}"[::-1]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_formats(source, tmp_path, name):
    output = tmp_path / name
    summary = run(source, output)
    assert (summary.answered, summary.failed) == (COUNT - 3, 3)
    assert summary.failures == {"invalid_json": 1, "duplicate_custom_id": 1, "400 BadRequestError prompt": 1}
    if name.endswith("parquet"):
        table = pq.read_table(output).to_pylist()
        decode = {"response": lambda v: v and json.loads(v), "error": lambda v: v and json.loads(v)}
        rows = [{key: decode.get(key, lambda v: v)(value) for key, value in row.items()} for row in table]
        assert rows == results(tmp_path / "out.parquet.rows.jsonl")
    else:
        rows = results(output)
    assert_complete(rows)


def test_gzip_in(source, tmp_path):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    run(tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl")
    assert_complete(results(tmp_path / "out.jsonl"))


class Dying(StubEngine):
    """Stops for good at a row."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    async def answer(self, row):
        from steer_server.batch.runner import EngineStoppedError

        if row.number >= self.at:
            raise EngineStoppedError("gone")
        return await super().answer(row)


@pytest.fixture(params=["out.jsonl", "out.jsonl.gz", "out.parquet"])
def interrupted(request, source, tmp_path):
    """The output of a job whose engine died in its midst."""
    output = tmp_path / request.param
    with pytest.raises(Exception, match="gone"):
        run(source, output, Dying(90))
    return output


def test_resuming_repeats_nothing(source, interrupted):
    engine = StubEngine()
    summary = run(source, interrupted, engine, resume=True)
    assert summary.finished_earlier > 10
    assert summary.finished_earlier + summary.finished == COUNT
    assert (
        len(engine.asked)
        == len(set(engine.asked))
        == COUNT
        - summary.finished_earlier
        - (summary.failures["duplicate_custom_id"] + summary.failures["invalid_json"])
    )
    rows = interrupted.with_name(f"{interrupted.name}.rows.jsonl") if interrupted.suffix == ".parquet" else interrupted
    assert_complete(results(rows))
    again = StubEngine()
    assert run(source, interrupted, again, resume=True).finished == 0
    assert again.asked == []


def test_resuming_a_job_that_never_began(source, tmp_path):
    run(source, tmp_path / "out.jsonl", resume=True)
    assert_complete(results(tmp_path / "out.jsonl"))


def test_errors_are_retried_and_replaced(source, tmp_path):
    output = tmp_path / "out.jsonl"
    run(source, output)

    class Mended(StubEngine):
        async def answer(self, row):
            return await super().answer(type(row)(row.number, row.custom_id, row.url, b'{"prompt": "well"}'))

    engine = Mended()
    summary = run(source, output, engine, resume=True, retry_errors=True)
    assert engine.asked == ["r13"]
    assert (summary.finished_earlier, summary.answered, summary.failed) == (COUNT - 3, 1, 2)
    rows = results(output)
    assert len(rows) == COUNT
    assert [row["response"]["status_code"] for row in rows if row["custom_id"] == "r13"] == [200]


def test_an_output_is_never_overwritten(source, tmp_path, interrupted):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(JobError, match="exists; give --resume"):
        run(source, interrupted)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("input", r"input.sha256 was \"\w{64}\", is \"\w{64}\""),
        ("model", 'engine.model was "stub", is "another"'),
        ("presets", 'engine.presets was not given, is {"p": 1}'),
        ("options", r'options.vllm was not given, is {"--dtype": \["half"\]}'),
        ("sweep", r"sweep.strength was not given, is \[0, 1\]"),
    ],
)
def test_another_job_is_refused(source, interrupted, change, says):
    kept = {path: path.read_bytes() for path in interrupted.parent.iterdir()}
    engine, changes = StubEngine(), {}
    if change == "input":
        source.write_text(source.read_text().replace("prompt 150", "prompt 151"))
        kept[source] = source.read_bytes()
    elif change == "model":
        engine = StubEngine(model="another")
    elif change == "presets":

        async def facts():
            return {"model": "stub", "presets": {"p": 1}}

        engine.facts = facts
    elif change == "options":
        changes = {"options": {"vllm": {"--dtype": ["half"]}}}
    else:
        changes = {"sweep": parse_sweep(["strength=0,1"])}
    with pytest.raises(JobError, match=says):
        run(source, interrupted, engine, resume=True, **changes)
    assert engine.asked == []
    assert {path: path.read_bytes() for path in interrupted.parent.iterdir()} == kept


def test_a_file_that_no_job_wrote_is_left_alone(source, tmp_path):
    output = write_lines(tmp_path / "out.jsonl", ["precious"])
    with pytest.raises(JobError, match="is missing, so nothing says"):
        run(source, output, resume=True)
    assert output.read_text() == "precious\n"


def test_a_line_from_elsewhere_in_the_output(source, tmp_path):
    output = tmp_path / "out.jsonl"
    run(source, output)
    output.write_text('{"id": "batch_req_other_1", "response": null}\n' + output.read_text())
    with pytest.raises(RowFileError, match="a row that this job did not write"):
        run(source, output, resume=True)


def test_input_that_changes_under_the_job(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [line(f"r{i}", "x" * 1000) for i in range(5000)])
    output = tmp_path / "out.jsonl"
    original = source.read_bytes()

    class Changing(StubEngine):
        async def answer(self, row):
            if row.number == 100:
                source.write_bytes(original.replace(b"x" * 1000, b"y" * 1000))
            return await super().answer(row)

    with pytest.raises(InputChangedError, match="changed while the job was reading it"):
        run(source, output, Changing())
    assert all("yyy" not in json.dumps(row) for row in results(output))
    with pytest.raises(JobError, match=r"input\.sha256"):
        run(source, output, resume=True)
    source.write_bytes(original)
    run(source, output, resume=True)
    assert sorted(row["custom_id"] for row in results(output)) == sorted(f"r{i}" for i in range(5000))


def test_a_sweep_becomes_a_tidy_table(tmp_path):
    lines = [line(f"p{i}", f"prompt {i}", steering={"vectors": [{"layers": [1]}]}) for i in range(3)]
    source = write_lines(tmp_path / "in.jsonl", [*lines, line("bad", "fail"), line("none", "x")])
    sweep = parse_sweep(["vectors.0.strength=0,0.5", "apply.phase=prompt,all"])
    run(source, tmp_path / "out.parquet", sweep=sweep)
    table = pq.read_table(tmp_path / "out.parquet")
    rows = table.to_pylist()
    assert len(rows) == 5 * 4
    settings_ = {(r["vectors.0.strength"], r["apply.phase"]) for r in rows if r["custom_id"] == "p1"}
    assert settings_ == {(s, p) for s in (0.0, 0.5) for p in ("prompt", "all")}
    assert {r["text"] for r in rows if r["custom_id"] == "p1"} == {"prompt 1"[::-1]}
    assert {r["error"] for r in rows if r["custom_id"] == "bad"} == {"asked to"}
    assert table.schema.field("vectors.0.strength").type == "double"
    assert len(results(tmp_path / "out.parquet.rows.jsonl")) == 20


def command(source, output, *flags):
    return [sys.executable, "-m", "tests.batch.stub", str(source), str(output), *flags]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_killed_at_25_random_instants(source, tmp_path, name):
    """Against the stub; tests/e2e does the same with a real engine."""
    rng = random.Random(name)
    output = tmp_path / name
    rows = tmp_path / f"{name}.rows.jsonl" if name.endswith("parquet") else output
    kills, sizes = 0, []
    while True:
        begun = rows.stat().st_size if rows.exists() else 0
        process = subprocess.Popen(command(source, output, "--resume", "--delay", "0.15", "--quiet"))
        try:
            # Some while it starts and reads what is there, most soon after it has written its first rows.
            if kills % 5 == 0:
                process.wait(rng.uniform(0.0, 0.7))
            while kills < 25 and process.poll() is None and (rows.stat().st_size if rows.exists() else 0) <= begun:
                time.sleep(0.002)
            process.wait(rng.uniform(0.0, 0.3) if kills < 25 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            sizes.append(rows.stat().st_size if rows.exists() else 0)
            continue
        assert process.returncode == 2
        if kills >= 25:
            break
        # Finished before the instant came: the next kill hits a job that begins again.
        for path in (output, job_path(output), rows):
            path.unlink(missing_ok=True)
    assert sum(0 < size < rows.stat().st_size for size in sizes) > 5, "the kills hit nothing"
    assert_complete(results(rows))
    if name.endswith("parquet"):
        assert pq.read_metadata(output).num_rows == COUNT


def test_exit_status_and_json_lines(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", [line("a"), line("b")])
    bad = write_lines(tmp_path / "bad.jsonl", [line("a"), "bad"])
    for source, status in ((good, 0), (bad, 2), (tmp_path / "missing.jsonl", 1)):
        ran = subprocess.run(command(source, tmp_path / f"{source.stem}.out.jsonl"), capture_output=True, text=True)
        assert ran.returncode == status
        events = [json.loads(text) for text in ran.stderr.splitlines()]
        assert events[-1]["event"] == ("error" if status == 1 else "summary")
        if status == 2:
            assert events[-1]["failures"] == {"invalid_json": 1}
            assert events[-1]["rows"] == 2


def test_terminated_it_keeps_what_is_finished(source, tmp_path):
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen(command(source, output, "--delay", "1"), stderr=subprocess.PIPE, text=True)
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "go on with --resume" in said
    assert 0 < len(results(output)) < COUNT
    run(source, output, resume=True)
    assert_complete(results(output))


def test_a_read_only_output(source, tmp_path):
    """Known before any engine is started. Root writes everywhere, so it is a path that nobody can write."""
    started = []

    class Never(StubEngine):
        async def facts(self):
            started.append(1)

    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    output = folder / "out.jsonl" if os.geteuid() else tmp_path / "no" / "out.jsonl"
    with pytest.raises(RowFileError, match="cannot be written"):
        run(source, output, Never())
    assert started == []
