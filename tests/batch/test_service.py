"""The server's batches, against the stub: expiry, restarts, what went missing. tests/e2e drives them over HTTP."""

import asyncio
import json

import pytest

from steer_server.batch.service import BatchService
from steer_server.batch.store import BatchStore, NotStoredError, now
from tests.batch.stub import StubEngine, line, write_lines


@pytest.fixture
def store(tmp_path):
    return BatchStore(tmp_path / "batches")


def uploaded(store, lines, expires_at=None):
    scratch = write_lines(store.scratch_path(), lines)
    return store.add_file(scratch, "in.jsonl", "batch", expires_at)["id"]


def opened(store, service, file, expires_at=None, **fields):
    body = {
        "endpoint": "/v1/completions",
        "input_file_id": file,
        "status": "validating",
        "in_progress_at": None,
        "expires_at": expires_at or now() + 86400,
        "output_file_id": None,
        "error_file_id": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
    }
    return store.add_batch(body | fields, service.engine_facts)["id"]


async def started(store, engine=None):
    service = BatchService(store, engine or StubEngine())
    await service.start()
    return service


async def ended(store, identifier):
    while (batch := store.batch(identifier))["status"] in ("validating", "in_progress", "finalizing", "cancelling"):
        await asyncio.sleep(0.01)
    # The last thing that is done with a batch that was run.
    while batch["status"] != "failed" and store.rows_path(identifier).exists():
        await asyncio.sleep(0.01)
    return batch


def content(store, file):
    return [] if file is None else [json.loads(text) for text in store.file_path(file).read_text().splitlines()]


async def test_good_and_bad_rows(store):
    service = await started(store)
    file = uploaded(store, [line("a"), "bad", line("b", "fail"), line("a"), line("c")])
    identifier = opened(store, service, file)
    service.submit(identifier)
    batch = await ended(store, identifier)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    assert {row["custom_id"] for row in content(store, batch["output_file_id"])} == {"a", "c"}
    codes = sorted(row["error"]["code"] if row["error"] else "400" for row in content(store, batch["error_file_id"]))
    assert codes == ["400", "duplicate_custom_id", "invalid_json"]


async def test_nothing_failed_means_no_error_file(store):
    service = await started(store)
    identifier = opened(store, service, uploaded(store, [line("a")]))
    service.submit(identifier)
    assert (await ended(store, identifier))["error_file_id"] is None


async def test_a_batch_whose_time_is_over(store):
    service = await started(store, StubEngine(delay=0.2))
    service._engine.in_flight = 1
    file = uploaded(store, [line(f"r{i}") for i in range(50)])
    identifier = opened(store, service, file, expires_at=now() + 5)
    service.submit(identifier)
    batch = await ended(store, identifier)
    assert batch["status"] == "expired"
    done, failed = content(store, batch["output_file_id"]), content(store, batch["error_file_id"])
    assert 0 < len(done) < 50
    assert sorted(row["custom_id"] for row in done + failed) == sorted(f"r{i}" for i in range(50))
    assert {row["error"]["code"] for row in failed} == {"batch_expired"}
    assert batch["request_counts"] == {"total": 50, "completed": len(done), "failed": len(failed)}


async def test_a_restart_goes_on_with_the_same_engine_only(store):
    first = await started(store, StubEngine(delay=0.1))
    first._engine.in_flight = 32
    file = uploaded(store, [line(f"r{i}") for i in range(40)])
    identifier = opened(store, first, file)
    first.submit(identifier)
    while store.batch(identifier)["status"] != "in_progress" or not store.rows_path(identifier).stat().st_size:
        await asyncio.sleep(0.01)
    await first.stop()
    before = store.rows_path(identifier).read_bytes()
    assert store.batch(identifier)["status"] == "in_progress"
    another = await started(store, StubEngine(model="another"))
    await asyncio.sleep(0.1)
    assert another._engine.asked == []
    second = await started(store)
    batch = await ended(store, identifier)
    assert batch["status"] == "completed"
    rows = content(store, batch["output_file_id"])
    assert sorted(row["custom_id"] for row in rows) == sorted(f"r{i}" for i in range(40))
    assert len(second._engine.asked) == 40 - before.count(b"\n")


async def test_a_kill_while_finalising_makes_the_same_files(store):
    service = await started(store)
    file = uploaded(store, [line("a"), "bad"])
    identifier = opened(store, service, file)
    service.submit(identifier)
    first = await ended(store, identifier)
    kept = store.file_path(first["output_file_id"])
    # As if the last step had not been written: the rows are there, the batch is open.
    store.rows_path(identifier).write_bytes(kept.read_bytes() + store.file_path(first["error_file_id"]).read_bytes())
    store.update_batch(identifier, ("completed",), status="finalizing", output_file_id=None, error_file_id=None)
    again = await started(store)
    second = await ended(store, identifier)
    assert again._engine.asked == []
    names = ("output_file_id", "error_file_id", "request_counts")
    assert [second[name] for name in names] == [first[name] for name in names]
    assert len(store.files("batch_output", None, 10, "asc")) == 2


async def test_two_servers_share_a_store(store):
    """One that starts while the other is at a batch leaves it alone."""
    first = await started(store, StubEngine(delay=0.05))
    identifier = opened(store, first, uploaded(store, [line(f"r{i}") for i in range(30)]))
    first.submit(identifier)
    while not store.rows_path(identifier).exists():
        await asyncio.sleep(0.01)
    second = await started(store)
    batch = await ended(store, identifier)
    assert second._engine.asked == []
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}


async def test_cancelled_before_it_began(store):
    service = await started(store)
    identifier = opened(store, service, uploaded(store, [line("a")]), status="cancelling")
    service.submit(identifier)
    batch = await ended(store, identifier)
    assert (batch["status"], batch["output_file_id"]) == ("cancelled", None)


async def test_an_input_that_is_gone(store):
    service = await started(store)
    file = uploaded(store, [line("a")])
    identifier = opened(store, service, file)
    store.delete_file(file)
    service.submit(identifier)
    batch = await ended(store, identifier)
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["param"] == "input_file_id"


def test_files_expire(store, monkeypatch):
    def hours_pass(hours):
        later = now() + 3600 * hours
        monkeypatch.setattr("steer_server.batch.store.now", lambda: later)

    file = uploaded(store, ["x"], expires_at=now() + 3600)
    path = store.file_path(file)
    assert store.file(file)["bytes"] == 2
    hours_pass(1)
    assert store.files(None, None, 10, "desc") == []
    with pytest.raises(NotStoredError):
        store.file(file)
    assert not path.exists()
    other = uploaded(store, ["x"], expires_at=now() + 7200)
    hours_pass(2)
    store.delete_expired()
    assert not store.file_path(other).exists()
    assert store.stored_bytes() == 0


def test_pages(store):
    names = [uploaded(store, [str(i)]) for i in range(5)]
    assert [f["id"] for f in store.files(None, None, 2, "asc")] == names[:3]
    assert [f["id"] for f in store.files(None, names[1], 10, "asc")] == names[2:]
    assert [f["id"] for f in store.files("batch", names[1], 10, "desc")] == names[:1]
    assert store.files("other", None, 10, "asc") == []
    batches = [store.add_batch({"status": "completed"}, "e")["id"] for _ in range(3)]
    assert [b["id"] for b in store.batches(None, 10)] == batches[::-1]
    assert [b["id"] for b in store.batches(batches[2], 1)] == [batches[1], batches[0]]


@pytest.mark.parametrize("name", ["", "file-", "../x", "file-" + "0" * 23 + "/", "file-" + "g" * 24, "/etc/passwd"])
def test_no_path_is_made_of_what_is_not_an_id(store, name):
    for made in (store.file_path, store.rows_path, store.file, store.batch, store.delete_file):
        with pytest.raises(NotStoredError):
            made(name)
