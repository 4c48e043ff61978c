"""Checks of what is installed: torch, the native module, SGLang and the memory saver."""

from __future__ import annotations

import importlib.metadata
import tempfile

from spmd_engine.doctor import children
from spmd_engine.doctor.findings import Finding, Machine, failure, ok, skipped, warning
from spmd_engine.errors import ConfigError
from spmd_engine.trainer.environment import child_environment, memory_saver_library

#: The range that the package declares, and the versions that its tests run with.
OLDEST, BEYOND = "0.5.17", "0.6"
TESTED = ("0.5.17", "0.5.23")
_INSTALL_SGLANG = f"pip install sglang=={TESTED[0]}"
_IMPORT = "import sglang.srt.managers.scheduler as s; print(s.__name__)"


def check_torch(machine: Machine) -> Finding:
    """Is torch built for the GPUs that are here?"""
    try:
        import torch
    except (ImportError, OSError) as error:
        return failure(f"torch cannot be imported: {error}", "pip install torch, of the version that SGLang asks for")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"torch {torch.__version__}, built with {build}"
    if machine.has_gpu_nodes and not torch.version.cuda:
        return failure(
            f"{found}, but this machine has NVIDIA devices",
            f"install torch's wheel for CUDA: {_INSTALL_SGLANG} brings the right one from PyPI",
        )
    if machine.has_gpu_nodes and not machine.gpu_count and machine.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return failure(
            f"{found}; this machine has NVIDIA devices, but torch sees none",
            "see what nvidia-smi says: the driver may be too old for this CUDA, or the container was started without "
            "--gpus; a driver that is newer, or torch for an older CUDA, is needed",
        )
    return ok(f"{found}; {machine.gpu_count} GPUs" if machine.gpu_count else f"{found}; no GPU, so the CPU is used")


def check_native_module(machine: Machine) -> Finding:
    """Can the copies run, on GPUs if there are any?"""
    try:
        from spmd_engine.transfer import _native
    except ImportError as error:
        return failure(str(error), "pip install . in the source tree of spmd-engine; it needs a C++ compiler")
    if machine.gpu_count and not _native.has_cuda():
        return failure(
            "built without CUDA, but there are GPUs",
            "with nvcc on the PATH: SPMD_ENGINE_CUDA=ON pip install --force-reinstall --no-deps .",
        )
    return ok("loads; built with CUDA" if _native.has_cuda() else "loads; built without CUDA")


def check_sglang(machine: Machine) -> Finding:
    """Is a supported SGLang here, with the torch that it wants, and does it start?"""
    from packaging.version import Version

    try:
        installed = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return failure("SGLang is not installed", _INSTALL_SGLANG)
    version = Version(installed)
    if not Version(OLDEST) <= version < Version(BEYOND):
        return failure(f"SGLang {installed}; supported are {OLDEST} to below {BEYOND}", _INSTALL_SGLANG)
    if odd := _unmet("torch", of="sglang"):
        return failure(f"SGLang {installed} wants {odd}", f"pip install --force-reinstall sglang=={installed}")
    try:
        with tempfile.TemporaryDirectory(prefix="spmd-engine-doctor-") as scratch:
            environ = child_environment(
                machine.environ, on_cpu=not machine.gpu_count, tp_size=1, scratch=scratch, gpus=_all_gpus(machine)
            )
            children.run(["-c", _IMPORT], environ, timeout_s=machine.timeout_s)
    except children.ChildError as error:
        return failure(
            f"SGLang {installed} cannot be imported in a scheduler process: {error}",
            f"try it: python -c '{_IMPORT.partition(';')[0]}'; then pip install --force-reinstall sglang=={installed}",
        )
    if version > Version(TESTED[-1]):
        return warning(
            f"SGLang {installed} is newer than the newest version that is tested, {TESTED[-1]}",
            f"if something breaks: pip install sglang=={TESTED[-1]}",
        )
    return ok(f"SGLang {installed}, supported; its scheduler can be imported")


def _unmet(name: str, *, of: str) -> str:
    """The requirement for package `name` of package `of` that is not met, with what is there; "" if all are."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(of) or ():
        requirement = Requirement(text)
        if requirement.name != name or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{requirement}, which is not installed"
        if not requirement.specifier.contains(installed.partition("+")[0], prereleases=True):
            return f"{requirement}, but {installed} is installed"
    return ""


def check_memory_saver(machine: Machine) -> Finding:
    """Does a scheduler process with the preloaded library give GPU memory back?"""
    try:
        library = memory_saver_library()
    except ConfigError as error:
        return failure(str(error), "pip install --force-reinstall torch-memory-saver; only sleep and wake_up need it")
    if not machine.gpu_count:
        return skipped("installed, but there is no GPU: on the CPU, sleep and wake_up do without it")
    try:
        with tempfile.TemporaryDirectory(prefix="spmd-engine-doctor-") as scratch:
            environ = child_environment(
                machine.environ, on_cpu=False, tp_size=1, scratch=scratch, gpus=_all_gpus(machine), preload=library
            )
            printed = children.run(["-m", "spmd_engine.doctor.pausing"], environ, timeout_s=machine.timeout_s)
    except children.ChildError as error:
        return failure(
            f"a process with LD_PRELOAD={library} cannot pause its memory: {error}",
            "pip install --force-reinstall torch-memory-saver; only sleep and wake_up need it",
        )
    return ok(f"{printed.strip()}; preloaded from {library}")


def _all_gpus(machine: Machine) -> str:
    """CUDA_VISIBLE_DEVICES for a process that shall see what the trainer sees."""
    return machine.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(machine.gpu_count)))
