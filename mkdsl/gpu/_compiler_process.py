"""A program of its own, without JAX: `python _compiler_process.py PLUGIN DRIVER NUMBERS < MODULE` compiles a Mosaic GPU module by XLA's plugin
for CUDA with a stand-in for the driver (`_compiler.py`). PTX and ptxas's report go to stdout, by the plugin's hand, and what the driver noted to
NUMBERS."""

import ctypes
import json
import pathlib
import sys


def main(plugin: str, driver: str, numbers: str) -> None:
    notes = ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)  # when the plugin looks for libcuda.so.1, it finds this one
    compile = ctypes.CDLL(plugin).MosaicGpuCompile
    compile.argtypes, compile.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    module = sys.stdin.buffer.read()
    if not compile(module, len(module)):
        sys.exit("Mosaic GPU's compiler gave up")
    noted = {name: ctypes.c_int.in_dll(notes, name).value for name in ("code_bytes", "smem_bytes")}
    pathlib.Path(numbers).write_text(json.dumps(noted), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
