"""`steer-server batch` and `/v1/batches` on a real engine: the same answers as online, each of them once."""

import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pyarrow.parquet as pq
import pytest

from tests.batch.stub import results, write_lines
from tests.e2e import servers
from tests.e2e.batch_cases import MODEL, assert_same, batch, online, row, summary_of
from tests.e2e.cases import PROMPTS, direction
from tests.tensors import inline

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

FLAGS = ["--enforce-eager", "--max-num-seqs", "32"]
ROWS = 2000


@pytest.fixture(scope="module")
def cache(tmp_path_factory, model_dir):
    """A cache folder of the tests' own, with the converted model of the real one."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(model_dir.parent)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, cache):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = servers.steer_server("serve", *FLAGS)
    with servers.running(command, log, {"STEER_SERVER_CACHE": str(cache)}) as running:
        yield running


def test_2000_mixed_lines_are_answered_as_online(server, tmp_path):
    rows = [row(i) for i in range(ROWS)]
    lines = [json.dumps(one) for one in rows]
    bad = {100: "not json", 700: json.dumps(rows[3]), 1500: '{"custom_id": "no-body", "url": "/v1/completions"}'}
    for place, text in sorted(bad.items(), reverse=True):
        lines.insert(place, text)
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    answers = online(server, rows)
    ran = batch("-i", source, "-o", output, *FLAGS, "--log-format", "json")
    assert ran.returncode == 2, ran.stderr[-3000:]
    written = results(output)
    refused = {one["error"]["code"]: one for one in written if one["response"] is None}
    assert refused.keys() == {"invalid_json", "duplicate_custom_id", "invalid_row"}
    assert_same([one for one in written if one["response"] is not None], answers)
    assert len(written) == ROWS + len(bad)

    summary = summary_of(ran)
    assert summary["rows"] == ROWS + len(bad)
    failed = sum(status != 200 for status, _ in answers.values())
    assert failed == ROWS // 23
    assert summary["failed"] == failed + len(bad)
    assert sum(summary["failures"].values()) == summary["failed"]
    assert summary["failures"]["404 NotFoundError steering.features[].sae"] == 17
    good = [body for status, body in answers.values() if status == 200]
    for name, names in (
        ("prompt_tokens", ("prompt_tokens", "input_tokens")),
        ("completion_tokens", ("output_tokens",)),
    ):
        counted = sum(next((b["usage"][n] for n in (name, *names) if n in b["usage"]), 0) for b in good)
        assert summary[name] == counted
    receipts = [body["steering"]["applied"] for body in good if "steering" in body]
    assert summary["steered_tokens"] == sum(max((e["tokens"] + e["cached"] for e in r), default=0) for r in receipts)


def test_killed_at_25_random_instants(server, tmp_path):
    """The engine outlives the job, so that 25 kills need one engine: the job asks a server.

    A job that is over before its next kill, as it may be on a fast machine, is followed by another.
    """
    rows = [row(i) for i in range(150)]
    answers = online(server, rows)
    source = write_lines(tmp_path / "in.jsonl", map(json.dumps, rows))
    rng = random.Random(6)
    kills = while_writing = jobs = 0
    while kills < 25:
        output = tmp_path / f"out-{jobs}.jsonl"
        command = servers.steer_server("batch", "-i", str(source), "-o", str(output), "--server", server.url, "--quiet")
        command += ["--resume", "--in-flight", "8"]
        kept = b""
        returncode = None
        while kills < 25 and returncode != 2:
            process = subprocess.Popen(command)
            # One in five as it starts or reads; the others once it writes.
            if kills % 5 == 0:
                time.sleep(rng.uniform(0.0, 1.5))
            else:
                while process.poll() is None and (not output.exists() or output.stat().st_size <= len(kept)):
                    time.sleep(0.002)
                time.sleep(rng.uniform(0.0, 0.15))
            process.kill()
            returncode = process.wait()
            assert returncode in (-signal.SIGKILL, 2), "neither killed nor finished with failed rows"
            data = output.read_bytes() if output.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            assert whole.startswith(kept), "finished rows were touched"
            if returncode == -signal.SIGKILL:
                kills += 1
                while_writing += len(whole) > len(kept)
            kept = whole
        if returncode != 2:
            assert batch("-i", source, "-o", output, "--server", server.url, "--resume").returncode == 2
        assert output.read_bytes().startswith(kept)
        assert_same(results(output), answers)
        jobs += 1
    assert while_writing >= 15, "the kills hit nothing"


def test_killed_with_its_own_engine(server, tmp_path):
    rows = [row(i) for i in range(120)]
    source, output = write_lines(tmp_path / "in.jsonl", map(json.dumps, rows)), tmp_path / "out.jsonl.gz"
    command = servers.steer_server("batch", "-i", str(source), "-o", str(output), *FLAGS, "--in-flight", "8")
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while not output.exists() or output.stat().st_size < 10_000:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    ran = batch("-i", source, "-o", output, *FLAGS, "--resume", "--log-format", "json")
    assert ran.returncode == 2, ran.stderr[-3000:]
    summary = summary_of(ran)
    assert 0 < summary["finished_earlier"] < 120
    assert summary["rows"] == 120
    assert_same(results(output), online(server, rows))


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False).returncode:
        pytest.skip("mounting a small disk is not permitted here; RLIMIT_FSIZE is tried in tests/batch")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(server, tmp_path):
    rows = [row(i) for i in range(60)]
    source = write_lines(tmp_path / "in.jsonl", map(json.dumps, rows))
    with small_disk(tmp_path / "disk", "32k") as disk:
        output = disk / "out.jsonl"
        ran = batch("-i", source, "-o", output, "--server", server.url)
        assert ran.returncode == 1
        assert "No space left on device; what is finished is kept, go on with --resume" in ran.stderr
        before = output.read_bytes()
        assert 0 < len(results(output)) < 60
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert batch("-i", source, "-o", output, "--server", server.url, "--resume").returncode == 2
        assert output.read_bytes().startswith(before)
        assert_same(results(output), online(server, rows))


def test_a_read_only_output(server, tmp_path):
    """Of a new job, and of one that has a row to go."""
    rows = [row(i) for i in range(3)]
    source = write_lines(tmp_path / "in.jsonl", map(json.dumps, rows))
    with small_disk(tmp_path / "disk", "1m") as disk:
        assert batch("-i", source, "-o", disk / "out.jsonl", "--server", server.url).returncode in (0, 2)
        write_lines(disk / "out.jsonl", (disk / "out.jsonl").read_text().splitlines()[:-1])
        before = {path.name: path.read_bytes() for path in disk.iterdir()}
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for output, flags in (("out.jsonl", ["--resume"]), ("new.jsonl", [])):
            ran = batch("-i", source, "-o", disk / output, "--server", server.url, *flags)
            assert ran.returncode == 1
            assert "Read-only file system" in ran.stderr
            assert "Traceback" not in ran.stderr
        assert {path.name: path.read_bytes() for path in disk.iterdir()} == before


def test_pipes(server, tmp_path):
    rows = [row(i) for i in range(10)]
    text = "".join(f"{json.dumps(one)}\n" for one in rows)
    ran = batch("-i", "-", "-o", "-", "--server", server.url, input=text)
    assert ran.returncode == 0
    assert_same([json.loads(one) for one in ran.stdout.splitlines()], online(server, rows))


def test_another_engine_is_refused(server, tmp_path):
    source, output = write_lines(tmp_path / "in.jsonl", [json.dumps(row(0))]), tmp_path / "out.jsonl"
    assert batch("-i", source, "-o", output, "--server", server.url).returncode == 0
    job = tmp_path / "out.jsonl.job.json"
    job.write_text(job.read_text().replace('"id": "smollm2"', '"id": "other"'))
    ran = batch("-i", source, "-o", output, "--server", server.url, "--resume")
    assert ran.returncode == 1
    assert "cannot be resumed: engine.served" in ran.stderr


def test_a_sweep_uses_the_prefix_cache(server, tmp_path):
    """Steering of the generation alone leaves the prompt's blocks to be shared, if its settings run side by side."""
    long = " ".join(PROMPTS) * 4
    add = {"data": inline(direction(1, 8.0)), "layers": [12], "op": "add"}
    body = {"model": MODEL, "temperature": 0, "max_tokens": 4, "prompt": long}
    steering = {"vectors": [add], "apply": {"phase": "generation"}}
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body | {"prompt": name + long}}
        for name in ("a", "b")
    ]
    for one in rows:
        one["body"] = one["body"] | {"steering": steering}
    source, output = write_lines(tmp_path / "in.jsonl", map(json.dumps, rows)), tmp_path / "out.parquet"

    def prefix_hits():
        text = server.get("/metrics").text
        values = [x.split()[-1] for x in text.splitlines() if x.startswith("vllm:prefix_cache_hits_total")]
        return sum(map(float, values))

    before = prefix_hits()
    sweep = ["--sweep", "strength=0,2,4", "--sweep", "vectors.0.layers=[[5],[12]]"]
    ran = batch("-i", source, "-o", output, "--server", server.url, "--in-flight", "1", *sweep)
    assert ran.returncode == 0, ran.stderr
    table = pq.read_table(output).to_pylist()
    assert len(table) == 12
    assert [(r["custom_id"], r["strength"], r["vectors.0.layers"]) for r in table[:3]] == [
        ("a", 0, "[5]"), ("a", 0, "[12]"), ("a", 2, "[5]"),
    ]  # fmt: skip
    tokens = table[0]["prompt_tokens"]
    assert tokens > 256
    # Blocks of 128 tokens: of six settings of a prompt all but the first find its whole blocks.
    assert prefix_hits() - before == 2 * 5 * ((tokens - 1) // 128 * 128)
    bodies = {
        str(s): rows[0]["body"] | {"steering": steering | {"vectors": [add | {"strength": s}]}} for s in (0, 2, 4)
    }
    expected = online(server, [rows[0] | {"custom_id": name, "body": one} for name, one in bodies.items()])
    for r in table:
        if r["custom_id"] == "a" and r["vectors.0.layers"] == "[12]":
            assert r["text"] == expected[str(r["strength"])][1]["choices"][0]["text"]
            assert json.loads(r["receipt"])["applied"][0]["layers"] == [12]


# OpenAI's batch API.


def upload(client, path, **settings):
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="batch", **settings)


def ended(client, identifier, seconds=300):
    deadline = time.monotonic() + seconds
    while (current := client.batches.retrieve(identifier)).status in (
        "validating",
        "in_progress",
        "finalizing",
        "cancelling",
    ):
        assert time.monotonic() < deadline, current
        time.sleep(0.2)
    return current


def content(client, identifier):
    return [json.loads(one) for one in client.files.content(identifier).text.splitlines()]


def endpoint_rows(count, url="/v1/completions"):
    found = [one for one in map(row, range(count * 7)) if one["url"] == url]
    return found[:count]


def test_a_batch_over_the_api(server, tmp_path):
    client = server.client
    rows = endpoint_rows(60)
    other = row(2)
    assert other["url"] == "/v1/chat/completions"
    source = write_lines(tmp_path / "in.jsonl", [*map(json.dumps, rows), "bad", json.dumps(other)])
    file = upload(client, source, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.filename, file.purpose, file.bytes) == ("in.jsonl", "batch", source.stat().st_size)
    assert file.expires_at - file.created_at in (3600, 3599, 3601)
    assert client.files.content(file.id).content == source.read_bytes()
    created = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/completions",
        completion_window="24h",
        metadata={"for": "a test"},
        extra_body={"output_expires_after": {"anchor": "created_at", "seconds": 7200}},
    )
    assert created.status == "validating"
    assert created.expires_at - created.created_at == 86400
    done = ended(client, created.id)
    assert done.status == "completed", done
    assert done.metadata == {"for": "a test"}
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    answers = online(server, rows)
    good = {name: answer for name, answer in answers.items() if answer[0] == 200}
    assert 0 < len(good) < 60
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (62, len(good), 62 - len(good))
    assert_same(content(client, done.output_file_id), good)
    failures = content(client, done.error_file_id)
    assert {one["error"]["code"] for one in failures if one["error"]} == {"invalid_json", "invalid_url"}
    assert_same([o for o in failures if not o["error"]], {n: a for n, a in answers.items() if n not in good})
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert client.files.retrieve(done.output_file_id).expires_at > done.completed_at
    assert created.id in [one.id for one in client.batches.list(limit=1)]
    assert {file.id, done.output_file_id} <= {one.id for one in client.files.list()}
    assert [one.id for one in client.files.list(purpose="batch_output", limit=1)]
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_cancelled_batch_keeps_what_it_answered(server, tmp_path):
    client = server.client
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions",
         "body": {"model": MODEL, "prompt": f"Story {i}:", "max_tokens": 40, "ignore_eos": True}}
        for i in range(200)
    ]  # fmt: skip
    file = upload(client, write_lines(tmp_path / "in.jsonl", map(json.dumps, rows)))
    created = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    while client.batches.retrieve(created.id).request_counts.completed == 0:
        time.sleep(0.1)
    assert client.batches.cancel(created.id).status == "cancelling"
    done = ended(client, created.id)
    assert (done.status, done.error_file_id) == ("cancelled", None)
    written = content(client, done.output_file_id)
    assert len(written) == done.request_counts.completed < 200
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(created.id)


REFUSED = [
    ({"input_file_id": "file-" + "0" * 24}, 404, "input_file_id"),
    ({"input_file_id": "../../etc/passwd"}, 404, "input_file_id"),
    ({"input_file_id": 5}, 400, "input_file_id"),
    ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
    ({"completion_window": "1h"}, 400, "completion_window"),
    ({"metadata": {"a": 1}}, 400, "metadata"),
    ({"metadata": {str(i): "x" for i in range(17)}}, 400, "metadata"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, "output_expires_after.seconds"),
    ({"unknown": 1}, 400, "unknown"),
]


@pytest.mark.parametrize(("change", "status", "param"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_batches_that_cannot_be_had(server, tmp_path, change, status, param):
    file = upload(server.client, write_lines(tmp_path / "in.jsonl", ["x"]))
    body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | change
    answer = server.post("/v1/batches", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_files_that_cannot_be_had(server, tmp_path):
    url = f"{server.url}/v1/files"
    good = {"file": ("a.jsonl", b"x")}
    for sent, status in (
        ({"files": good, "data": {"purpose": "fine-tune"}}, 400),
        ({"files": good}, 400),
        ({"data": {"purpose": "batch"}}, 400),
        ({"json": {"purpose": "batch"}}, 400),
        ({"files": {"file": ("a.parquet", b"x")}, "data": {"purpose": "batch"}}, 400),
        ({"files": good, "data": {"purpose": "batch", "expires_after[anchor]": "created_at"}}, 400),
    ):
        assert httpx.post(url, timeout=120, **sent).status_code == status, sent
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    for path in (
        "/v1/files/file-x",
        "/v1/files/..%2F..%2Fetc%2Fpasswd/content",
        "/v1/batches/batch_x",
        "/v1/files/x/content",
    ):
        assert server.get(path).status_code == 404, path
    for path in ("/v1/files?after=x", "/v1/batches?after=x"):
        assert server.get(path).status_code == 404
    named = httpx.post(url, files={"file": ("../../evil.jsonl", b"x")}, data={"purpose": "batch"}, timeout=120).json()
    assert named["filename"] == "evil.jsonl"


def test_an_interrupted_batch_goes_on_after_a_restart(tmp_path, cache):
    """The server is killed in the midst of a batch; the next one that serves the same takes it up."""
    rows = endpoint_rows(80)
    store = tmp_path / "cache"
    store.mkdir()
    (store / "models").symlink_to(cache / "models")
    environment = {"STEER_SERVER_CACHE": str(store)}
    command = servers.steer_server("serve", *FLAGS)
    with servers.running(command, tmp_path / "log.txt", environment) as first:
        file = upload(first.client, write_lines(tmp_path / "in.jsonl", map(json.dumps, rows)))
        created = first.client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        while first.client.batches.retrieve(created.id).request_counts.completed == 0:
            time.sleep(0.05)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(store).encode() in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
    before = (store / "batches" / "rows" / f"{created.id}.jsonl").read_bytes()
    assert before.count(b"\n") < 80
    with servers.running(command, tmp_path / "log2.txt", environment) as second:
        done = ended(second.client, created.id)
        assert done.status == "completed"
        written = content(second.client, done.output_file_id) + content(second.client, done.error_file_id)
        assert_same(written, online(second, rows))
        whole = before[: before.rfind(b"\n") + 1]
        assert {one["id"] for one in map(json.loads, whole.splitlines())} <= {one["id"] for one in written}
