"""What the bits depend on: known without torch, equal to what torch reports, and noticed when it changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import client, numerics, python, small_directory

import stablegen.machine.device
from stablegen.core.numerics import Numerics
from stablegen.core.policy import load_policy
from stablegen.errors import DeviceError, DtypeError, NumericsChangedError
from stablegen.machine.device import Device, resolve_device, usable_cpus, visible_gpus
from stablegen.machine.plan import ENGINE_VERSION, KERNEL_VERSIONS, numerics_on, processed

POLICIES = ["single", "padded:4", "invariant", "native"]
H100 = Device("cuda:0", "NVIDIA H100 80GB HBM3", capability=(9, 0), sm_count=132)
CPU = Device("cpu", "a processor", instruction_set="avx2 fma", threads=3)


def test_known_without_torch_and_as_torch_has_it() -> None:
    code = """
import json, sys
from stablegen.machine.plan import processed, find_device, numerics_on
from stablegen.core.policy import load_policy

policies = sys.argv[1:]
def look():
    return [numerics_on(find_device("cpu", "float32"), load_policy(p), "float32").model_dump() for p in policies]
planned = look()
assert not {"torch", "transformers", "triton"} & set(sys.modules)
import torch
torch.set_num_threads(planned[0]["threads"])  # as the engine does
print(json.dumps([planned, look(), torch.__version__]))
"""
    planned, loaded, version = python(code, *POLICIES)
    assert planned == loaded
    assert {entry["torch"].split("+")[0] for entry in planned} == {
        version.split("+")[0]
    }  # not all metadata names the build


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_finds_what_was_planned(policy: str, tmp_path: Path) -> None:
    with client(tmp_path, model=small_directory(), policy=policy) as made:
        planned = made.numerics
        made.complete("Hello", max_new_tokens=1)
        assert made.numerics == planned
        assert made.self_check().numerics.policy == policy


def test_the_digest_is_stable() -> None:
    # a changed digest turns every stored answer's `exact` into `stable`: change it knowingly
    assert numerics().digest == "99191fcbc86c67ba6ac27333d843431732024ebd28e00802826fe435e539ef64"


@pytest.mark.parametrize("name", sorted(set(Numerics.model_fields)))
def test_every_field_moves_the_digest(name: str) -> None:
    other = {"sm_count": 1, "threads": 1, "engine_version": 9, "static": True, "choosing": 1}
    value: Any = {**other, "overrides": ("MKL_CBWR=COMPATIBLE",)}.get(name, "another")
    changed = numerics(**{name: value})
    assert changed.digest != numerics().digest
    assert changed.differences(numerics()) == {name: (value, getattr(numerics(), name))}
    assert numerics().differences(numerics()) == {}


def test_a_changed_copy_has_a_digest_of_its_own() -> None:
    first = numerics()
    assert first.digest != first.model_copy(update={"torch": "0.0.1"}).digest


def test_fields_that_do_not_apply_leave_the_digest_alone() -> None:
    spelled_out = numerics(cuda=None, triton=None, sm_count=None, reduced_precision=None)
    assert spelled_out.digest == numerics().digest


@pytest.mark.parametrize(
    ("policy", "device", "given", "absent"),
    [
        ("single", CPU, {"threads", "transformers", "float32_matmul_precision"}, {"cuda", "triton", "sm_count"}),
        ("invariant", CPU, {"threads"}, {"transformers", "cuda", "triton", "reduced_precision"}),
        (
            "single",
            H100,
            {"transformers", "reduced_precision", "sm_count", "compute_capability"},
            {"threads", "triton"},
        ),
        ("invariant", H100, {"sm_count", "compute_capability"}, {"transformers", "reduced_precision", "threads"}),
    ],
)
def test_which_fields_apply(policy: str, device: Device, given: set[str], absent: set[str]) -> None:
    found = numerics_on(device, load_policy(policy), "float32").model_dump()
    assert {name for name in given | absent if found[name] is not None} == given


@pytest.mark.parametrize(
    ("policy", "device", "engine"),
    [
        ("invariant", CPU, ("reference", KERNEL_VERSIONS["reference"], None)),
        ("invariant", H100, ("triton", KERNEL_VERSIONS["triton"], None)),
        ("single", CPU, ("transformers", ENGINE_VERSION, "eager")),
    ],
)
def test_engines_are_named(policy: str, device: Device, engine: tuple[str, int, str | None]) -> None:
    found = numerics_on(device, load_policy(policy), "float32", attention="eager")
    assert (found.engine, found.engine_version, found.attention) == engine


@pytest.mark.parametrize(
    ("policy", "device", "attention", "static"),
    [
        ("single", H100, "sdpa", True),
        ("padded:2", H100, "sdpa", True),
        ("single", H100, "eager", False),
        ("single", CPU, "sdpa", False),
        ("native", H100, "sdpa", False),
        ("invariant", H100, "sdpa", False),
    ],
)
def test_where_the_kv_cache_has_a_fixed_length(policy: str, device: Device, attention: str, static: bool) -> None:
    found = numerics_on(device, load_policy(policy), "float32", attention=attention, static_cache=True)
    assert found.static is static
    assert numerics_on(device, load_policy(policy), "float32", attention=attention).static is False


def test_processing_is_part_of_the_numerics() -> None:
    plain = numerics_on(CPU, load_policy("invariant"), "float32")
    assert set(processed(plain).differences(plain)) == {"choosing", "transformers"}


def test_kernel_versions_are_those_of_the_kernel_sets() -> None:
    from stablegen.kernels.reference import ReferenceKernels
    from stablegen.kernels.triton import TritonKernels

    assert {kernels.name: kernels.version for kernels in (ReferenceKernels, TritonKernels)} == KERNEL_VERSIONS


def test_overrides_of_the_environment_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert "MKL_CBWR=COMPATIBLE" in numerics_on(CPU, load_policy("single"), "float32").overrides


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("5,2", 5)])
def test_threads_follow_the_environment(value: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert usable_cpus() == threads


@pytest.mark.parametrize("value", ["0", "", "many"])
def test_a_senseless_thread_count_is_ignored(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    usual = usable_cpus()
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert usable_cpus() == usual >= 1


@pytest.mark.slow
def test_threads_of_the_environment_are_those_torch_uses(tmp_path: Path) -> None:
    code = """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = "1"
from support import client
from pathlib import Path
made = client(Path(sys.argv[1]))
planned = made.numerics.threads
made.complete("Hello", max_new_tokens=1)
import torch
print(json.dumps([planned, made.numerics.threads, torch.get_num_threads()]))
"""
    head = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    assert python(head + code, tmp_path) == [1, 1, 1]


@pytest.fixture
def restore_precision() -> Iterator[None]:
    import torch

    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("restore_precision")
@pytest.mark.parametrize("policy", ["single", "padded:2"])
def test_flags_changed_behind_the_client_are_noticed(policy: str, tmp_path: Path) -> None:
    import torch

    with client(tmp_path, policy=policy) as made:
        first = made.complete("Hello", max_new_tokens=1)
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(NumericsChangedError, match=r"highest.*medium.*make a new one") as told:
            made.complete(["Hello", "You"], max_new_tokens=1)
        assert [done.key for done in told.value.completions] == [first.key]
    with client(tmp_path, policy=policy) as anew:
        assert anew.numerics.float32_matmul_precision == "medium"
        assert anew.complete("Hello", max_new_tokens=1).verdict.status != "exact"


# -- devices, by a stand-in for NVML ---------------------------------------------------------------------------

GPUS = [
    ("GPU-aaaa-1", "NVIDIA H100 80GB HBM3", (9, 0), 16896),
    ("GPU-bbbb-2", "NVIDIA A100-SXM4-80GB", (8, 0), 6912),
    ("GPU-bbcc-3", "NVIDIA GeForce RTX 4090", (8, 9), 16384),
    ("GPU-dddd-4", "Tesla T4", (7, 5), 2560),
]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake: Any = ModuleType("pynvml")
    fake.open = 0

    def count(change: int) -> Callable[[], None]:
        def act() -> None:
            fake.open += change

        return act

    fake.nvmlInit, fake.nvmlShutdown = count(1), count(-1)
    fake.nvmlDeviceGetCount = lambda: len(GPUS)
    fake.nvmlDeviceGetHandleByIndex = lambda index: index
    fake.nvmlDeviceGetUUID = lambda handle: GPUS[handle][0]
    fake.nvmlDeviceGetName = lambda handle: GPUS[handle][1].encode()  # older libraries return bytes
    fake.nvmlDeviceGetCudaComputeCapability = lambda handle: GPUS[handle][2]
    fake.nvmlDeviceGetNumGpuCores = lambda handle: GPUS[handle][3]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    visible_gpus.cache_clear()
    yield fake
    visible_gpus.cache_clear()


def resolve(name: str, dtype: str = "float32", *, cuda: bool = True) -> Device:
    return resolve_device(name, dtype, torch_has_cuda=cuda, threads=2)


@pytest.mark.parametrize(("index", "multiprocessors"), [(0, 132), (1, 108), (2, 128), (3, 40)])
def test_a_gpu_by_nvml(index: int, multiprocessors: int, nvml: Any) -> None:
    found = resolve(f"cuda:{index}")
    assert found == Device(f"cuda:{index}", GPUS[index][1], capability=GPUS[index][2], sm_count=multiprocessors)
    assert nvml.open == 0


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2", [2]),
        ("2,0", [2, 0]),
        ("1, 3", [1, 3]),
        ("GPU-bbbb-2,0", [1, 0]),
        ("GPU-aa", [0]),
        ("1,9,0", [1]),
        ("-1", []),
        ("GPU-zz,0", []),
    ],
)
def test_cuda_visible_devices(visible: str | None, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [(gpu.name, gpu.model) for gpu in visible_gpus()] == [
        (f"cuda:{number}", GPUS[index][1]) for number, index in enumerate(seen)
    ]


@pytest.mark.usefixtures("nvml")
def test_auto_takes_the_first_gpu_where_torch_can_use_it() -> None:
    assert resolve("auto").name == resolve("cuda").name == "cuda:0"
    assert resolve("auto", cuda=False).name == resolve("cpu").name == "cpu"


@pytest.mark.usefixtures("nvml")
def test_bfloat16_needs_ampere() -> None:
    with pytest.raises(DtypeError, match=r"Tesla T4 .*7\.5.* bfloat16.*float32, float16"):
        resolve("cuda:3", "bfloat16")
    assert resolve("cuda:3", "float16").sm_count == 40
    assert resolve("cuda:1", "bfloat16").sm_count == 108


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("name", "cuda", "told"),
    [
        ("cuda:4", True, r"'cuda:4' was not found: 4 .*'cuda:0', .*'cuda:3'.*CUDA_VISIBLE_DEVICES"),
        ("cuda:0", False, "without CUDA.*'cpu' or 'auto'.*Install"),
        ("tpu", True, "'tpu' is unknown.*'cuda:N'"),
        ("cuda:x", True, "'cuda:x' is unknown"),
    ],
)
def test_a_device_that_is_not_there(name: str, cuda: bool, told: str) -> None:
    with pytest.raises(DeviceError, match=told):
        resolve(name, cuda=cuda)


def test_no_driver_means_no_gpu(nvml: Any) -> None:
    class NVMLError(Exception):
        pass

    def fail() -> None:
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = fail
    assert visible_gpus() == []
    with pytest.raises(DeviceError, match=r"'cuda' was not found: 0 .*'cpu' or 'auto'"):
        resolve("cuda")
    assert resolve("auto").name == "cpu"


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(DtypeError, match=r"'float8'.*float32, float16, bfloat16"):
        resolve("cpu", "float8")


def test_the_processor_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"vendor_id": "V", "cpu family": "25", "model": "1", "model name": "M", "stepping": "2"}
    monkeypatch.setattr(stablegen.machine.device, "_cpuinfo", lambda: info | {"flags": "fma other avx2"})
    assert resolve("cpu") == Device("cpu", "M (V family 25 model 1 stepping 2)", instruction_set="avx2 fma", threads=2)
