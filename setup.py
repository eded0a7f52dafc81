"""Installs the package and builds csrc/ with CMake; everything about that build is in CMakeLists.txt.

Nothing here can fail an install: without a compiler, or where the kernels do not build, the package installs
without them, runs its ops in plain torch, and says so at first use; its planner's search then runs in Python.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def installed(package):
    """Folder of an installed package, or None.

    pip hides installed packages from a build through PYTHONPATH; -E looks past that, so the torch that is
    already there is used instead of a second download.
    """
    find = (
        f"import importlib.util as u; s = u.find_spec('{package}'); print(s.submodule_search_locations[0] if s else '')"
    )
    for flags in (["-E"], []):
        command = [sys.executable, *flags, "-c", find]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if path:
            return Path(path)
    return None


def torchvision_requirement():
    """torchvision, of a release that fits the torch that is installed: a plain "torchvision" would make pip replace
    that torch by the newest one. Before 2.14 torch 2.N goes with torchvision 0.(N + 15) alone; newer torchvisions take
    every torch from 2.14 on, and are not released with each."""
    torch = installed("torch")
    release = torch and re.search(r"__version__ = '2\.(\d+)\.\d+(\+|')", (torch / "version.py").read_text())
    if release and int(release[1]) < 14 and not installed("torchvision"):
        return f"torchvision==0.{int(release[1]) + 15}.*"
    return "torchvision"


def environment():
    """The build's environment: nvcc of $CUDA_HOME or /usr/local/cuda where none is on the PATH."""
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    if "CUDACXX" not in os.environ and not shutil.which("nvcc") and nvcc.exists():
        return os.environ | {"CUDACXX": str(nvcc)}
    return os.environ


def made_of():
    """A digest of everything the libraries depend on: sources, torch, Python, compilers and their flags."""
    torch = installed("torch")
    files = [ROOT / "CMakeLists.txt", *sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())]
    parts = [(str(file.relative_to(ROOT)), file.read_bytes()) for file in files]
    parts += [torch and (torch / "version.py").read_text(), sys.version, sysconfig.get_config_var("EXT_SUFFIX")]
    for tool in (environment().get("CXX", "c++"), environment().get("CUDACXX", "nvcc")):
        parts.append(shutil.which(tool) and subprocess.run([tool, "--version"], capture_output=True).stdout)
    parts += [os.environ.get(name) for name in ("CXXFLAGS", "CUDAARCHS", "CUDAFLAGS", "LDFLAGS")]
    return sha256(repr(parts).encode()).hexdigest()


class CMakeBuild(build_ext):
    def run(self):
        folder = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()) / "auglocal_ext"
        for old in [*folder.glob("libauglocal_ext*.so"), folder / f"_search{sysconfig.get_config_var('EXT_SUFFIX')}"]:
            old.unlink(missing_ok=True)
        if not shutil.which(os.environ.get("CXX", "c++")):
            return self.warn("no C++ compiler found: auglocal_ext is installed without its native kernels")
        try:
            for library in self.libraries_from(ROOT / "build" / "native"):
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(library, folder)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"auglocal_ext is installed without its native kernels: {error}")

    def libraries_from(self, kept):
        """The libraries, in the folder `kept`. They are built unless those of the last build are made of the same: so
        a second install, or a wheel, does not compile for minutes what is there."""
        note, wanted = kept / "made_of", made_of()
        if not note.exists() or note.read_text() != wanted:
            shutil.rmtree(kept, ignore_errors=True)
            try:
                self.build(kept, "ON")
                note.write_text(wanted)
            except subprocess.CalledProcessError as error:
                self.warn(f"building with AUGLOCAL_CUDA=ON failed: {error}")
                self.build(kept, "OFF")  # no note is left, so the next install tries again
        return kept.glob("*.so")

    def build(self, folder, cuda):
        with tempfile.TemporaryDirectory() as build:
            options = {
                "CMAKE_BUILD_TYPE": "Release",
                "TORCH_ROOT": installed("torch"),
                "Python_EXECUTABLE": sys.executable,
                "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
                "AUGLOCAL_CUDA": cuda,
            }
            defines = [f"-D{name}={value}" for name, value in options.items()]
            subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines], env=environment())
            subprocess.check_call(["cmake", "--build", build], env=environment())

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    name="auglocal_ext",
    version="0.1.0",
    description="Supervised local learning (AugLocal) for torchvision CNNs, on fused C++, CUDA and Triton kernels",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["auglocal_ext*"]),
    package_data={"auglocal_ext": ["*.so", "py.typed"]},
    ext_modules=[Extension("auglocal_ext.native", [])],
    cmdclass={"build_ext": CMakeBuild},
    entry_points={"console_scripts": ["auglocal = auglocal_ext.cli:main"]},
    setup_requires=["cmake>=3.24", "ninja", "pybind11>=3"] + ([] if installed("torch") else ["torch>=2.11"]),
    install_requires=["torch>=2.11", torchvision_requirement(), "numpy", "tqdm", "scikit-learn", "matplotlib"],
    extras_require={
        "tensorboard": ["tensorboard"],
        "timm": ["timm"],
        "export": ["onnx", "onnxscript"],
        "docs": ["sphinx>=8", "myst-parser", "furo"],
        "test": ["pytest", "pytest-cov", "pytest-xdist", "hypothesis"],
        # One release of each: another one lays out differently, or finds more.
        "lint": ["ruff==0.17.*", "clang-format==23.1.*", "mypy==2.4.*"],
    },
)
