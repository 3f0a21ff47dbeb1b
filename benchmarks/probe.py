"""`mkdsl probe` without the command line's extras: measures the GPU at hand, prints a table and the profile, and writes it.

    python benchmarks/probe.py [--out FILE.json] [--name NAME]

The first column is measured; the second is the nearest built-in profile's, which may itself be scaled from a data sheet.
"""

import argparse
import json
import pathlib
import time

from mkdsl.gpu import comparison, gpu_at_hand, probe, write_profile


def main():
    parser = argparse.ArgumentParser(description="Measures the GPU at hand.")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--name")
    a = parser.parse_args()
    gpu, start = gpu_at_hand(), time.perf_counter()
    profile = probe(gpu, a.name, lambda what: print(f"{time.perf_counter() - start:5.1f} s  {what}", flush=True))
    print(f"{time.perf_counter() - start:5.1f} s  done: {gpu}; built-in: {gpu.nearest().name}\n")
    for row in comparison(profile, gpu.nearest()):
        print("{:48} {:>8} {:>8}".format(*row))
    print(f"\n{json.dumps(profile.to_json())}\nwritten to {write_profile(profile, a.out)}")


if __name__ == "__main__":
    main()
