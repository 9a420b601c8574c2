"""Sets of many members in little memory."""

from __future__ import annotations

from hashlib import blake2b

_SLOT = 16
_EMPTY = bytes(_SLOT)


class IdSet:
    """Which ids were seen: 16 bytes of a hash each, in a table that is at most 60 % full.

    Two different ids are taken for one with a probability of n^2 / 2^129, which is nothing.
    """

    def __init__(self) -> None:
        self._bits = 10
        self._table = bytearray(_SLOT << self._bits)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, identifier: str) -> bool:
        """Whether it is new."""
        if not self._insert(blake2b(identifier.encode(errors="surrogatepass"), digest_size=_SLOT).digest()):
            return False
        self._count += 1
        if self._count * 10 > 6 << self._bits:
            self._grow()
        return True

    def _insert(self, digest: bytes) -> bool:
        table, mask = self._table, (1 << self._bits) - 1
        place = int.from_bytes(digest[:8], "little") & mask
        while True:
            held = table[place * _SLOT : (place + 1) * _SLOT]
            if held == digest:
                return False
            if held == _EMPTY:
                table[place * _SLOT : (place + 1) * _SLOT] = digest
                return True
            place = (place + 1) & mask

    def _grow(self) -> None:
        old = self._table
        self._bits += 1
        self._table = bytearray(_SLOT << self._bits)
        for start in range(0, len(old), _SLOT):
            digest = bytes(old[start : start + _SLOT])
            if digest != _EMPTY:
                self._insert(digest)


class RowSet:
    """Which row numbers are finished, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        index, bit = divmod(number, 8)
        return index < len(self._bits) and bool(self._bits[index] >> bit & 1)

    def add(self, number: int) -> None:
        if number in self:
            return
        index, bit = divmod(number, 8)
        if index >= len(self._bits):
            self._bits.extend(bytes(max(index + 1 - len(self._bits), len(self._bits))))
        self._bits[index] |= 1 << bit
        self._count += 1
