"""Carrying out plans: all steps, or none.

    lock -> nothing pending? -> facts -> reasons (none) -> steps -> journal -> run -> done
                                                             failure, signal -> undo in reverse -> guest as before

The journal is written before the first step and removed when all is done or undone. When this process dies between,
`recover` undoes the steps that may have begun, or finishes an operation that had taken effect already.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace

from snapshot import (
    active,
    agent,
    gather,
    migration,
    plan_delete,
    plan_revert,
    plan_revert_reasons,
    records,
)
from snapshot.actions import ACTIONS
from snapshot.against import reasons
from snapshot.domain import ActiveDomain, Domain, DomainFacts
from snapshot.errors import DomainSnapshotError, NotPossible, RecoverNeeded, UndoFailed
from snapshot.journal import Journal, Operation
from snapshot.model import (
    DeleteOptions,
    DomainSnapshot,
    Liveness,
    RevertOptions,
    SnapshotRequest,
    free_name,
)
from snapshot.plan import Resolved, resolve, steps
from snapshot.plan_revert_request import Way, after_keeping
from snapshot.qmp import Qmp, listening
from snapshot.session import Progress, Session, Store
from snapshot.step import Step

#: Seconds to wait for another domsnap that works on the domain.
LOCK_WAIT = 30.0


def create(
    domain: Domain,
    catalog: Store,
    request: SnapshotRequest,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    wait: float = LOCK_WAIT,
) -> DomainSnapshot | list[Step]:
    """Take a snapshot of a domain.

    Args:
        domain: active or inactive.
        catalog: where it is entered.
        request: what is asked for.
        dry_run: only say what would be done.
        progress: called with each step, and with the progress of long ones.
        wait: seconds to wait for another domsnap.

    Returns: the snapshot; the steps for a dry run.

    Raises:
        NotPossible: with everything that is against it; nothing was touched.
        DomainBusy, RecoverNeeded: nothing was touched.
        UndoFailed: it failed, and could not be undone wholly.
        DomainSnapshotError, QcowError: it failed, and everything was undone.
    """
    with _exclusive(catalog, wait, dry_run=dry_run) as journal:
        taking = _taking(domain, catalog, journal, request, dry_run, progress)
        if dry_run:
            return taking.plan
        session = _session(domain, catalog, journal, taking.resolved.facts, progress)
        session.draft = taking.draft
        run(session, _operation("create", session.draft.name, domain, taking.resolved.facts, taking.token, taking.plan))
        return session.draft


@dataclass(frozen=True)
class _Taking:
    """A snapshot that nothing is against."""

    resolved: Resolved
    token: str
    plan: list[Step]
    draft: DomainSnapshot


def _taking(
    domain: Domain,
    catalog: Store,
    journal: Journal,
    request: SnapshotRequest,
    dry_run: bool,
    progress: Progress | None,
) -> _Taking:
    """Plan a snapshot. Raises NotPossible."""
    layers = journal.layers()
    facts = domain.facts(layers)
    taken = [one.name for one in catalog.load()]
    if request.numbered:
        inside = [text for disk in facts.disks for one in disk.snapshots for text in (one.name, one.id)]
        request = replace(request, name=free_name(request.name, taken + inside))
    resolved = resolve(request, facts, journal.made())
    against = reasons(resolved, gather.host_facts(resolved.paths()), taken)
    if request.quiesce and facts.active and facts.agent_socket is not None:
        # Once an operation has begun, an agent that is not there could not be asked to thaw either.
        problem = agent.problem(facts.agent_socket)
        against += [] if problem is None else [problem]
    _refuse(f"create snapshot '{request.name}'", against)
    if resolved.liveness is Liveness.BACKGROUND and isinstance(domain, ActiveDomain):
        resolved = _background_or_live(domain, resolved, dry_run, progress)
    token = secrets.token_hex(4)
    current = catalog.current
    undo = {"current": current, "layers_before": layers}
    plan = [replace(s, arguments=s.arguments | undo) if s.action == "record" else s for s in steps(resolved, token)]
    return _Taking(resolved, token, plan, records.draft(resolved, current))


def revert(
    domain: Domain,
    catalog: Store,
    name: str,
    options: RevertOptions,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    wait: float = LOCK_WAIT,
) -> DomainSnapshot | list[Step]:
    """Go back to a snapshot; unless the present state is given up, it is kept in a safety snapshot first.

    Args:
        domain: active or inactive.
        catalog: where the snapshot is entered.
        name: of the snapshot.
        options: how.
        dry_run, progress, wait: as for `create`.

    Returns: the snapshot that was gone back to; the steps for a dry run, those of the safety snapshot first.

    Raises:
        NoSuchDomainSnapshot, NotPossible, DomainBusy, RecoverNeeded: nothing was touched.
        RecoverNeeded: also when it took effect, but its last steps failed.
        UndoFailed: it failed, and could not be undone wholly.
        DomainSnapshotError, QcowError: it failed, and everything was undone, the safety snapshot included.
    """
    with _exclusive(catalog, wait, dry_run=dry_run) as journal:
        snapshot = gather.find(catalog, name, domain.facts(journal.layers()))
        request = gather.revert_request(domain, catalog, journal, snapshot, options)
        _refuse(f"revert to '{name}'", plan_revert_reasons.reasons(request))
        session = _session(domain, catalog, journal, request.facts, progress)
        plan: list[Step] = []
        if not options.discard_current:
            keeping = _taking(domain, catalog, journal, gather.safety_request(request), dry_run, progress)
            session.draft = keeping.draft
            # One operation: what fails later undoes this too.
            plan = [replace(step, commits=False) for step in keeping.plan]
            if not request.facts.active:
                plan.append(Step("let-go", {}, "give the images free"))
            request = after_keeping(request, keeping.resolved, keeping.token)
        plan += plan_revert.steps(request)
        if dry_run:
            return plan
        run(session, _operation("revert", name, domain, request.facts, request.token, plan))
        if isinstance(domain, ActiveDomain) and request.way is Way.RESTART:
            domain.qmp = Qmp(domain.qmp.path)
        return snapshot


def delete(
    domain: Domain,
    catalog: Store,
    name: str,
    options: DeleteOptions,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    wait: float = LOCK_WAIT,
) -> list[str] | list[Step]:
    """Delete a snapshot: what is only in it goes, every other state stays as it is.

    Args:
        domain: active or inactive.
        catalog: where the snapshot is entered.
        name: of the snapshot.
        options: how.
        dry_run, progress, wait: as for `create`.

    Returns: the names of what was deleted; the steps for a dry run.

    Raises:
        NoSuchDomainSnapshot, NotPossible, DomainBusy: nothing was touched.
        RecoverNeeded: it failed half-way (a full disk, a signal, the death of QEMU): `recover` finishes it.
    """
    with _exclusive(catalog, wait, dry_run=dry_run) as journal:
        gather.find(catalog, name, domain.facts(journal.layers()))
        names = [*_descendants(catalog.load(), name), name] if options.children else [name]
        plan: list[Step] = []
        for number, one in enumerate(names):
            request = gather.delete_request(domain, catalog, journal, one, options)
            against = plan_delete.reasons(request)
            if against and dry_run and number:
                plan.append(Step("", {}, f"delete '{one}', unless this is still so by then: {'; '.join(against)}"))
                continue
            if against and number:
                against.append(f"deleted already: {', '.join(names[:number])}")
            _refuse(f"delete snapshot '{one}'", against)
            steps_of_one = plan_delete.steps(request)
            plan += steps_of_one
            if not dry_run:
                session = _session(domain, catalog, journal, request.facts, progress)
                run(session, _operation("delete", one, domain, request.facts, request.token, steps_of_one))
        return plan if dry_run else names


def _descendants(snapshots: list[DomainSnapshot], name: str) -> list[str]:
    """Names of all that come from a snapshot, the farthest first."""
    found: list[str] = []
    level = [name]
    while level:
        level = [one.name for one in snapshots if one.parent in level and one.name not in found]
        found += level
    return found[::-1]


def _refuse(what: str, against: list[str]) -> None:
    if against:
        raise NotPossible(what, against)


def recover(domain: Domain, catalog: Store, *, progress: Progress | None = None, wait: float = LOCK_WAIT) -> list[str]:
    """Undo or finish the operation that was cut off.

    Args:
        domain: the same domain; active or inactive, as it is now.
        catalog: its catalog.
        progress: called with each step.
        wait: seconds to wait for another domsnap.

    Returns: what was done, for people; empty when nothing was pending.

    Raises:
        UndoFailed: something could not be undone; the journal is kept.
        DomainSnapshotError: the domain's QEMU runs and was not given.
    """
    journal = Journal(os.fspath(catalog.directory))
    with _host_errors(), journal.locked(wait):
        pending = journal.pending()
        if pending is None:
            return []
        operation = pending.operation
        if not isinstance(domain, ActiveDomain) and operation.socket is not None and listening(operation.socket):
            raise DomainSnapshotError(f"the domain's QEMU still runs: give its QMP socket '{operation.socket}'")
        session = _session(domain, catalog, journal, None, progress)
        session.was_running, session.agent_socket = operation.was_running, operation.agent_socket
        session.interrupt.deaf = True
        journal.resume()
        name = f"{operation.kind} of '{operation.name}'"
        try:
            if pending.committed:
                last = next(i for i, step in enumerate(operation.steps) if step.commits)
                for index in range(last + 1, len(operation.steps)):
                    step = operation.steps[index]
                    session.report(step.text, index, len(operation.steps))
                    ACTIONS[step.action].do(session, step.arguments)
                done = f"finished the {name}"
            else:
                failures = _undo(session, operation, pending.begun)
                if failures:
                    raise UndoFailed(DomainSnapshotError(f"the {name} was cut off"), failures)
                done = f"undid the {name}"
            journal.finish()
            return [done]
        finally:
            journal.leave()
            session.release()


def run(session: Session, operation: Operation) -> None:
    """Run an operation; on failure or signal undo it."""
    journal, plan = session.journal, operation.steps
    begun: set[int] = set()
    committed = False
    with session.interrupt.listening():
        try:
            journal.start(operation)
            for index, step in enumerate(plan):
                if index not in begun:
                    group = _group(plan, index)
                    begun.update(group)
                    journal.begin(group)
                session.report(step.text, index, len(plan))
                if not committed:
                    session.interrupt.check()
                ACTIONS[step.action].do(session, step.arguments)
                if step.commits:
                    journal.commit()
                    committed = True
            journal.finish()
        except BaseException as error:
            if committed:
                raise RecoverNeeded(
                    f"the {operation.kind} of '{operation.name}' has taken effect, but its last step failed: {error}; "
                    "run recover to finish it"
                ) from error
            session.interrupt.deaf = True
            failures = _undo(session, operation, begun)
            if failures:
                raise UndoFailed(error, failures) from error
            journal.finish()
            raise
        finally:
            journal.leave()
            session.release()


def _group(plan: tuple[Step, ...], index: int) -> list[int]:
    """A step, and those behind it that run while the guest stands: noted together, no sync adds to the pause."""
    last = index + 1
    while last < len(plan) and plan[last].paused:
        last += 1
    return list(range(index, last))


def _undo(session: Session, operation: Operation, begun: set[int]) -> list[str]:
    """Undo steps in reverse; returns what could not be undone.

    After a failure only those go on that touch no file of a disk: the rest may depend on what failed.
    """
    failures: list[str] = []
    session.parted = any(operation.steps[index].action == "part" for index in begun)
    broken = False
    for index in sorted(begun, reverse=True):
        step = operation.steps[index]
        action = ACTIONS[step.action]
        if broken and not action.always:
            continue
        try:
            action.undo(session, step.arguments)
        except Exception as error:  # whatever it is, the guest must not stay stopped because of it
            failures.append(f"{step.text}: {error}")
            broken = broken or not action.apart
    try:
        active.ensure_running(session, {})
    except Exception as error:
        failures.append(f"resume the guest: {error}")
    return failures


@contextlib.contextmanager
def _host_errors() -> Iterator[None]:
    """The host's errors as ours; everything has been undone when they come here."""
    try:
        yield
    except OSError as error:
        name = f"'{error.filename}': " if error.filename else ""
        raise DomainSnapshotError(f"{name}{error.strerror or error}") from error


@contextlib.contextmanager
def _exclusive(catalog: Store, wait: float, *, dry_run: bool) -> Iterator[Journal]:
    """The domain's journal, with nobody else at it and nothing pending."""
    journal = Journal(os.fspath(catalog.directory))
    with _host_errors(), contextlib.nullcontext() if dry_run else journal.locked(wait):
        pending = journal.pending()
        if pending is not None:
            raise RecoverNeeded(
                f"an earlier {pending.operation.kind} of '{pending.operation.name}' was cut off: run recover first"
            )
        yield journal


def _session(
    domain: Domain, catalog: Store, journal: Journal, facts: DomainFacts | None, progress: Progress | None
) -> Session:
    return Session(
        domain.qmp if isinstance(domain, ActiveDomain) else None,
        catalog,
        journal,
        facts=facts,
        was_running=facts is not None and facts.run_state == "running",
        agent_socket=None if facts is None else facts.agent_socket,
        progress=progress,
    )


def _operation(kind: str, name: str, domain: Domain, facts: DomainFacts, token: str, plan: list[Step]) -> Operation:
    return Operation(
        kind=kind,
        name=name,
        domain=facts.name,
        token=token,
        socket=domain.qmp.path if isinstance(domain, ActiveDomain) else None,
        agent_socket=facts.agent_socket,
        was_running=facts.run_state == "running",
        steps=tuple(plan),
    )


def _background_or_live(domain: ActiveDomain, resolved: Resolved, dry_run: bool, progress: Progress | None) -> Resolved:
    """Live where a background snapshot is not possible; says so. Asking changes a setting: not for a dry run."""
    tell = progress or (lambda _text, _done, _total: None)
    if dry_run:
        tell(
            "whether background snapshots are possible here is only tried when one is taken; else it is a live one",
            0,
            0,
        )
        return resolved
    reason = migration.background_possible(domain.qmp)
    if reason is None:
        return resolved
    tell(f"background snapshots are not possible here (QEMU: {reason}): taking it live", 0, 0)
    return replace(resolved, liveness=Liveness.LIVE)
