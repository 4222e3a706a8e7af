"""What a device process holds: per base its frozen weights and an engine, adapters by digest, prepared data.

Built on first use and kept for the life of the process: one base in memory serves every tenant.
"""

import functools
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from core.datasets.pack import read_pack
from core.diffusion.adapter import Adapter
from core.diffusion.base import Base
from core.diffusion.families import load_base
from core.diffusion.families.dit_passes import check_compiler
from core.diffusion.layout import AdapterLayout
from core.diffusion.products import is_quick_at_bfloat16
from core.jobs.claims import Plan
from core.models import Adapter as AdapterRow
from core.sampling.engine import Engine
from core.storage import verified
from core.storage.base import CorruptObject, ObjectMissing
from core.training.crew import Crew
from core.training.data import TrainingData, prepare
from core.training.machine import ask_for_determinism, numeric_path
from core.training.memory import fit_micro_batch, free_bytes, row_bytes
from core.training.path import NumericPath
from core.training.spec import TrainSpec
from core.training.trainee import Trainee, layout_of
from worker.adapter_cache import AdapterCache
from worker.outages import Rest, Transactions
from worker.services import Services, get_services

log = structlog.get_logger()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU_ROWS = 16
FEW_ROWS = 4  # of a CPU's pass while few wait: as quick a row as in wider ones, nearly (docs/performance.md)
_PREPARED = 16  # datasets whose latents stay in host memory between slices


@dataclass(frozen=True)
class Device:
    """One base on the device, with the engine that draws from it."""

    base: Base
    layout: AdapterLayout  # wide enough for every adapter that the service trains
    engine: Engine


class Runtime:
    def __init__(self, services: Services) -> None:
        self.services = services
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="store")  # encoding and storing, off the device thread
        self._devices: dict[str, Device] = {}
        self._twins: dict[tuple[str, torch.dtype], Base] = {}  # of bases that train in another type than they draw in
        self._cache = AdapterCache(
            services.settings.data_dir / "cache" / "adapters", services.store, services.settings.adapter_disk_bytes
        )
        self._keys: dict[str, str] = {}  # adapter digest to object key, as claims told us
        self._held: dict[str, Adapter] = {}  # adapters of running jobs, for previews
        self._prepared: OrderedDict[tuple[object, ...], TrainingData] = OrderedDict()
        self._row_bytes: dict[tuple[object, ...], int] = {}
        self._crew: Crew | None = None
        self.moved_at = time.monotonic()  # when the device thread last got anywhere
        self.transactions = Transactions(services.database, services.settings.lease_seconds, self.moved)
        self.trained_last = False  # whether the last slice was of jobs: an evaluation that waits is then next
        self.rest = Rest()  # from jobs and evaluations
        self.drawing_rest = Rest()  # from requests for images
        torch.set_num_threads(services.settings.threads)
        ask_for_determinism(torch.device(_device(services.settings.device)))
        if services.settings.compile:
            check_compiler(torch.device(_device(services.settings.device)))

    def moved(self) -> None:
        """Called within whatever takes long: a worker that does not for `stall_seconds` is taken to hang."""
        self.moved_at = time.monotonic()

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()
        for device in self._devices.values():
            device.engine.close()
        self._cache.close()
        self.pool.shutdown()

    def device(self, model: str) -> Device:
        """The base of that name, loaded when first asked for."""
        if model not in self._devices:
            settings = self.services.settings
            folder = str(self.services.catalog.folder(model))
            base = load_base(folder, device=_device(settings.device), dtype=_DTYPES[settings.dtype], name=model)
            layout = base.widest_layout()
            engine = Engine(
                base,
                layout,
                slots=settings.bank_slots,
                max_rows=self.max_rows,
                few_rows=FEW_ROWS if base.device.type == "cpu" else None,
                load_adapter=functools.partial(self._load_adapter, base.fingerprint),
                host_bytes=settings.adapter_host_bytes,
                buckets=settings.row_buckets,
                pinned=self._pinned(base),
            )
            self._devices[model] = Device(base, layout, engine)
            log.info("base.loaded", model=model, fingerprint=base.fingerprint, device=str(base.device))
        return self._devices[model]

    def training_base(self, model: str, path: Mapping[str, Any] | None) -> Base:
        """The base in the type of a job's numeric path; for a job that has none yet, in the type that jobs begin in."""
        drawing = self.device(model).base
        dtype = self._train_dtype(drawing) if path is None else _DTYPES[path["dtype"]]
        if dtype == drawing.dtype:
            return drawing
        key = (model, dtype)
        if key not in self._twins:
            twin = load_base(self.services.catalog.folder(model), device=drawing.device, dtype=dtype, name=model)
            twin.share(drawing)
            self._twins[key] = twin
            log.info("base.loaded", model=model, fingerprint=twin.fingerprint, dtype=str(dtype), purpose="training")
        return self._twins[key]

    def _train_dtype(self, drawing: Base) -> torch.dtype:
        wanted = self.services.settings.train_dtype
        if wanted != "auto":
            return _DTYPES[wanted]
        return torch.bfloat16 if is_quick_at_bfloat16(drawing.device) else drawing.dtype

    def _pinned(self, base: Base) -> list[str]:
        """Digests of the adapters on this base that the settings name; what cannot be had is left out and logged."""
        found: list[str] = []
        with self.services.database.read() as session:
            for adapter_id in self.services.settings.pinned_adapters:
                row = session.get(AdapterRow, adapter_id)
                if row is None or row.deleted_at is not None:
                    log.warning("adapter.not_pinned", adapter_id=adapter_id)
                elif row.base_fingerprint == base.fingerprint:
                    self.know(row.sha256, row.object_key)
                    found.append(row.sha256)
        return found

    @property
    def max_rows(self) -> int:
        """Rows of one pass. On a CPU fewer are quicker: what lies between the products stays in its caches."""
        settings = self.services.settings
        return settings.max_batch_rows or (CPU_ROWS if _device(settings.device) == "cpu" else 32)

    def engines(self) -> list[Engine]:
        return [device.engine for device in self._devices.values()]

    def know(self, digest: str, key: str) -> None:
        """Where an adapter's bytes lie, so that the engine may load it when its turn comes."""
        self._keys[digest] = key

    def hold(self, digest: str, adapter: Adapter) -> None:
        """An adapter that no store has: the present state of a running job."""
        self._held[digest] = adapter

    def let_go(self, digest: str) -> None:
        self._held.pop(digest, None)

    def numeric_path(self, base: Base, spec: TrainSpec) -> NumericPath:
        """How a job's numbers come about here, by the settings and the threads of the moment."""
        path = numeric_path(base, spec, compiled=self.services.settings.compile)
        if self.services.settings.packing == "always" and not path.is_steady:
            path = replace(path, packing="shared")
        return path

    @functools.cached_property
    def max_devices(self) -> int:
        """How many devices a job may have here."""
        settings = self.services.settings
        device = torch.device(_device(settings.device))
        if device.type != "cuda":
            return settings.max_devices
        return min(settings.max_devices, torch.cuda.device_count() - (device.index or 0))

    def crew(self, plan: Plan) -> Crew | None:
        """The other processes of a job on several devices; None where one is enough.

        They stay for the next such job on the same base: each has its base loaded, as this process has.
        """
        if plan.spec.devices == 1:
            return None
        base, settings = self.training_base(plan.model, plan.numeric_path), self.services.settings
        if self._crew is not None and not self._crew.is_for(base, plan.spec.devices):
            self._crew.close()
            self._crew = None
        if self._crew is None:
            self._crew = Crew(
                base,
                self.services.catalog.folder(plan.model),
                plan.spec.devices,
                timeout_seconds=settings.stall_seconds / 2,  # so that the job is given back before its worker is
                start_seconds=settings.stall_seconds,
                log_level=settings.log_level,
            )
            log.info("crew.started", model=plan.model, devices=plan.spec.devices, processes=self._crew.pids)
        return self._crew

    def row_bytes(self, base: Base, data: TrainingData, spec: TrainSpec) -> int:
        """What a row of such a job takes in a pass, measured once."""
        key = (base.fingerprint, base.dtype, layout_of(base, spec), data.mean.shape[2:])
        if key not in self._row_bytes:
            self._row_bytes[key] = row_bytes(base, data, spec)
            log.info("row.measured", base=base.name, bytes=self._row_bytes[key])
        return self._row_bytes[key]

    def row_budget(self, trainee: Trainee) -> int:
        """Rows of a pass that the free memory has room for."""
        cost = self.row_bytes(trainee.base, trainee.data, trainee.spec)
        return max(1, int(self._room(trainee.base) / cost))

    def micro_batch(self, base: Base, data: TrainingData, spec: TrainSpec) -> int:
        """Rows of a pass that a job has room for, measured and tried. Raises OutOfMemory."""
        room = self._room(base) // (spec.devices if base.device.type == "cpu" else 1)
        return fit_micro_batch(base, data, spec, self.row_bytes(base, data, spec), room)

    def _room(self, base: Base) -> int:
        return int(self.services.settings.train_memory_share * free_bytes(base.device))

    def pack(self, key: str, sha256: str) -> bytes:
        """A validated dataset's bytes. Raises CorruptObject, which is `dataset_corrupt`, where they are gone too."""
        try:
            return verified.get(self.services.store, key, sha256)
        except ObjectMissing as error:
            log.error("object.missing", key=key)
            raise CorruptObject("the dataset's bytes are gone", code="dataset_corrupt") from error
        except CorruptObject as error:
            message = "the dataset's bytes differ from what was validated"
            raise CorruptObject(message, code="dataset_corrupt") from error

    def prepared(self, plan: Plan) -> TrainingData:
        """The dataset as latents, from memory where an earlier slice made them. Raises CorruptObject."""
        base = self.device(plan.model).base
        spec = plan.spec
        latents_of = (base.fingerprint, plan.pack_sha256, spec.image_size, spec.flip, torch.get_num_threads())
        key = (*latents_of, spec.seed)
        if key not in self._prepared:
            pack = self.pack(plan.pack_key, plan.pack_sha256)
            images, labels, classes = read_pack(pack, spec.image_size)
            # The seed says what is held out, no more: a job with another one has its latents made already.
            made = next((data for (*of, _), data in self._prepared.items() if tuple(of) == latents_of), None)
            latents = (made.mean, made.deviation) if made else None
            self._prepared[key] = prepare(
                base, images, labels, classes, spec.seed, spec.flip, moved=self.moved, latents=latents
            )
            while len(self._prepared) > _PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _load_adapter(self, fingerprint: str, digest: str) -> Adapter:
        """By digest: from memory, the local disk, or the store. Runs off the device thread."""
        if digest in self._held:
            return self._held[digest]
        return self._cache.load(digest, self._keys[digest], fingerprint)


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many CPU threads for the length of a block, as a job's numeric path wants them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def get_runtime() -> Runtime:
    return Runtime(get_services())
