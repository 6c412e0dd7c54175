"""What the Python part of PyTorch asks of a build with CUDA, answered for emulated GPUs."""

import os
import types

import torch
import torch.distributed as dist

emulated = torch.ops.cuda_on_cpu
GPUS = emulated.gpus()
CAPABILITY = os.environ.get("CUDA_ON_CPU_CAPABILITY", "9.0")  # 7.5: a card without bfloat16
NCCL = "cuda:gloo,privateuseone:gloo"  # see `by_gloo` in cuda_on_cpu.cpp


class Event:
    """Work is done when it is asked for: there is nothing to wait for."""

    def __init__(self, **_): ...
    def record(self, stream=None): ...
    def wait(self, stream=None): ...
    def synchronize(self):
        emulated.wait()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _) -> float:
        return 1.0


class Stream(Event):
    """As `Event`: there is nothing to order."""

    stream_id = cuda_stream = 0

    def __init__(self, device=None, **_):
        self.device = torch.device("cuda", torch.cuda._utils._get_device_index(device, optional=True))

    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def wait_stream(self, _): ...
    def wait_event(self, _): ...
    def record_event(self, event=None):
        return event or Event()


def install() -> None:
    """Let `torch.cuda` find the GPUs, and `torch.distributed` NCCL."""
    of_extension = {
        "_cuda_getDeviceCount": lambda: GPUS,
        "_cuda_getDevice": emulated.current,
        "_cuda_setDevice": emulated.use,
        "_cuda_synchronize": emulated.wait,
        "_cuda_memoryStats": memory_stats,
        "_cuda_resetPeakMemoryStats": lambda _: emulated.forget_peak(),
        "_cuda_emptyCache": lambda: None,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_getCurrentRawStream": lambda _: 0,
        "_cuda_setStream": lambda **_: None,
        "_nccl_version": lambda: 2 << 32,  # 2.0.0
        "_nccl_version_suffix": lambda: b"",
    }
    of_cuda = {
        "_initialized": True,
        "default_generators": tuple(emulated.generator(gpu) for gpu in range(GPUS)),
        "_get_device_properties": properties,
        "get_device_properties": properties,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "current_stream": Stream,
        "default_stream": Stream,
        "Stream": Stream,
        "Event": Event,
    }
    for module, names in ((torch._C, of_extension), (torch.cuda, of_cuda)):
        for name, value in names.items():
            setattr(module, name, value)
    torch.UntypedStorage.clone = copied  # PyTorch's own creates one on a device by CUDA's library
    torch.storage._to = moved
    let_nccl_be_there()


def copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage().copy_(storage)


def moved(storage: torch.UntypedStorage, device, non_blocking=False) -> torch.UntypedStorage:
    room = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
    return storage if room.device == storage.device else room.untyped_storage().copy_(storage, non_blocking)


def exchange(gpu: int) -> int:
    before = emulated.current()
    emulated.use(gpu)
    return before


def memory_stats(gpu: int) -> dict:
    now, peak = emulated.memory(gpu)
    return {"allocated_bytes": {"all": {"current": now, "peak": peak}}}


def properties(device=None) -> types.SimpleNamespace:
    major, minor = map(int, CAPABILITY.split("."))
    size = {"total_memory": 80 * 10**9, "multi_processor_count": 132, "warp_size": 32}
    return types.SimpleNamespace(name="emulated on the CPU", major=major, minor=minor, **size)


def let_nccl_be_there() -> None:
    init_process_group, get_backend = dist.init_process_group, dist.get_backend
    device_of_objects = dist.distributed_c10d._get_object_coll_device

    def init(backend=None, **options):
        init_process_group(NCCL if backend == "nccl" else backend, **options)

    def name_of_backend(group=None):
        name = get_backend(group)
        return "nccl" if name == NCCL else name

    def where_objects_travel(group=None) -> str:
        return "cuda" if get_backend(group) == NCCL else device_of_objects(group)

    dist.distributed_c10d._get_object_coll_device = where_objects_travel
    for module in (dist, dist.distributed_c10d):
        module.init_process_group = init
        module.get_backend = name_of_backend
        module.is_nccl_available = lambda: True
