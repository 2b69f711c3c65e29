"""Who may open a volume or device: any number of readers, or exactly one writer. (Or several VMs whose guests settle it
among themselves, by the reservations of a LUN.)

Of a disk with several layers the top one is claimed for writing, those below for reading: two VMs may build on one
base.
A claim is kept by what is really behind a name: a file by its path without symbolic links, a block device by its major
and minor number, so that two names of one thing are one claim. All claims on one thing are one entry of the store
("claim/<thing>"), hence compare-and-swap on it decides every race; "claim-of/<vm>" lists a VM's things, so that a
release needs not look at everybody's. Plans are transactions: the host commits them together with a VM's record.

QEMU's image locks are the second line of defence, and the one that also sees hard links.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from hostler.model.disk import Disk, DiskSource, SourceKind
from hostler.model.errors import Busy, InUse, NotFound, WrongState
from hostler.model.volume import Claim
from hostler.store.contract import ABSENT, Check, CheckFailed, Delete, Entry, Put, Store, Transaction

_CLAIMS = TypeAdapter(tuple[Claim, ...])
_PATHS = TypeAdapter(tuple[str, ...])
_TRIES = 20
"""Lost races with other VMs' claims on the same things before we say so."""

KEEPER = "(volume service)"
"""Holder of the claim that keeps a volume from being opened while it is deleted. No VM id has such characters."""

_JOB = "(job "


@dataclass(frozen=True, slots=True)
class _Held:
    """The claims on one thing, and the revision of the entry (ABSENT if there is none)."""

    path: str
    claims: tuple[Claim, ...]
    revision: int


def job_holder(job: str) -> str:
    """The holder of the claims of a job that works on volumes themselves, without a VM."""
    return f"{_JOB}{job})"


def job_of(holder: str) -> str | None:
    """The job behind a holder, None if it is no job."""
    return holder.removeprefix(_JOB).removesuffix(")") if holder.startswith(_JOB) else None


def thing_of(layer: DiskSource) -> str:
    """The name under which claims on what is behind a layer are kept."""
    return real_path(layer.path, layer.identity)


def real_path(path: str, identity: str = "") -> str:
    """The name under which claims on `path` are kept: the path without symbolic links, or "device:MAJOR:MINOR". A LUN
    goes by what it calls itself, whichever way it is reached, or, without such a name, by target and number."""
    if identity:
        return f"lun:{identity}"
    scheme, mark, rest = path.partition("://")
    if mark:
        return f"{scheme}://{rest.partition('/')[2]}" if scheme == "iscsi" else path
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except OSError:
        return real
    if stat.S_ISBLK(found.st_mode):
        return f"device:{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    return real


class ClaimBook:
    """The claims in a store."""

    def __init__(self, store: Store, name_of: Callable[[str], str] = str) -> None:
        """`name_of` turns a VM's id into its name, for people who are refused something."""
        self._store = store
        self._name_of = name_of

    async def plan_claim(self, vm: str, disks: Iterable[Disk], generation: int) -> Transaction:
        """The transaction that claims `disks` for `vm`, all or none, beside what it has. Idempotent; a higher
        generation replaces the VM's own lower one. InUse names the holder; WrongState when a later owner has it.
        CheckFailed at its commit means that somebody else was faster: plan again."""
        wanted = _wanted(vm, disks, generation)
        held = [await self._held(path) for path in sorted(wanted)]
        writes: list[Put | Delete] = []
        for thing in held:
            claims = thing.claims
            for claim, subject in wanted[thing.path]:
                claims = self._with(claims, claim, subject)
            if claims != thing.claims:
                writes.append(_put(thing.path, claims))
        listed, revision = await self._listed(vm)
        if not set(wanted) <= set(listed):
            writes.append(_put_list(vm, {*listed, *wanted}))
        checks = [Check(_key(thing.path), thing.revision) for thing in held]
        return Transaction(writes, [*checks, Check(_list_key(vm), revision)], durable=bool(writes))

    async def plan_hold(self, vm: str, disks: Sequence[Disk], generation: int) -> Transaction:
        """As `plan_claim`; what `vm` held for these disks before and they do not need any more is given back."""
        plan = await self.plan_claim(vm, disks, generation)
        needed = {real_path(s.path) if s.local else s.path for disk in disks for s in disk.source.layers()}
        ids = {disk.id for disk in disks}
        listed, revision = await self._listed(vm)
        writes = {write.key: write for write in plan.writes}
        checks = {check.key: check for check in plan.checks}
        stay = {*listed, *needed}
        for path in set(listed) - needed:
            thing = await self._held(path)
            keep = tuple(c for c in thing.claims if c.vm != vm or c.disk not in ids)
            if keep != thing.claims:
                writes[_key(path)] = _put(path, keep) if keep else Delete(_key(path))
                checks[_key(path)] = Check(_key(path), thing.revision)
            if all(c.vm != vm for c in keep):
                stay.discard(path)
        writes[_list_key(vm)] = _put_list(vm, stay) if stay else Delete(_list_key(vm))
        checks[_list_key(vm)] = Check(_list_key(vm), revision)
        return Transaction([*writes.values()], [*checks.values()], durable=True)

    async def plan_release(self, vm: str, disks: Sequence[str] | None = None) -> Transaction:
        """The transaction that gives back the claims of `vm` on those disk ids (None: on all). Idempotent."""
        listed, revision = await self._listed(vm)
        checks = [Check(_list_key(vm), revision)]
        writes: list[Put | Delete] = []
        stay: set[str] = set()
        for path in listed:
            thing = await self._held(path)
            keep = tuple(c for c in thing.claims if c.vm != vm or (disks is not None and c.disk not in disks))
            if any(c.vm == vm for c in keep):
                stay.add(path)
            if keep != thing.claims:
                checks.append(Check(_key(path), thing.revision))
                writes.append(_put(path, keep) if keep else Delete(_key(path)))
        if stay != set(listed):
            writes.append(_put_list(vm, stay) if stay else Delete(_list_key(vm)))
        return Transaction(writes, checks)

    async def plan_exactly(self, vm: str, disks: Sequence[Disk], generation: int) -> Transaction:
        """The transaction after which `vm` claims for each of these disks what that disk is made of, and nothing else:
        what the disk was made of before is given back. For others of its disks nothing changes. Idempotent; errors as
        `plan_claim`."""
        wanted = _wanted(vm, disks, generation)
        ids = {disk.id for disk in disks}
        listed, revision = await self._listed(vm)
        writes: list[Put | Delete] = []
        checks = [Check(_list_key(vm), revision)]
        mine: set[str] = set()
        for path in sorted({*listed, *wanted}):
            thing = await self._held(path)
            here = wanted.get(path, ())
            keep = {claim.disk for claim, _ in here}
            claims = tuple(c for c in thing.claims if c.vm != vm or c.disk not in ids or c.disk in keep)
            for claim, subject in here:
                claims = self._with(claims, claim, subject)
            if any(c.vm == vm for c in claims):
                mine.add(path)
            if claims != thing.claims:
                checks.append(Check(_key(path), thing.revision))
                writes.append(_put(path, claims) if claims else Delete(_key(path)))
        if mine != set(listed):
            writes.append(_put_list(vm, mine) if mine else Delete(_list_key(vm)))
        return Transaction(writes, checks, durable=bool(writes))

    async def claim(self, vm: str, disks: Sequence[Disk], generation: int) -> None:
        """Claim in one durable transaction of its own. Errors as `plan_claim`, Busy when it always loses the race."""
        for _ in range(_TRIES):
            try:
                await self._store.commit(await self.plan_claim(vm, disks, generation))
            except CheckFailed:
                continue
            return
        raise _lost(vm)

    async def release(self, vm: str, disks: Sequence[str] | None = None) -> None:
        """Give claims back in one transaction of its own. Harmless when there are none."""
        for _ in range(_TRIES):
            plan = await self.plan_release(vm, disks)
            if not plan.writes:
                return
            try:
                await self._store.commit(plan)
            except CheckFailed:
                continue
            return
        raise _lost(vm)

    async def hold(self, job: str, paths: Mapping[str, bool], generation: int = 0) -> None:
        """Claim files for a job: for each path whether it writes. All or none; errors as `claim`, and Busy when another
        job works on one. No VM can open what a job writes, nor write what it reads, until `let_go`."""
        disks = [_as_disk(number, path, write) for number, (path, write) in enumerate(sorted(paths.items()))]
        await self.claim(job_holder(job), disks, generation)

    async def let_go(self, job: str) -> None:
        """End `hold`. Harmless when nothing is held."""
        await self.release(job_holder(job))

    async def on(self, path: str, identity: str = "") -> tuple[Claim, ...]:
        """The claims on the file, device or LUN with that name."""
        return (await self._held(real_path(path, identity))).claims

    async def of(self, vm: str) -> tuple[Claim, ...]:
        """The claims of a VM, ordered by path."""
        listed, _ = await self._listed(vm)
        return tuple([c for path in sorted(listed) for c in (await self._held(path)).claims if c.vm == vm])

    async def plan_keep(self, path: str, identity: str = "") -> Transaction:
        """The transaction that takes a thing away from everybody, for deleting it. InUse names a holder."""
        thing = await self._held(real_path(path, identity))
        keeper = Claim(path=thing.path, vm=KEEPER, disk="", write=True, generation=0)
        if thing.claims != (keeper,):
            self.refuse(thing.claims, f"volume {path}")
        return Transaction([_put(thing.path, (keeper,))], [Check(_key(thing.path), thing.revision)], durable=True)

    def drop_keep(self, path: str) -> Delete:
        """The write that ends `plan_keep`. Only the holder of that claim may use it."""
        return Delete(_key(real_path(path)))

    def refuse(self, claims: Sequence[Claim], subject: str) -> None:
        """Raises InUse naming the first holder, if there is one; Busy if it is a job."""
        if not claims:
            return
        holder = claims[0]
        if holder.vm == KEEPER:
            raise NotFound(subject, "is being deleted", "choose another one")
        job = job_of(holder.vm)
        if job is not None:
            raise Busy(
                subject,
                f"a job works on it ({job[:8]})",
                f"wait for it with 'hostler job watch {job[:8]}', or cancel it",
                job=job,
            )
        raise InUse(
            subject,
            f"is disk {holder.disk} of VM {self._name_of(holder.vm)}",
            "detach it there first, or stop that VM",
            holder=holder.vm,
            disk=holder.disk,
        )

    def _with(self, claims: tuple[Claim, ...], new: Claim, subject: str) -> tuple[Claim, ...]:
        """The claims on one thing with one more, or the refusal, which calls the thing as its asker did."""
        mine = next((c for c in claims if c.vm == new.vm and c.disk == new.disk), None)
        if mine is not None and mine.generation > new.generation:
            raise WrongState(
                subject,
                f"VM {self._name_of(new.vm)} holds it with generation {mine.generation}; {new.generation} is an earlier"
                " owner",
                "let the VM's present owner act",
            )
        others = tuple(c for c in claims if c is not mine)
        self.refuse([c for c in others if (c.write or new.write) and not (c.shared and new.shared)], subject)
        return (*others, new)

    async def _held(self, path: str) -> _Held:
        entry = await self._store.get(_key(path))
        if entry is None:
            return _Held(path, (), ABSENT)
        return _Held(path, _CLAIMS.validate_python(entry.value["claims"]), entry.revision)

    async def _listed(self, vm: str) -> tuple[tuple[str, ...], int]:
        entry: Entry | None = await self._store.get(_list_key(vm))
        return (_PATHS.validate_python(entry.value["paths"]), entry.revision) if entry else ((), ABSENT)


def _as_disk(number: int, path: str, write: bool) -> Disk:
    return Disk(id=f"volume{number}", source=DiskSource(path=path), read_only=not write)


def _wanted(vm: str, disks: Iterable[Disk], generation: int) -> dict[str, list[tuple[Claim, str]]]:
    """For each thing the disks are made of, the claims they need on it, each with what people call the thing."""
    wanted: dict[str, list[tuple[Claim, str]]] = {}
    for disk in disks:
        for layer in disk.source.layers():
            if layer.kind is SourceKind.EMPTY:
                continue
            path = thing_of(layer)
            write = disk.writes and layer is disk.source
            shared = disk.reservations and layer.networked  # of a local device QEMU's lock allows one writer
            claim = Claim(path=path, vm=vm, disk=disk.id, write=write, generation=generation, shared=shared)
            wanted.setdefault(path, []).append((claim, f"{layer.kind} {layer.path}"))
    return wanted


def _key(path: str) -> str:
    return f"claim/{path}"


def _list_key(vm: str) -> str:
    return f"claim-of/{vm}"


def _put(path: str, claims: Iterable[Claim]) -> Put:
    return Put(_key(path), {"claims": [c.to_json() for c in claims]})


def _put_list(vm: str, paths: Iterable[str]) -> Put:
    return Put(_list_key(vm), {"paths": [*sorted(paths)]})


def _lost(vm: str) -> Busy:
    return Busy(f"vm {vm}", "others claim its disks at the same moment", "try again")
