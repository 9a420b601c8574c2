"""`steer-server batch --ray` on a real cluster of two workers: the rows of the local run, whatever is killed."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.batch.stub import results, write_lines
from tests.e2e import servers
from tests.e2e.batch_cases import batch, comparable, row

ray = pytest.importorskip("ray", reason="needs steer-server[ray]")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

ROWS = 160
FLAGS = ["--enforce-eager", "--max-num-seqs", "16"]
# Two engines on the same cores: threads that spin for each other's time would starve both.
SHARED = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, with room for one replica and Ray Data's own tasks on each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHARED.items():
            patch.setenv(name, value)
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        started.add_node(num_cpus=2)
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    lines = [json.dumps(row(i)) for i in range(ROWS)]
    lines[20], lines[31] = "not json", lines[30]
    return write_lines(tmp_path_factory.mktemp("ray") / "in.jsonl", lines)


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    """What the same command says without Ray."""
    output = tmp_path_factory.mktemp("local") / "out.jsonl"
    assert batch("-i", source, "-o", output, *FLAGS).returncode == 2
    return by_number(results(output))


def by_number(rows):
    found = {int(one["id"].rpartition("_")[2]): one for one in rows}
    assert len(found) == len(rows)
    return found


def without_ids(one):
    response = one["response"]
    answered = response and (response["status_code"], comparable(response["body"]))
    return one["custom_id"], answered, one["error"]


def assert_equal(rows, local):
    assert rows.keys() == local.keys()
    for number, one in rows.items():
        assert without_ids(one) == without_ids(local[number]), number


@contextlib.contextmanager
def running(cluster, source, output, *flags):
    command = servers.steer_server("batch", "-i", str(source), "-o", str(output), *FLAGS)
    command += ["--ray", "--ray-address", cluster.address, "--concurrency", "2", "--log-format", "json", *flags]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | SHARED
    )
    try:
        yield process
    finally:
        process.kill()


def replicas():
    """Processes of the actors that hold engines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"MapBatches(Replica)" in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_for_parts(process, output, count):
    while True:
        parts = list(output.with_name(f"{output.name}.ray").glob("*/checkpoint/**/*.parquet"))
        if len(parts) >= count:
            return parts
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)


def test_one_of_two_workers_is_killed(cluster, source, local, tmp_path):
    output = tmp_path / "out.jsonl"
    with running(cluster, source, output) as process:
        wait_for_parts(process, output, 2)
        victims = replicas()
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        _, said = process.communicate(timeout=900)
        assert process.returncode == 2, said[-3000:]
    assert_equal(by_number(results(output)), local)
    summary = [json.loads(text) for text in said.splitlines() if text.startswith('{"event": "summary"')][-1]
    assert (summary["rows"], summary["finished_now"]) == (ROWS, ROWS)
    assert summary["failures"]["invalid_json"] == summary["failures"]["duplicate_custom_id"] == 1
    assert not output.with_name("out.jsonl.ray").exists()


def test_the_job_is_killed_and_resumed(cluster, source, local, tmp_path):
    output = tmp_path / "out.jsonl.gz"
    with running(cluster, source, output) as process:
        wait_for_parts(process, output, 2)
        process.kill()
        process.wait()
    restarted = time.time()
    with running(cluster, source, output, "--resume") as process:
        _, said = process.communicate(timeout=900)
        assert process.returncode == 2, said[-3000:]
    rows = by_number(results(output))
    assert_equal(rows, local)
    # Ray's checkpoint kept what was finished: those answers are from before.
    times = [one["response"]["body"].get("created") for one in rows.values() if one["response"]]
    before = [t for t in times if t is not None and t < restarted - 1]
    assert len(before) >= 2 * (ROWS // 16) // 2
    another = batch("-i", source, "-o", output, "--enforce-eager", "--dtype", "bfloat16", "--resume", "--ray")
    assert another.returncode == 1
    assert "options.vllm.--dtype was not given" in another.stderr
