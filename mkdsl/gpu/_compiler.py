"""Mosaic GPU's own compiler without a GPU: where it is installed, and a process in which it believes that there is one.

JAX lowers Mosaic GPU kernels anywhere. What makes PTX of them, and machine code by ptxas, is XLA's plugin for CUDA, which asks the CUDA driver
what GPU there is. Here the driver is a library of a few functions that says what it is told to, and notes what it is given to load.
"""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

# JAX finds an installed plugin by itself, and where CUDA's libraries are missing, it prints a traceback each time it starts. So the plugin lies in
# a folder that JAX does not look into, and without what it depends on: 134 MB to download, 37 MB for ptxas and 62 MB for CUDA's mathematical
# functions. ptxas has a fixed version, so that the same kernel has the same registers everywhere. With a GPU, the extra cuda13 has installed all
# three, and nothing need lie in the folder.
FOLDER = pathlib.Path(sys.prefix) / "aot"
PLUGIN, PTXAS, LIBDEVICE = "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"
VERSIONS = {PLUGIN: importlib.metadata.version("jaxlib"), PTXAS: "13.0.88", LIBDEVICE: "13.0.88"}
FILES = {
    PLUGIN: "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
    PTXAS: "nvidia/cu13/bin/ptxas",
    LIBDEVICE: "nvidia/cu13/nvvm/libdevice/libdevice.10.bc",
}

# Constants are CUDA's: error 1, of the attributes of a device the two that make its compute capability, of a function's its shared memory.
_DRIVER = r"""
#include <elf.h>
#include <stdlib.h>
#include <string.h>

int code_bytes, smem_bytes;

static int machine_code(const char* image) {
  const Elf64_Ehdr* elf = (const void*)image;
  const Elf64_Shdr* sections = (const void*)(image + elf->e_shoff);
  const char* names = image + sections[elf->e_shstrndx].sh_offset;
  int bytes = 0;
  for (int i = 0; i < elf->e_shnum; ++i)
    if (!strncmp(names + sections[i].sh_name, ".text.", 6)) bytes += sections[i].sh_size;
  return bytes;
}

int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int capability = atoi(getenv("MKDSL_CAPABILITY"));
  if (attribute == 75) *value = capability / 10;
  else if (attribute == 76) *value = capability % 10;
  else return 1;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) { code_bytes = machine_code(image); *module = (void*)1; return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)1; return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { if (attribute == 8) smem_bytes = value; return 0; }
int cuGetErrorName(int error, const char** text) { *text = "not in mkdsl's stand-in for the driver"; return 0; }
int cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

// What a launch calls; nothing is launched.
void mosaic_gpu_init_tma_desc(void) { abort(); }
void mosaic_gpu_launch_kernel(void) { abort(); }
"""


def to_install() -> list[str]:
    """What `pip install --target FOLDER` is wanted for: nothing if all is installed somewhere, else all, since pip replaces a shared folder."""
    complete = all(next(_installed(package), None) for package in VERSIONS)
    return [] if complete else [f"{package}=={version}" for package, version in VERSIONS.items()]


def _installed(package: str) -> Iterator[pathlib.Path]:
    """The file that is wanted of a package, where it is installed. Any ptxas will do, but the plugin must be JAX's own."""
    for found in importlib.metadata.distributions(name=package, path=[str(FOLDER), *sys.path]):
        file = pathlib.Path(str(found.locate_file(FILES[package])))
        if file.exists() and (package != PLUGIN or found.version == VERSIONS[package]):
            yield file


def compile_module(module: bytes, capability: tuple[int, int], folder: pathlib.Path) -> tuple[str, dict[str, int]]:
    """Compiles one module in a process of its own: within one, the compiler keeps to the first GPU it was told of.

    Args:
      module: MLIR bytecode, as JAX hands it to the plugin.
      capability: of the GPU to compile for.
      folder: for temporary files.

    Returns:
      PTX followed by ptxas's report, and {"code_bytes": .., "smem_bytes": ..} as the driver was told.

    Raises:
      RuntimeError: something is not installed, or the module does not compile.
    """
    if packages := to_install():
        raise RuntimeError(
            f"assembling without a GPU needs {', '.join(packages)}: run `make setup`, or "
            f"{sys.executable} -m pip install --no-deps --upgrade --target {FOLDER} {' '.join(packages)}"
        )
    plugin, driver, numbers = next(_installed(PLUGIN)), _build_driver(folder), folder / "numbers.json"
    _lay_out_cuda(folder)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOSAIC_GPU_")}
    env |= {"MOSAIC_GPU_RUNTIME_LIB_PATH": str(driver), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    env |= {"MKDSL_CAPABILITY": f"{capability[0]}{capability[1]}", "TMPDIR": str(folder)}
    command = [sys.executable, "-I", pathlib.Path(__file__).with_name("_compiler_process.py"), plugin, driver, numbers]
    done = subprocess.run(command, input=module, env=env, cwd=folder, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"a kernel does not assemble for compute capability {capability}:\n{done.stderr.decode(errors='replace')}")
    return done.stdout.decode(), json.loads(numbers.read_text(encoding="utf-8"))


def _build_driver(folder: pathlib.Path) -> pathlib.Path:
    """The stand-in for the CUDA driver."""
    if not shutil.which("gcc"):
        raise RuntimeError("assembling without a GPU needs gcc, for a stand-in for the CUDA driver: install it (apt-get install gcc)")
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(_DRIVER, encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True)
    return library


def _lay_out_cuda(folder: pathlib.Path) -> None:
    """CUDA as the plugin looks for it first, before PATH and /usr/local/cuda: in the working directory."""
    cuda = folder / "cuda_sdk_lib"
    cuda.mkdir()
    (cuda / "bin").symlink_to(next(_installed(PTXAS)).parent)
    (cuda / "nvvm").symlink_to(next(_installed(LIBDEVICE)).parents[1])
