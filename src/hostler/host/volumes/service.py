"""Volumes as the host's users see them: the storage service's functions, long ones as jobs, and what a disk request
names turned into what a disk is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import structlog

from hostler.host.checkpoints.layers import all_fixed
from hostler.host.events import EventHub
from hostler.host.jobs import JobRunner
from hostler.host.pools.places import Places
from hostler.host.pools.service import Pools
from hostler.host.steps import JobContext, Plan, Step
from hostler.host.volumes.chains import Chains
from hostler.host.volumes.work import VolumeWork
from hostler.model.chain import ChainReport, ChainRequest, FlattenRequest
from hostler.model.disk import MAX_LAYERS, Disk, DiskSource, ImageFormat, Media, SourceKind
from hostler.model.errors import BadImage, InUse, InvalidInput, NotFound
from hostler.model.image import ImageDetails, Preallocation, VolumeView
from hostler.model.job import Job, Progress
from hostler.model.names import check_name, nearest
from hostler.model.pool import DEFAULT_POOL, source_of
from hostler.model.requests import DiskAdd, VolumeCreate, VolumeRegister
from hostler.model.views import Deleted
from hostler.model.vm import KernelBoot
from hostler.model.volume import Volume
from hostler.storage.claims import ClaimBook
from hostler.storage.devices import inspect_device
from hostler.storage.files import open_regular
from hostler.storage.formats import recognise
from hostler.storage.qemu_img import OnProgress

log = structlog.get_logger()


class Volumes:
    """The application functions about volumes."""

    def __init__(
        self,
        work: VolumeWork,
        claims: ClaimBook,
        jobs: JobRunner,
        events: EventHub,
        pools: Pools,
        places: Places,
    ) -> None:
        self.work = work
        self.users = work.tools.users
        self.service = work.tools.changes.service
        self._pools = pools
        self._places = places
        self._claims = claims
        self._jobs = jobs
        self._events = events
        self.chains = Chains(self.service, claims, jobs, events)

    async def list(self, pool: str | None = None) -> Sequence[Volume]:
        """Every volume this host knows, by name; with `pool` those in it. NotFound for a pool that is not known."""
        if pool is not None:
            await self._pools.named(pool)
        return [v for v in await self.service.list() if pool is None or v.pool == pool]

    async def get(self, ref: str) -> VolumeView:
        """The volume with that name or path, and who depends on it."""
        volume = await self.service.get(ref)
        return VolumeView(**dict(volume), users=await self.users.of(volume))

    async def create(self, request: VolumeCreate, by: str) -> Job:
        """Begin to make a volume; the job's result is the volume."""
        return await self._jobs.start(self.plan_create(request), by)

    def plan_create(self, request: VolumeCreate) -> Plan:
        """The job that makes a volume."""
        return Plan("volume.create", request.name, request.name, (self._create_step(request),))

    def _create_step(self, request: VolumeCreate) -> Step:
        async def do(context: JobContext) -> None:
            def show(fraction: float) -> None:
                context.progress(Progress(fraction=fraction, text="writing the image"))

            if context.job.data.get("made"):
                return
            volume = await self._make(request, show)
            context.no_return()
            await context.remember(made=True)
            self._events.publish("volume", volume.name, volume)
            context.result(volume.to_json())

        return Step("create", do)

    async def _make(self, request: VolumeCreate, show: OnProgress) -> Volume:
        """In its pool, or at its path."""
        name, format = request.name, request.format
        if request.source is None:
            assert request.size is not None
            taken = request.preallocate
            if request.path is None:
                needed = request.size if taken is Preallocation.FULL else 0
                return await self._places.make(request.pool or DEFAULT_POOL, name, request.size, format, needed, taken)
            pool = await self._pools.pool_at(request.path)
            place = pool.name if pool else ""
            return await self.service.create(name, request.size, format, request.path, place, taken)
        path, place = request.path, ""
        if path is None:
            check_name("volume", name)
            plan = await self._places.plan(request.pool or DEFAULT_POOL, name, request.size or 0, format)
            path, place = plan.path, plan.pool
            if plan.kind is not SourceKind.VOLUME:
                raise InvalidInput(
                    f"pool {plan.pool}",
                    "has LUNs or exports, into which no image is copied when a volume is made",
                    "make the volume, then move a disk onto it, or copy inside a guest",
                )
        elif (pool := await self._pools.pool_at(path)) is not None:
            place = pool.name
        return await self.service.create_from(
            name, request.source, format, request.size, path, request.source_format, show, place
        )

    async def recover(self, job: Job) -> None:
        """End an interrupted creation. The storage service has tidied up at its own start: the volume is there, whole,
        or nothing of it is."""
        volume = await self._known(job.target)

        async def tell(context: JobContext) -> None:
            assert volume is not None
            context.result(volume.to_json())

        plan = Plan(job.kind, job.target, job.target_name, (Step("create", tell),))
        if volume is not None and volume.created is not None and volume.created >= job.created:
            self._jobs.resume(plan, job, "create")
        else:
            self._jobs.unwind(plan, job)

    async def register(self, request: VolumeRegister, by: str) -> Volume:
        """Make an existing image a volume, in place."""
        volume = await self.service.register(request.name, request.path, request.format)
        pool = await self._pools.pool_at(volume.path)
        if pool is not None:
            volume = await self.service.amend(volume.name, pool=pool.name)
        self._events.publish("volume", volume.name, volume)
        log.info("volume.registered", name=volume.name, path=volume.path, by=by)
        return volume

    async def inspect(self, path: str) -> ImageDetails:
        """Everything about an image file, whether or not it is a known volume."""
        return await self.work.inspect(path)

    async def chain(self, request: ChainRequest) -> ChainReport:
        """An image with its parents, or all images of a directory, each link judged."""
        return await self.chains.survey(request)

    async def flatten(self, request: FlattenRequest, by: str) -> Job:
        """Begin to make a volume of an image and its parents; the job's result is the volume."""
        return await self.chains.flatten(request, by)

    async def delete(self, ref: str, by: str, keep_file: bool = False, dry_run: bool = False) -> Deleted:
        """Forget a volume, and delete its file unless `keep_file`. InUse while anything depends on it: a VM, also one
        that is off, a layer on top of it, a checkpoint."""
        volume = await self.service.get(ref)
        await self.users.require_none(volume)
        keep_file = keep_file or await self._places.stays(volume)
        outcome = Deleted(
            id=volume.name,
            removed=() if keep_file else (volume.path,),
            kept=(volume.path,) if keep_file else (),
        )
        if not dry_run:
            if volume.job and not self._jobs.is_under_way(volume.job):
                await self.chains.give_up(volume)  # its job is over, and could not remove it then
            else:
                await self.service.delete(volume.name, keep_file=keep_file)
            self._events.publish("volume", volume.name, None)
            log.info("volume.deleted", name=volume.name, path=volume.path, by=by, kept=keep_file)
        return outcome

    # for the operations on VMs

    async def place_in(self, pool: str, name: str, size: int, format: ImageFormat) -> str:
        """The path a new image of that name would have in a pool. InvalidInput for a pool that is not made of files;
        errors as `Places.plan`."""
        driver = await self._pools.named(pool)
        if not driver.pool.in_files:
            raise InvalidInput(
                f"pool {pool}",
                "has LUNs or exports; an image needs a pool of files",
                "give a directory or a pool of kind directory",
            )
        return (await self._places.plan(pool, name, size, format)).path

    async def pool_at(self, path: str) -> str:
        """The pool whose files lie there, "" for none."""
        pool = await self._pools.pool_at(path)
        return pool.name if pool is not None else ""

    async def resolve(self, request: DiskAdd) -> DiskSource:
        """What a disk request names. Images are recognised by content; raw ones must be said to be raw, since a guest
        can write any header into a raw image."""
        if request.device is not None:
            return await inspect_device(request.device)
        if request.volume is None:
            return DiskSource(kind=SourceKind.EMPTY, path="")
        writes = not request.read_only and request.media is Media.DISK and not request.overlay
        return await self.resolve_image(request.volume, request.format, writes)

    async def resolve_image(self, ref: str, format: ImageFormat | None, writes: bool = False) -> DiskSource:
        """What the name of a volume, or the path of an image, means. `writes`: a guest shall write it."""
        known = await self._known(ref)
        if known is not None:
            _require_same_format(known, format)
            if writes:
                await self._places.require_writable(known)
                await self.users.require_top(known)
            source = await self._chain(known)
            await self._places.verify(source, f"volume {known.name}")
            return source
        if not ref.startswith("/"):
            names = [v.name for v in await self.service.list()]
            near = nearest(ref, names)
            advice = f"did you mean {near!r}?" if near else "give the name of a volume or an absolute path"
            raise NotFound(f"volume {ref}", "there is no such volume", advice)
        try:
            found = await self.service.look(ref, format)
        except BadImage as error:
            if writes or not error.details.get("differencing"):
                raise
            return await self.chains.source(ref)
        if found.format is ImageFormat.RAW and format is not ImageFormat.RAW:
            raise InvalidInput(
                f"volume {ref}",
                "has no header of a known image format",
                "if it is a raw image, say so: format=raw",
            )
        if writes:
            await self.users.require_top(found)
        return DiskSource(path=found.path, format=found.format, size=found.size)

    async def _chain(self, volume: Volume) -> DiskSource:
        """A volume with the layers below it, which are volumes, too (those of a deleted VM's disks, for example); the
        lowest one of an overlay may be any image."""
        layers, backing = [volume], volume.backing
        source: DiskSource | None = None
        while backing is not None and source is None:
            below = await self._known(backing)
            if below is None or len(layers) > MAX_LAYERS:
                source = await self._image_below(volume, backing)
            else:
                layers.append(below)
                backing = below.backing
        above = [None, *layers]
        for over, layer in reversed(list(zip(above, layers, strict=False))):
            source = source_of(layer).model_copy(update={"backing": source})
            if over is not None and over.owner is None:  # an overlay, which was made for no VM's checkpoint
                source = all_fixed(source)
        assert source is not None
        return DiskSource.model_validate(source.model_dump())

    async def _image_below(self, volume: Volume, path: str) -> DiskSource:
        """An image that is no volume."""
        try:
            if await self._known(path) is None:
                return (await self.resolve_image(path, None)).but(fixed=True)
        except InvalidInput:  # raw: its format can only be said
            pass
        raise InvalidInput(
            f"volume {volume.name}",
            f"builds on {path}, which is no volume of this host",
            f"register that image first: hostler volume register NAME {path}",
        )

    async def _known(self, ref: str) -> Volume | None:
        try:
            return await self.service.get(ref)
        except NotFound:
            return None

    async def check_disks(self, disks: Sequence[Disk]) -> None:
        """Before a VM gets these disks: NotFound if the file or device of one is not there, and what `recognise` says
        of an image that was damaged or exchanged since it became known."""
        await asyncio.to_thread(_look_at, disks)
        for disk, layer in [(d, s) for d in disks for s in d.source.layers()]:
            await self._places.verify(layer, f"disk {disk.id}")

    async def check_kernel(self, boot: KernelBoot | None) -> None:
        """NotFound, NotPermitted or InvalidInput if kernel or initial RAM disk is no file this daemon can read."""
        paths = [] if boot is None else [path for path in (boot.kernel, boot.initrd) if path is not None]
        await asyncio.to_thread(_open_each, paths)

    def is_deletable(self, disk: Disk) -> bool:
        """Whether deleting a VM with its disks deletes this one."""
        return disk.source.kind is SourceKind.VOLUME and not disk.source.fixed and disk.writes and not disk.removable

    async def require_unused(self, paths: Sequence[str], but: str) -> None:
        """InUse if another VM than `but` holds one of these."""
        for path in paths:
            for claim in await self._claims.on(path):
                if claim.vm != but:
                    raise InUse(f"volume {path}", f"is in use by VM {claim.vm}", "detach it there first")

    async def delete_file(self, path: str) -> None:
        """Delete the image of a deleted VM; its volume record goes too."""
        known = await self._known(path)
        if known is not None:
            await self.service.delete(known.name)
        else:
            await asyncio.to_thread(_unlink, path)


def _require_same_format(volume: Volume, wanted: ImageFormat | None) -> None:
    if wanted is not None and wanted is not volume.format:
        raise InvalidInput(f"volume {volume.name}", f"has format {volume.format}, not {wanted}", "leave it out")


def _look_at(disks: Sequence[Disk]) -> None:
    for disk, layer in [(d, s) for d in disks for s in d.source.layers()]:
        try:
            if layer.kind in (SourceKind.DEVICE, SourceKind.CHAIN):
                os.stat(layer.path)
            elif layer.kind is SourceKind.VOLUME:
                recognise(layer.path, layer.format, overlay=layer.backing is not None)
        except (OSError, NotFound) as error:
            cause = error.strerror if isinstance(error, OSError) else error.cause
            raise NotFound(
                f"disk {disk.id} ({layer.path})",
                f"cannot be reached: {cause}",
                "mount its storage, or remove the disk",
            ) from error


def _open_each(paths: Sequence[str]) -> None:
    for path in paths:
        os.close(open_regular(path))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InUse(f"volume {path}", f"could not be deleted: {error.strerror}", "delete it by hand") from error
