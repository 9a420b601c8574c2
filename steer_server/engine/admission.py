"""The one point that every steered request passes, whatever carried it."""

from __future__ import annotations

from steer_server.catalog import Catalog, open_catalog
from steer_server.engine.config import SteeringConfig
from steer_server.engine.row_budget import Lease, RowBudget
from steer_server.plan import (
    AppliedEntry,
    Entry,
    GateRecord,
    Plan,
    Receipt,
    Resolved,
    TokenCounts,
    TokenSpans,
    applied_tokens,
    encode_plan,
    resolve,
)
from steer_server.spec import SteeringError, parse_spec


class NotAppliedError(RuntimeError):
    """The workers did not do what was asked. The request fails rather than pass for steered."""


class AdmittedSteering:
    """The steering of one client request, and where the receipts of its sequences come together.

    One client request may run several sequences: choices (`n`), prompts of a completion, turns with tools.
    """

    def __init__(self, resolved: Resolved, lease: Lease | None) -> None:
        self.plan: Plan = resolved.plan
        self.encoded_plan: bytes = encode_plan(resolved.plan)
        self.entries: tuple[Entry, ...] = resolved.entries
        self._warnings = resolved.warnings
        self._lease = lease
        self._counts = [TokenCounts() for _ in resolved.entries]
        self._running = 0

    def __deepcopy__(self, memo: dict[int, object]) -> AdmittedSteering:
        # vLLM clones sampling parameters; the copies belong to the same client request.
        return self

    def __repr__(self) -> str:
        return f"AdmittedSteering({self.plan.fingerprint}, {len(self.plan.edits)} edits)"

    def start_sequence(self, prompt_len: int) -> Sequence:
        self._running += 1
        return Sequence(self, prompt_len)

    def finish_sequence(self, applied: list[TokenCounts]) -> None:
        for total, counts in zip(self._counts, applied, strict=True):
            total.add(counts)
        self._running -= 1
        if self._running == 0 and self._lease is not None:
            self._lease.release()

    def receipt(self) -> Receipt:
        """Over all sequences that finished."""
        conditional = bool(self.plan.when)
        applied = tuple(
            AppliedEntry(entry.source, entry.op, entry.layers, n.tokens, n.cached, n.closed if conditional else None)
            for entry, n in zip(self.entries, self._counts, strict=True)
        )
        return Receipt(applied, self.plan.fingerprint, self._warnings)


class Sequence:
    """One sequence of an admitted request: what the workers say they computed of it."""

    def __init__(self, admitted: AdmittedSteering, prompt_len: int) -> None:
        self.admitted = admitted
        self._prompt_len = prompt_len
        self._computed = TokenSpans()
        self._missing: set[str] = set()
        self._gate = GateRecord() if admitted.plan.when else None

    def add_report(
        self, spans: list[tuple[int, int]], missing_sites: list[str], gates: list[tuple[int, bytes]]
    ) -> None:
        """gates: (first position, OPEN or CLOSED for it and those behind it), in the order of computation."""
        for start, end in spans:
            self._computed.add(start, end)
        self._missing.update(missing_sites)
        if self._gate is not None:
            for first, said in gates:
                self._gate.add(first, said)

    def finish(self, num_output_tokens: int, aborted: bool) -> None:
        """Close the sequence and add it to the request's receipt.

        num_output_tokens: tokens returned to the client; the last one was never fed to the model.
        Raises NotAppliedError where a finished sequence was not steered as asked.
        """
        length = self._computed.end if aborted else self._prompt_len + max(num_output_tokens, 1) - 1
        applied: list[TokenCounts] = []
        unsaid: ValueError | None = None
        for entry in self.admitted.entries:
            try:
                applied.append(applied_tokens(entry.target, self._prompt_len, length, self._computed, self._gate))
            except ValueError as error:
                applied.append(TokenCounts())
                unsaid = error
        self.admitted.finish_sequence(applied)
        if aborted:
            return
        if self._missing:
            sites = ", ".join(sorted(self._missing))
            raise NotAppliedError(f"steering was not applied at {sites}; the answer is withheld")
        if self._computed.end < length:
            raise NotAppliedError(
                f"steering was counted up to token {self._computed.end} of {length}; the answer is withheld"
            )
        if unsaid is not None:
            raise NotAppliedError(f"{unsaid}; the answer is withheld")


class Admission:
    """Validates, resolves and, where memory is short, reserves."""

    def __init__(self, config: SteeringConfig) -> None:
        self.config = config
        self.catalog: Catalog = open_catalog(config.saes, config.d_model, config.layers)
        self._budget = None if config.budget is None else RowBudget(config.budget)
        self._layers = frozenset(config.layers)

    def admit(self, value: object, choices: int = 1, root: str = "steering") -> AdmittedSteering:
        """Turn what a client sent (an object, or its JSON text) into a plan. Raises SteeringError.

        choices: sequences per prompt (`n`). root: the field that carried it, the start of paths in errors.
        """
        spec = parse_spec(value, root)
        resolved = resolve(spec, self.catalog, self.config.d_model, self._layers, self.config.limits, root)
        inline = choices * sum(len(row) for row in resolved.plan.rows.values())
        if inline > self.config.limits.max_inline_bytes:
            raise SteeringError(
                f"{root}: inline vectors times n={choices} are {inline} bytes; "
                f"this server takes {self.config.limits.max_inline_bytes}",
                root,
            )
        lease = None if self._budget is None else self._budget.lease(resolved.plan.row_refs(), root)
        return AdmittedSteering(resolved, lease)
