"""Which GPU a process will use, told by NVML and the environment before CUDA is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scratch import ROOT, clean_env

from mla_patch.compat import gpu
from mla_patch.compat.types import Gpu
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang import kv_indices as sglang_kv_indices
from mla_patch.hooks.sglang import sched_meta as sglang_sched_meta
from mla_patch.hooks.sglang import sparse_prefill as sglang_sparse_prefill
from mla_patch.hooks.sglang import tokenspeed
from mla_patch.hooks.sglang.edits import v4_policy

DISPLAY, H200, A100 = ((12, 0), "GPU-aaaa1111-0000"), ((9, 0), "GPU-bbbb2222-0000"), ((8, 0), "GPU-bbbb3333-0000")
MIG = {"GPU-bbbb2222-0000": ["MIG-cccc4444-0000", None, "MIG-cccc5555-0000"]}


def nvml(*gpus: tuple[tuple[int, int], str], **odd: Any) -> ModuleType:
    """A pynvml that lists ``gpus`` as (capability, UUID); ``odd`` replaces functions."""
    module: Any = ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetCount = lambda: len(gpus)
    module.nvmlDeviceGetHandleByIndex = lambda index: gpus[index]
    module.nvmlDeviceGetName = lambda handle: f"chip {handle[0][0]}".encode()
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: handle[0]
    module.nvmlSystemGetDriverVersion = lambda: "600.1"
    module.nvmlDeviceGetUUID = lambda handle: handle if isinstance(handle, str) else handle[1].encode()
    module.nvmlDeviceGetMaxMigDeviceCount = lambda handle: len(MIG.get(handle[1], ()))

    def instance(handle: Any, index: int) -> str:
        uuid = MIG[handle[1]][index]
        if uuid is None:
            raise module.NVMLError("not found")
        return uuid

    module.nvmlDeviceGetMigDeviceHandleByIndex = instance
    for name, value in odd.items():
        setattr(module, name, value)
    return module


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    monkeypatch.setattr(gpu, "_told", [])
    gpu._visible.cache_clear()
    yield
    gpu._visible.cache_clear()


def known(monkeypatch: pytest.MonkeyPatch, module: Any, chosen: str | None = None, order: str | None = None) -> Any:
    """The capability of the GPU that is known, or why none is."""
    monkeypatch.setitem(sys.modules, "pynvml", module)
    for name, value in (("CUDA_VISIBLE_DEVICES", chosen), ("CUDA_DEVICE_ORDER", order)):
        if value is not None:
            monkeypatch.setenv(name, value)
    gpu._visible.cache_clear()
    found = gpu.from_nvml()
    assert (found is None) == bool(gpu.why_unknown())
    return gpu.why_unknown() if found is None else found.capability


DIFFER = "the visible GPUs differ (sm_120, sm_90)"
FASTEST = "CUDA_VISIBLE_DEVICES counts GPUs from the fastest on, and they differ (sm_120, sm_90)"
LEAVES_NONE = "CUDA_VISIBLE_DEVICES excludes every GPU"
MIXED: list[tuple[str | None, str | None, Any]] = [
    (None, None, DIFFER),
    (None, "PCI_BUS_ID", DIFFER),
    ("1", "PCI_BUS_ID", (9, 0)),
    (" 1 ", "PCI_BUS_ID", (9, 0)),
    ("+1", "PCI_BUS_ID", (9, 0)),
    ("1gpu", "PCI_BUS_ID", (9, 0)),
    ("0", "PCI_BUS_ID", (12, 0)),
    ("0,1", "PCI_BUS_ID", DIFFER),
    ("1", None, FASTEST),
    ("1", "FASTEST_FIRST", FASTEST),
    ("1,-1,0", "PCI_BUS_ID", (9, 0)),
    ("1,7,0", "PCI_BUS_ID", (9, 0)),
    ("1,GPU-aaaa1111-0000", "PCI_BUS_ID", (9, 0)),
    ("1,1", "PCI_BUS_ID", LEAVES_NONE),
    ("", None, LEAVES_NONE),
    ("-1", None, LEAVES_NONE),
    ("-1,1", "PCI_BUS_ID", LEAVES_NONE),
    ("2", None, LEAVES_NONE),
    ("NoDevFiles", None, LEAVES_NONE),
    ("GPU-bbbb2222-0000", None, (9, 0)),
    ("GPU-bbbb", None, (9, 0)),
    ("GPU-BBBB2222", None, (9, 0)),
    ("GPU-", None, LEAVES_NONE),  # the beginning of two
    ("GPU-ffff", None, LEAVES_NONE),
    ("GPU-bbbb,GPU-ffff,GPU-aaaa", None, (9, 0)),
    ("GPU-bbbb,0", None, (9, 0)),
    ("GPU-bbbb,GPU-aaaa", None, "the visible GPUs differ (sm_90, sm_120)"),
    ("MIG-cccc4444-0000", None, (9, 0)),
    ("MIG-cccc5", None, (9, 0)),
    ("MIG-cccc4444-0000,MIG-cccc5555-0000", None, (9, 0)),
    ("MIG-GPU-bbbb2222-0000/3/0", None, (9, 0)),
    ("MIG-GPU-aaaa1111-0000/1/0", None, (12, 0)),
    ("MIG-ffff", None, LEAVES_NONE),
]


@pytest.mark.parametrize(("chosen", "order", "told"), MIXED, ids=[f"{c}-{o}" for c, o, _ in MIXED])
def test_of_two_kinds(chosen: str | None, order: str | None, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known(monkeypatch, nvml(DISPLAY, H200), chosen, order) == told


def test_of_one_kind_every_number_means_it(monkeypatch: pytest.MonkeyPatch) -> None:
    several = nvml(H200, ((9, 0), "GPU-dddd"))
    assert known(monkeypatch, several) == (9, 0)
    for chosen in ("1", "0,1", "1,0", "GPU-dddd"):
        assert known(monkeypatch, several, chosen) == (9, 0)
    assert known(monkeypatch, several, "2") == LEAVES_NONE


def test_what_is_set_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers choose their GPU after the start: nothing is remembered under another choice."""
    module = nvml(DISPLAY, H200)
    assert known(monkeypatch, module, "1", "PCI_BUS_ID") == (9, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu.from_nvml() == Gpu("chip 12", (12, 0), "600.1")


def raising(problem: BaseException) -> Any:
    def function(*args: Any) -> Any:
        raise problem

    return function


ODD = {
    "init": {"nvmlInit": raising(OSError("libnvidia-ml.so.1"))},
    "no count": {"nvmlDeviceGetCount": raising(AttributeError("nvmlDeviceGetCount"))},
    "a lost gpu": {"nvmlDeviceGetHandleByIndex": raising(RuntimeError("GPU is lost"))},
    "a number for a capability": {"nvmlDeviceGetCudaComputeCapability": lambda handle: 9},
    "words for a capability": {"nvmlDeviceGetCudaComputeCapability": lambda handle: ("nine", None)},
    "a count of None": {"nvmlDeviceGetCount": lambda: None},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("with_error", [True, False], ids=["NVMLError", "no NVMLError"])
def test_an_odd_nvml_tells_nothing(odd: str, with_error: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nvml(H200, **ODD[odd])
    if not with_error:
        del module.NVMLError
    assert known(monkeypatch, module) == "NVML reports no GPU"


def test_what_does_not_matter_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not UTF-8, a shutdown that fails, UUIDs that cannot be had: the capability has been told."""
    nothing: dict[str, Any] = dict.fromkeys(("nvmlDeviceGetUUID", "nvmlDeviceGetMaxMigDeviceCount"), raising(OSError()))
    module = nvml(H200, nvmlDeviceGetName=lambda handle: b"H\xff200", nvmlShutdown=raising(OSError()), **nothing)
    assert known(monkeypatch, module) == known(monkeypatch, module, "0") == (9, 0)
    json.dumps(gpu.from_nvml().name)  # type: ignore[union-attr]
    # MIG instances are asked for where there may be some; an NVML that does not know the word has none
    module = nvml(H200, nvmlDeviceGetMaxMigDeviceCount=raising(AttributeError()))
    assert known(monkeypatch, module, "GPU-bbbb") == (9, 0)


def test_doctor_lives_with_an_odd_nvml(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("raise OSError('a module of that name that is something else')\n")
    env = clean_env({"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    command = [sys.executable, "-m", "mla_patch", "doctor", "--json"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["gpu"]) == (0, None), done.stderr


# whose GPUs


ROCM = {"__version__": "2.11.0+rocm7.1", "cuda": None, "hip": "7.1.25424"}


def test_nvml_is_not_asked_beside_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A display GPU of NVIDIA's beside a torch that does not run on it."""
    monkeypatch.setattr(torch, "version", SimpleNamespace(**ROCM))
    assert known(monkeypatch, nvml(H200)).startswith("torch is built for ROCm")


def test_a_build_is_read_without_importing_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{name}: Optional[str] = {value!r}" for name, value in ROCM.items()]
    source = "\n".join(["from typing import Optional", *lines])
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch is not to be imported')\n")
    (tmp_path / "torch" / "version.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    gpu._build_in_source.cache_clear()
    try:
        assert gpu._torch_build() == (None, ROCM["hip"])
        assert known(monkeypatch, nvml(H200)).startswith("torch is built for ROCm")
    finally:
        gpu._build_in_source.cache_clear()


MAKERS = {
    "NVIDIA H200": ("13.0", None, "cuda", True),
    "Radeon 8060S Graphics": (None, "7.1", "hip", False),
    "Z100SM": (None, "5.7", "hip", False),
    "MetaX C500": ("11.6", None, "maca", False),  # its torch says that it is CUDA
    "a GPU of no Triton": ("12.8", None, None, True),
    "another of no Triton": (None, "7.1", None, False),
    "AMD's name on NVIDIA's": ("12.8", None, "cuda", True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_nvidia_is_told_by_builds_and_never_by_a_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    cuda, hip, backend, nvidia = MAKERS[name]
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda, hip=hip))

    class Active:
        def get_current_target(self) -> Any:
            if backend is None:
                raise RuntimeError("0 active drivers")
            return SimpleNamespace(backend=backend)

    monkeypatch.setattr(driver, "_active", Active())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for cached in (gpu._runs_cuda, gpu._from_index, gpu.capability):
        cached.cache_clear()  # type: ignore[attr-defined]
    try:
        tensor: Any = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
        device = gpu.from_tensor(tensor)
        assert device == Gpu(name, (9, 0), cuda=nvidia) and gpu.on_nvidia(tensor) == nvidia
        assert gpu.capability_of(tensor) == ((9, 0) if nvidia else (0, 0))
        refusal = None if nvidia else "not an NVIDIA GPU"
        for hook in (sglang_decode, sglang_sched_meta, sglang_sparse_prefill):
            assert hook.FEATURE.hardware is not None and hook.FEATURE.hardware(device) == refusal
        assert sglang_kv_indices.FEATURE.hardware is None
    finally:
        for cached in (gpu._runs_cuda, gpu._from_index, gpu.capability):
            cached.cache_clear()  # type: ignore[attr-defined]


def test_a_capability_of_another_maker_is_no_blackwell() -> None:
    """gfx1030 is (10, 3) to torch."""
    assert "another vendor" in str(tokenspeed.problem(Gpu("Radeon RX 6800", (10, 3), cuda=False)))
    assert "another vendor" not in str(tokenspeed.problem(Gpu("NVIDIA B300", (10, 3))))


# device numbers


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert gpu.index_of(torch.device("cuda")) == 3 and gpu.index_of(torch.device("cuda", 1)) == 1
    asked: list[int] = []
    monkeypatch.setattr(gpu, "capability", lambda index: asked.append(index) or (9, 0))
    monkeypatch.setattr(gpu, "shared_memory", lambda index: asked.append(index) or 1000)
    assert tokenspeed._use_pdl(torch.device("cuda")) and v4_policy.paged_route_supports(50, torch.device("cuda"))
    assert asked == [3, 3]


def test_the_last_word_is_a_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known(monkeypatch, nvml(H200)) == (9, 0) and gpu.known() == Gpu("chip 9", (9, 0), "600.1")
    monkeypatch.setattr(gpu, "_from_index", lambda index: Gpu("another", (8, 0)))
    gpu.from_tensor(SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=1)))  # type: ignore[arg-type]
    assert gpu.known() == Gpu("another", (8, 0))


def test_what_nvml_leaves_open_is_told_where_torch_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known(monkeypatch, nvml(DISPLAY, H200), "1") == FASTEST and gpu.for_engines() == (None, FASTEST)
    assert known(monkeypatch, nvml(DISPLAY, H200), "") == LEAVES_NONE and gpu.for_engines() == (None, "")


@pytest.mark.parametrize("kinds", [[(9, 0), (9, 0)], [(12, 0), (9, 0)]], ids=["alike", "different"])
def test_an_engine_started_from_here(kinds: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVML torch is asked, and GPUs that differ leave it open, too."""
    assert known(monkeypatch, nvml(nvmlInit=raising(OSError()))) == "NVML reports no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(gpu, "_from_index", lambda index: Gpu("a GPU", kinds[index]))
    if len(set(kinds)) == 1:
        assert gpu.for_engines() == (Gpu("a GPU", (9, 0)), "") and gpu.known() == Gpu("a GPU", (9, 0))
    else:
        assert gpu.for_engines() == (None, DIFFER) and gpu.known() is None
    assert gpu.from_torch() == Gpu("a GPU", kinds[0])  # what our own processes run on


def test_one_process_may_choose_after_the_start(tmp_path: Path) -> None:
    """The row of the findings: an H200 behind a display GPU, in a process of its own without torch."""
    (tmp_path / "pynvml.py").write_text(
        "GPUS = [(12, 0), (9, 0)]\ndef nvmlInit(): pass\ndef nvmlShutdown(): pass\ndef nvmlDeviceGetCount(): return 2\n"
        "def nvmlDeviceGetHandleByIndex(i): return i\ndef nvmlDeviceGetName(h): return f'chip {h}'\n"
        "def nvmlDeviceGetCudaComputeCapability(h): return GPUS[h]\ndef nvmlSystemGetDriverVersion(): return '1'\n"
    )
    code = "import sys; from mla_patch.compat import gpu; print(gpu.from_nvml(), 'torch' in sys.modules)"
    env = {"CUDA_VISIBLE_DEVICES": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for order, told in (("PCI_BUS_ID", "Gpu(name='chip 1', capability=(9, 0)"), ("FASTEST_FIRST", "None False")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=clean_env(env | {"CUDA_DEVICE_ORDER": order}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(told), done.stderr


REAL = """
import json, os
import pynvml
from mla_patch.compat import gpu
told = {}
for name, chosen in json.loads(os.environ["CHOICES"]).items():
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if chosen is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    found = gpu.from_nvml()
    told[name] = gpu.why_unknown() if found is None else list(found.capability)
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
import torch
told["cuda after"] = torch.cuda.is_initialized()
told["torch"] = list(torch.cuda.get_device_capability())
told["nvidia"] = gpu.on_nvidia(torch.empty(0, device="cuda"))
told["names"] = [gpu.known().name, torch.cuda.get_device_name()]
print(json.dumps(told))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_nvml(tmp_path: Path) -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs pynvml, as SGLang's own requirements have it")
    pynvml.nvmlInit()
    uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(0))
    uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
    pynvml.nvmlShutdown()
    choices = {"all": None, "number": "0", "uuid": uuid, "beginning": uuid[:12], "none": "", "no such": "GPU-zzzz"}
    env = {"CHOICES": json.dumps(choices), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": None}
    command = [sys.executable, "-c", REAL]
    done = subprocess.run(command, env=clean_env(env), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [told[name] for name in ("all", "number", "uuid", "beginning")] == [told["torch"]] * 4
    assert told["none"] == told["no such"] == LEAVES_NONE
    assert (told["cuda after"], told["nvidia"]) == (False, True) and len(set(told["names"])) == 1
