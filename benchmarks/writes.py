"""Writing a file through the page cache and with direct I/O: CPU seconds and wall time.

  python benchmarks/writes.py --work=runs/writes --bytes=1.5e9

Writes a new file in pieces as long as those of a merge, and syncs it; both ways alternate, for
several rounds, with a pause before each, as in `merge_files.py`. Prints every round.
"""

import argparse
import pathlib
import time

from jaxmerge.io.disk import direct

PIECE = 2**21  # bytes
PAUSE = 4.0  # seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the file")
  parser.add_argument("--bytes", type=float, default=1.5e9)
  parser.add_argument("--rounds", type=int, default=3)
  options = parser.parse_args()
  options.work.mkdir(parents=True, exist_ok=True)
  print("| round | way | CPU s | wall s |\n| --: | --- | --: | --: |")
  for i in range(options.rounds):
    for way, least in {"through the cache": 2**63, "past it": direct.LEAST}.items():
      time.sleep(PAUSE)
      cpu, wall = written(options.work / "file", int(options.bytes), least)
      print(f"| {i + 1} | {way} | {cpu:.2f} | {wall:.2f} |", flush=True)


def written(path, size, least):
  """Writes and syncs a file; its seconds of CPU and on the wall."""
  direct.LEAST = least
  data = memoryview(bytes(PIECE))
  file = direct.PagedFile(path)
  began = time.process_time(), time.perf_counter()
  for start in range(0, size, PIECE):
    file.write(data[: size - start], start)
  file.sync()
  spent = time.process_time() - began[0], time.perf_counter() - began[1]
  file.close()
  path.unlink()
  return spent


if __name__ == "__main__":
  main()
