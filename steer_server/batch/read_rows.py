"""From lines of the input to rows of the job."""

from __future__ import annotations

from collections.abc import Iterator

from steer_server.batch.identifiers import IdSet, RowSet
from steer_server.batch.rows import URLS, Refused, Request, parse_row
from steer_server.batch.sweep import Sweep, swept


def read_rows(
    groups: Iterator[list[bytes]], finished: RowSet, sweep: Sweep | None = None, urls: tuple[str, ...] = URLS
) -> Iterator[list[Request | Refused]]:
    """Rows that are not finished, in groups as they are read. Each line stands for one row, or one for each setting.

    A row whose custom_id an earlier row had is refused, finished or not.
    """
    sweep = sweep or Sweep()
    seen = IdSet()
    first = 1
    for group in groups:
        rows: list[Request | Refused] = []
        for line in group:
            row = parse_row(first, line, urls)
            expanded = swept(row, sweep, first) if sweep.names and isinstance(row, Request) else [row]
            first += sweep.count
            for one in expanded:
                duplicated = one.custom_id is not None and not seen.add(one.custom_id)
                if one.number in finished:
                    continue
                rows.append(_duplicate(one) if duplicated else one)
        if rows:
            yield rows


def _duplicate(row: Request | Refused) -> Refused:
    message = f"row {row.number}: custom_id {row.custom_id!r} stands in an earlier row"
    return Refused(row.number, row.custom_id, "duplicate_custom_id", message)
